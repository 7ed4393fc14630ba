"""The rules of the house as functions that list violations: sizes, names, docstrings, words.

`PYTHONPATH=tests python -m support.house [PATH ...]` prints those of some files or folders, by default of the whole package.
"""

import ast
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "agnews_dist"
MAX_MODULE, MIN_MODULE, MAX_FUNCTION, MAX_PARAMETERS, MAX_SENTENCE = 400, 40, 80, 8, 25
MAX_README = 160
_VERBS = """
accept accumulate acquire adapt add adjust advance allocate analyse answer append apply ask assert assign attach attend average
await balance begin bind block bound bring broadcast build bypass calculate call cancel cap cast check choose claim clamp
classify clear clip close collect combine commit compare compile complete compute concatenate configure connect continue
convert copy count create cut deal decide decode delete deliver describe destroy detect disable discard dispatch display
distribute divide do draw drop emit enable encode end ensure enter erase escape estimate evaluate evict exchange exclude
exit expand explain export expose extend fail feed fetch fill filter find finish fit flush fold forecast format forward
free freeze gather generate get give group handle hash hide hold ignore import infer initialise insert invert iterate
join keep kill label launch lay leave let limit link list listen load locate lock log look lower make map mark match
measure merge monitor move multiply name normalise note notify open order overwrite pack pad parse pass pick pin place
plan poll prepare print probe process profile propose prune publish put quote raise rank read rebuild receive record
redraw reduce refill refuse register rehearse reject release remember remove rename render reopen repeat replace report
request requeue require reserve reset resolve restart restore resume return reuse rewind round run sample save scale
scan schedule score select send serve set shard share shorten show shuffle signal silence size skip sleep sort split
start stop store strip subtract suggest sum summarise suppress swap sweep switch sync take tell test time tokenise trace
track train translate transpose trim truncate try turn unfreeze unlock unpack unwrap update use validate verify vote
wait wake walk warn weigh widen withhold wrap write yield
"""
VERBS = frozenset(_VERBS.split())
"""First words of functions' docstrings."""
WRONG_STARTS = ("What", "Whether", "Of", "How", "Where", "Be", "Have", "So", "When", "Which", "Who", "That", "Why", "As", "Its")
"""First words that no docstring has."""
BANNED = re.compile(
    r"\b(?-i:(?!STORY\b))"
    r"(?:told|mend(?:s|ed|ing)?|lest|nobody|whoever|somebody|beside|anew|astray|for want of|(?:goes|go|going) on|stands|shall"
    r"|in words|what trains|is no(?! longer\b| more than\b| less than\b| later than\b)(?= [a-z])|so many"
    r"|stor(?:y|ies)|doors?)\b",
    re.IGNORECASE,
)
"""Words for which plain ones exist. STORY is a variable of before, which launch/node.sh refuses."""

Violation = str
Rule = Callable[[Path], Iterator[Violation]]


def python_files(paths: Iterable[Path]) -> list[Path]:
    """Every Python file at or below `paths`."""
    return sorted(file for path in paths for file in ([path] if path.suffix == ".py" else path.rglob("*.py")))


def module_lengths(path: Path) -> Iterator[Violation]:
    """Modules outside of MIN_MODULE to MAX_MODULE lines; a package's `__init__`, and what only dispatches, may be short."""
    num_lines = path.read_text(encoding="utf-8").count("\n")
    is_short_by_nature = path.name in ("__init__.py", "__main__.py") or path == PACKAGE / "train.py"
    if num_lines > MAX_MODULE or (num_lines < MIN_MODULE and not is_short_by_nature):
        yield f"{num_lines} lines: a module has {MIN_MODULE} to {MAX_MODULE}"


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a module. Callers must not change it."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(tree: ast.Module) -> list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function, and whether it is a method."""
    methods = {id(part) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body}
    return [(node, id(node) in methods) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def function_sizes(path: Path) -> Iterator[Violation]:
    """Functions of more than MAX_FUNCTION lines or MAX_PARAMETERS parameters."""
    for node, is_method in functions_of(parse(path)):
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION:
            yield f"{node.lineno}: {node.name} has {num_lines} lines, at most {MAX_FUNCTION}"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        num_parameters = len(arguments) - (is_method and bool(arguments) and arguments[0].arg in ("self", "cls"))
        if num_parameters > MAX_PARAMETERS:
            yield f"{node.lineno}: {node.name} has {num_parameters} parameters, at most {MAX_PARAMETERS}"


def decorator_names(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Last parts of the decorators' names."""
    return {ast.unparse(each).partition("(")[0].rpartition(".")[2] for each in node.decorator_list}


def docstrings_of(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it belongs to a function that is called) of every docstring, attributes' included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_called = is_function and not decorator_names(node) & {"property", "cached_property", "setter", "fixture"}
            if text:
                yield node.body[0].lineno, text, is_called and not node.name.startswith("__")
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for before, after in itertools.pairwise(body):
                if isinstance(before, (ast.Assign, ast.AnnAssign)) and isinstance(after, ast.Expr):
                    value = after.value
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield after.lineno, value.value.strip(), False


def first_words(path: Path) -> Iterator[Violation]:
    """Docstrings of functions that begin with no verb, and others that begin with a WRONG_START."""
    for line, text, is_called in docstrings_of(parse(path)):
        word = re.match(r"\w*", text)
        first = word[0] if word else ""
        if is_called and first.lower() not in VERBS:
            yield f"{line}: a function's docstring begins with an imperative verb, not {text[:40]!r}"
        elif first in WRONG_STARTS:
            yield f"{line}: {text[:40]!r}: begin with a noun phrase"


def sentences(text: str) -> list[str]:
    """The sentences of a docstring or comment, without code, lists and sections."""
    prose = re.sub(r">>>.*?(?:\n\n|$)|``?[^`]*``?", " x ", text, flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\w[\w./*]*\s{2,}|\w+:\s))|\n(?=\s{4,})", prose)
    return [part for block in blocks for part in re.split(r"(?<=[.!?;:])\s+", " ".join(block.split())) if part]


def long_sentences(path: Path) -> Iterator[Violation]:
    """Sentences of docstrings with more than MAX_SENTENCE words."""
    for line, text, _ in docstrings_of(parse(path)):
        for sentence in sentences(text):
            num_words = len(sentence.split())
            if num_words > MAX_SENTENCE:
                yield f"{line}: {num_words} words, at most {MAX_SENTENCE}: {sentence[:60]!r}"


def banned_words(path: Path) -> Iterator[Violation]:
    """BANNED words: in comments and strings of Python files, anywhere in others."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1))
        pieces = [(token.start[0], token.string) for token in tokens if token.type in kinds]
    else:
        pieces = list(enumerate(text.splitlines(), start=1))
    for line, piece in pieces:
        for match in BANNED.finditer(" ".join(piece.split())):
            yield f"{line}: {match[0]!r}"


def misplaced_entries(package: Path) -> list[Violation]:
    """Entries that the top of the package has but should not have, or should have but has not."""
    folders = "api commands config data distributed engine evaluation experiments features model preflight report run storage training"
    modules = "__init__.py __main__.py errors.py events.py py.typed train.py"
    entries = {path.name for path in package.iterdir() if path.name != "__pycache__"}
    return sorted(entries ^ {*folders.split(), *modules.split()})


def readme_length(path: Path) -> list[Violation]:
    """A README of more than MAX_README lines."""
    num_lines = path.read_text(encoding="utf-8").count("\n")
    return [f"{num_lines} lines, at most {MAX_README}"] if num_lines > MAX_README else []


def repeated_names(modules: Iterable[Path]) -> list[str]:
    """Names that two modules share. A package's `__init__` has none; train.py is the command's second entry."""
    names = [path.stem for path in modules if path.name != "__init__.py" and path != PACKAGE / "train.py"]
    return sorted({name for name in names if names.count(name) > 1})


def prose_files() -> list[Path]:
    """Documents, scripts and shipped configurations."""
    patterns = ("*.md", "docs/*.md", "tests/*.md", "slurm/*", "launch/*", "configs/**/*.yaml", ".ci/run", "Makefile")
    found = {path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file()}
    return sorted(found - {REPOSITORY / "LICENSE", REPOSITORY / "slurm" / "site.env"})


def test_names() -> list[str]:
    """Names of all test functions."""
    files = python_files([REPOSITORY / "tests"])
    return [name for file in files for name in re.findall(r"^\s*def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)]


def mutant_names() -> list[str]:
    """Names of all mutants."""
    return [path.stem for path in (REPOSITORY / "tests" / "mutants").glob("*.patch")]


def banned_in_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that contain BANNED words."""
    return [name for name in names if BANNED.search(re.sub(r"[-_]", " ", name))]


RULES = (module_lengths, function_sizes, first_words, long_sentences, banned_words)

if __name__ == "__main__":
    chosen = [Path(argument).resolve() for argument in sys.argv[1:]] or [PACKAGE]
    total = 0
    for file in python_files(chosen):
        for rule in RULES:
            for violation in rule(file):
                total += 1
                print(f"{file.relative_to(REPOSITORY)}:{violation}  [{rule.__name__}]")
    print(f"{total} violations")
    sys.exit(total > 0)
