"""The rules of the house, held by tests: what is where, layers, sizes, names, words, messages, import cost.

Each rule is a function of tests/support/house.py that lists violations; for each there is a control that is red.
"""

import ast
import doctest
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import house

from agnews_dist.config.fields import all_sections, all_settings
from agnews_dist.distributed.world import LAUNCHER_VARIABLES

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "agnews_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MESSAGE = 160
"""Characters of an error message; each value in it counts as one."""
HEAVY = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "numpy", "pyarrow", "rich", "tokenizers")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def dotted(node: ast.AST) -> str:
    """`torch.distributed.init` for that expression; empty for anything that is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def references(tree: ast.Module) -> Iterator[str]:
    """Every imported module and every dotted name that the code uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def reaches(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in references(house.parse(path)))


@pytest.mark.parametrize("path", [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")], ids=name_of)
def test_examples_in_docstrings_are_true(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 80
    assert len(house.prose_files()) > 25
    assert len(house.test_names()) > 500


def test_the_package_shows_its_architecture(tmp_path: Path) -> None:
    """Folders, and the modules that belong to no folder."""
    assert house.misplaced_entries(PACKAGE) == []
    top = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {"agnews_dist", "launch", "configs", "tests", "slurm", "docs"} <= top
    (tmp_path / "helpers.py").touch()
    assert {"helpers.py", "errors.py", "run"} <= set(house.misplaced_entries(tmp_path)), "one too many, others missing"


def test_the_package_is_small() -> None:
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in MODULES) <= 36_100


def test_module_names_are_unique() -> None:
    assert house.repeated_names(MODULES) == []
    assert house.repeated_names([Path("a/runner.py"), Path("b/runner.py"), Path("b/c.py")]) == ["runner"]


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_every_module_follows_the_rule(rule: house.Rule) -> None:
    assert [f"{name_of(path)}:{violation}" for path in MODULES for violation in rule(path)] == []


CONTROLS = {
    house.module_lengths: ["x = 1\n" * 401, "x = 1\n" * 39],
    house.function_sizes: [
        "def f():\n" + "    x = 1\n" * 80,
        "class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ...\n",
        "def f(a, b, c, d, *, e, f, g, h, i): ...\n",
    ],
    house.first_words: [
        'def f():\n    """The sum."""\n',
        'def f():\n    """Returns the sum."""\n',
        'class A:\n    """What a step leaves."""\n',
        'x = 1\n"""Where it is."""\n',
        '"""How it works."""\n',
    ],
    house.long_sentences: [f'"""{"word " * 26}"""\n', f'"""Short. {"word " * 26}"""\n'],
    house.banned_words: [
        "# nobody waits\n",
        "x = 'it goes on'\n",
        'x = f"{y} is no number"\n',
        '"""The story."""\n',
        "# beside the file\n",
    ],
}


def test_the_rules_have_controls() -> None:
    assert set(CONTROLS) == set(house.RULES)


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_a_module_that_breaks_the_rule_is_found(rule: house.Rule, tmp_path: Path) -> None:
    for number, text in enumerate(CONTROLS[rule]):
        path = tmp_path / f"{number}.py"
        path.write_text(text, encoding="utf-8")
        assert list(rule(path)), text


def test_a_module_that_follows_the_rules_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fine.py"
    path.write_text(
        '"""A module."""\n\n\nclass Batch:\n    """A batch."""\n\n    size = 1\n    """Examples, besides padding."""\n\n'
        '    @property\n    def width(self):\n        """The width; it is no longer 0."""\n        return 1\n\n\n'
        'def add(a, b):\n    """Return the sum."""\n    return a + b\n' + "\n" * 40,
        encoding="utf-8",
    )
    assert [violation for rule in house.RULES for violation in rule(path)] == []


def test_prose_and_scripts_use_plain_words(tmp_path: Path) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{violation}" for path in house.prose_files() for violation in house.banned_words(path)
    ]
    assert found == []
    control = tmp_path / "a.md"
    control.write_text("Wait.\nWhoever asks is told.\n", encoding="utf-8")
    assert list(house.banned_words(control)) == ["2: 'Whoever'", "2: 'told'"]


def test_names_of_tests_and_mutants_use_plain_words() -> None:
    assert house.banned_in_names([*house.test_names(), *house.mutant_names()]) == []
    assert len(house.mutant_names()) >= 60
    names = ["test_nobody_waits", "peers-tell-every-story", "test_a_run_goes_on", "test_scores_are_equal"]
    assert house.banned_in_names(names) == names[:3]


def test_the_readme_is_short(tmp_path: Path) -> None:
    assert house.readme_length(REPOSITORY / "README.md") == []
    control = tmp_path / "README.md"
    control.write_text("line\n" * 161, encoding="utf-8")
    assert house.readme_length(control)


@pytest.mark.parametrize(
    ("module", "users"),
    [
        ("torch.distributed", "api/launched.py distributed/collectives.py distributed/rendezvous.py engine/fsdp.py"),
        ("accelerate", "engine/engine.py"),
        ("deepspeed", "engine/deepspeed.py"),
    ],
)
def test_one_module_imports_it(module: str, users: str) -> None:
    """torch.distributed has four users: rendezvous, collectives, FSDP2, which is an engine, and the launcher of `fit`."""
    assert len(MODULES) > 10
    assert sorted(name_of(path) for path in MODULES if reaches(path, module)) == users.split()


def test_every_way_of_importing_is_seen(tmp_path: Path) -> None:
    ways = (
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "from torch.distributed.nn import all_gather",
        "import torch\ntorch.distributed.barrier()",
        "import importlib\nimportlib.import_module('torch.distributed')",
    )
    for number, code in enumerate(ways):
        path = tmp_path / f"{number}.py"
        path.write_text(code, encoding="utf-8")
        assert reaches(path, "torch.distributed"), code
    innocent = tmp_path / "innocent.py"
    innocent.write_text("import torch\nfrom torch import nn\ntorch.distributions.Normal", encoding="utf-8")
    assert not reaches(innocent, "torch.distributed")


def test_the_launcher_is_asked_in_one_place() -> None:
    readers = [
        name_of(path)
        for path in MODULES
        for node in ast.walk(house.parse(path))
        if isinstance(node, ast.Constant) and node.value in LAUNCHER_VARIABLES
    ]
    assert len(readers) >= len(LAUNCHER_VARIABLES)
    assert set(readers) == {"distributed/world.py"}


def test_basic_settings_are_few_and_config_is_small() -> None:
    assert 10 < len([key for key, setting in all_settings().items() if setting.level == "basic"]) <= 25
    assert [name for name, (_, text) in all_sections().items() if not text] == []
    # Settings and their texts do not count, so that a new setting needs no change here.
    schema = house.parse(PACKAGE / "config" / "schema.py")
    texts = sum(text.count("\n") + 1 for _, text, _ in house.docstrings_of(schema))
    settings = sum(isinstance(node, ast.AnnAssign) and "setting(" in ast.unparse(node) for node in ast.walk(schema))
    assert settings == len(all_settings())
    num_lines = sum(path.read_text(encoding="utf-8").count("\n") for path in (PACKAGE / "config").glob("*.py"))
    assert num_lines - texts - settings <= 580


def test_light_imports() -> None:
    code = (
        "import sys, agnews_dist, agnews_dist.__main__, agnews_dist.commands.arguments, agnews_dist.config.schema\n"
        "import agnews_dist.errors, agnews_dist.distributed.world, agnews_dist.events, agnews_dist.train\n"
        "agnews_dist.commands.arguments.load(['--optim.lr', '1e-4'])\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def user_errors() -> set[str]:
    """UserError and all classes of the package below it, by name."""
    bases = {
        node.name: {dotted(base).rsplit(".", 1)[-1] for base in node.bases}
        for path in MODULES
        for node in ast.walk(house.parse(path))
        if isinstance(node, ast.ClassDef)
    }
    found = {"UserError"}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


def text_of(message: ast.expr) -> str | None:
    """The text of a literal message with a letter for every value in it; None where it is put together elsewhere."""
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return message.value
    if isinstance(message, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in message.values)
    if isinstance(message, ast.BinOp) and isinstance(message.op, ast.Add):
        left, right = text_of(message.left), text_of(message.right)
        return None if left is None or right is None else left + right
    return None


def has_the_form(text: str) -> bool:
    what, colon, rest = text.partition(": ")
    # A value after the second sentence is a `did_you_mean`, which brings its own blank.
    why, _, remedy = rest.replace(".x ", ". x ").replace("? ", ". ").partition(". ")
    return bool(what and colon and why and remedy) and text.endswith((".", "x", "?"))


def own_text(node: ast.ClassDef) -> ast.expr | None:
    """The message that a class of errors puts together itself, from what its `raise` gives it."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__":
            return next((text for text in call.args if isinstance(text, ast.JoinedStr)), None)
    return None


def messages(classes: set[str]) -> list[tuple[str, ast.expr]]:
    """Every message of a user error, with its place: an argument of `raise`, or written by the class of the error."""
    trees = {path: house.parse(path) for path in MODULES}
    nodes = [(name_of(path), node) for path, tree in trees.items() for node in ast.walk(tree)]
    defined = [(module, node) for module, node in nodes if isinstance(node, ast.ClassDef) and node.name in classes]
    own = {node.name: (f"{module}:{node.lineno}", text) for module, node in defined if (text := own_text(node)) is not None}
    raised = [
        (f"{module}:{call.lineno}", call.args[0])
        for module, node in nodes
        if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call) and call.args
        if (name := dotted(call.func).rsplit(".", 1)[-1]) in classes and name not in own
    ]
    return raised + list(own.values())


@pytest.mark.slow
def test_user_errors_say_what_why_and_what_to_do() -> None:
    classes = user_errors()
    assert {"UserError", "ConfigError", "DataError", "ModelError"} <= classes
    texts = [(place, text) for place, message in messages(classes) if (text := text_of(message)) not in (None, "x")]
    assert len(texts) >= 4
    wrong = [f"{place}: {text}" for place, text in texts if not has_the_form(str(text))]
    assert wrong == []
    long = [f"{place}: {len(str(text))} characters: {text}" for place, text in texts if len(str(text)) > MAX_MESSAGE]
    assert long == []


def writers_of_nan(tree: ast.Module) -> list[int]:
    """Return the lines of calls that may write NaN, which is not JSON."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func).startswith("json.dump")]
    strict = {"allow_nan=False"}
    return [call.lineno for call in calls if not strict & {ast.unparse(keyword) for keyword in call.keywords}]


def test_no_json_holds_nan() -> None:
    found = [name_of(path) for path in MODULES for _ in writers_of_nan(house.parse(path))]
    assert found == ["training/checkpoint.py"], "the state of a checkpoint, which only this module reads"
    lax = "json.dumps(1)\njson.dump(1, file, allow_nan=True)\njson.dumps(1, allow_nan=False)\n"
    assert writers_of_nan(ast.parse(lax)) == [1, 2]
    assert not any(reaches(path, "json.JSONEncoder") for path in MODULES)


def test_the_form() -> None:
    assert has_the_form("lr -1: the update would point uphill. Set it to at least 0.")
    for bad in ("lr is wrong", "lr -1: bad.", "lr -1 is bad. Set another.", "lr: bad. Fix it"):
        assert not has_the_form(bad), bad


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_import_layers() -> None:
    done = lint_imports(REPOSITORY)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.slow
def test_an_import_of_a_higher_layer_breaks_the_contracts(tmp_path: Path) -> None:
    """One edit breaks each contract: a layer upwards, a Config in the library, torch in the settings."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / PACKAGE.name / "events.py").open("a", encoding="utf-8") as file:
        file.write("from agnews_dist.config import schema\nimport torch\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "0 kept, 3 broken" in done.stdout, done.stdout


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, all extras included."""
    # tomllib is in the standard library from 3.11 on; hatchling is there anyway and knows the file.
    from hatchling.metadata.core import ProjectMetadata

    project = ProjectMetadata(str(REPOSITORY), None).config["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(text for extra in extras for text in extra))]


def locked() -> list[Requirement]:
    lines = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_the_lock_holds_every_dependency_in_range() -> None:
    assert len(declared()) > 15
    for wanted in declared():
        entries = [entry for entry in locked() if canonicalize_name(entry.name) == canonicalize_name(wanted.name)]
        assert entries, wanted
        for entry in entries:
            [version] = entry.specifier
            assert version.operator == "=="
            assert wanted.specifier.contains(version.version), (wanted, entry)


def test_the_lock_is_for_any_machine() -> None:
    text = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    assert len(locked()) > 60
    for word in ("--", "://", "@", "/", "nvidia", "triton", "+cpu"):
        assert word not in text, word
    assert [str(entry.specifier) for entry in locked() if entry.name == "torch"] == ["==2.13.0"]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
        names = [entry.name for entry in locked() if entry.marker is None or entry.marker.evaluate(environment)]
        assert len(names) == len(set(names)) > 60, f"Python {python}: a package twice"
