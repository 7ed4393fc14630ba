"""The rules that keep the package small and one-way, held by tests: budgets, doors, import cost, form of messages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from agnews_dist.config.fields import all_sections, all_settings
from agnews_dist.distributed.world import LAUNCHER_VARIABLES

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "agnews_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "numpy", "pyarrow", "rich", "tokenizers")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


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
    return any(name == module or name.startswith(f"{module}.") for name in references(tree_of(path)))


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_says_its_job(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 310, "split it: one module, one job"
    if text.strip():
        assert ast.get_docstring(tree_of(path)), "the first docstring line states the module's job"
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")


@pytest.mark.parametrize(
    ("module", "doors"),
    [
        ("torch.distributed", "distributed/collectives.py distributed/rendezvous.py engine/fsdp.py"),
        ("accelerate", "engine/engine.py"),
        ("deepspeed", "engine/deepspeed.py"),
    ],
)
def test_one_door(module: str, doors: str) -> None:
    """torch.distributed has three: how ranks find each other, its collectives, and FSDP2, which is an engine."""
    assert len(MODULES) > 10
    assert sorted(name_of(path) for path in MODULES if reaches(path, module)) == doors.split()


def test_the_door_test_sees_every_way_in(tmp_path: Path) -> None:
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
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and node.value in LAUNCHER_VARIABLES
    ]
    assert len(readers) >= len(LAUNCHER_VARIABLES)
    assert set(readers) == {"distributed/world.py"}


def test_field_budget_and_texts() -> None:
    assert 30 < len(all_settings()) <= 50
    assert [key for key, setting in all_settings().items() if not setting.text.endswith(".")] == []
    assert [name for name, (_, text) in all_sections().items() if not text] == []


def test_light_imports() -> None:
    code = (
        "import sys, agnews_dist, agnews_dist.__main__, agnews_dist.config.command_line, agnews_dist.config, agnews_dist.errors, "
        "agnews_dist.distributed.world, agnews_dist.events\n"
        "agnews_dist.config.command_line.load('train', ['--optim.lr', '1e-4'])\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def user_errors() -> set[str]:
    """UserError and all classes of the package below it, by name."""
    bases = {
        node.name: {dotted(base).rsplit(".", 1)[-1] for base in node.bases}
        for path in MODULES
        for node in ast.walk(tree_of(path))
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
    trees = {path: tree_of(path) for path in MODULES}
    nodes = [(name_of(path), node) for path, tree in trees.items() for node in ast.walk(tree)]
    defined = [(module, node) for module, node in nodes if isinstance(node, ast.ClassDef) and node.name in classes]
    own = {
        node.name: (f"{module}:{node.lineno}", text) for module, node in defined if (text := own_text(node)) is not None
    }
    raised = [
        (f"{module}:{call.lineno}", call.args[0])
        for module, node in nodes
        if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call) and call.args
        if (name := dotted(call.func).rsplit(".", 1)[-1]) in classes and name not in own
    ]
    return raised + list(own.values())


def test_user_errors_say_what_why_and_what_to_do() -> None:
    classes = user_errors()
    assert {"UserError", "ConfigError", "DataError", "ModelError"} <= classes
    texts = [(place, text) for place, message in messages(classes) if (text := text_of(message)) not in (None, "x")]
    assert len(texts) >= 4
    wrong = [f"{place}: {text}" for place, text in texts if not has_the_form(str(text))]
    assert wrong == []


def test_the_form() -> None:
    assert has_the_form("lr -1: the update would point uphill. Set it to at least 0.")
    for bad in ("lr is wrong", "lr -1: bad.", "lr -1 is bad. Set another.", "lr: bad. Fix it"):
        assert not has_the_form(bad), bad


def test_import_layers() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(lint_imports)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


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
