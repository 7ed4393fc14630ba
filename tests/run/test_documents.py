"""README, CONTRIBUTING and docs: every command and Python snippet runs, links and paths exist, sizes and words hold.

The commands of a page run in their order, in a folder like a clone with some data and one finished run. Trainings are cheap: a
small model, few rows, two ranks. Launch and batch scripts print their command (`DRY_RUN=1`). That command is
run, or its settings are checked. A command that no rule covers fails.
`tests/slurm/test_documented_commands.py` runs the Slurm section of docs/clusters.md on a real Slurm.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from support import fork_server, house
from support.processes import REPOSITORY, environment
from support.settings import group_by_section
from support.tools import skip_without
from torch.distributed.run import get_args_parser

from agnews_dist.__main__ import COMMANDS
from agnews_dist.commands.arguments import load
from agnews_dist.commands.command import TRAINING_OPTIONS

READMES = [REPOSITORY / folder / "README.md" for folder in ("", "tests", "slurm")]
PAGES = [*READMES, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NUM_COMMANDS = {
    "README.md": 11,
    "tests/README.md": 4,
    "slurm/README.md": 0,
    "CONTRIBUTING.md": 8,
    "docs/batches.md": 2,
    "docs/clusters.md": 22,
    "docs/commands.md": 23,
    "docs/data.md": 4,
    "docs/engines.md": 5,
    "docs/faults.md": 5,
    "docs/features.md": 2,
    "docs/method.md": 0,
    "docs/python.md": 0,
    "docs/reading.md": 0,
    "docs/report.md": 8,
    "docs/settings.md": 0,
    "docs/sweeps.md": 2,
    "docs/trackers.md": 2,
}
LIMITS = {"data.limit_train": 48, "data.limit_validation": 16, "data.limit_test": 16, "batch.global_batch_size": 16}
CHEAP = {"model.name": "models/gpt2", "data.source": "data/news", "optim.epochs": 1, "data.cache_dir": "cache"} | LIMITS
"""Settings added to a command that does not set them itself."""
PYTHON = shlex.quote(str(REPOSITORY / ".venv/bin/python"))
STUBS = {
    # Slurm: the batch script runs here, and its step prints what it would start.
    "sbatch": "export SLURM_NNODES=1\n"
    "while [[ $1 == -* ]]; do [[ $1 != --nodes=* ]] || SLURM_NNODES=${1#*=}; shift; done\n"
    "export SCRIPT=$PWD/$1 SLURM_JOB_ID=7 SLURM_JOB_NAME=job SLURM_JOB_NUM_NODES=$SLURM_NNODES SLURM_ARRAY_TASK_ID=0\n"
    'export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_END_TIME=9999999999; exec bash "$@"',
    "srun": "while [[ $1 == -* ]]; do shift; done\n"
    "export SLURM_STEP_NUM_NODES=$SLURM_NNODES SLURM_STEP_NUM_TASKS=$SLURM_NNODES SLURM_NODEID=0 SLURM_STEP_NODELIST=a\n"
    'exec "$@"',
    "scontrol": 'case $2 in hostnames) echo a ;; *) echo "   Command=$SCRIPT" ;; esac',
    "squeue": "echo RUNNING",
    "kubectl": f"[[ $1 == get && $3 == $(cat name) ]] || exec {PYTHON} -c "
    "\"import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))['metadata']['name'])\" \"$3\" >name",
    "sky": f'[[ "$1 $2" == "jobs launch" ]] && exec {PYTHON} -c '
    '"import sys, yaml; yaml.safe_load(open(sys.argv[1]))[\'run\']" "$3"',
    # The last argument of a build is the folder of the Dockerfile; the last of a run are the training's.
    "docker": '[[ $1 == run ]] && exec env NODES=1 DRY_RUN=1 launch/node.sh "${@: -2}"\n'
    'grep -q "^ARG TORCH=" "${@: -1}/Dockerfile"',
}
RUN_MODULE = """
import os, runpy, sys
os.chdir(sys.argv[1])
sys.argv[:] = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
FRAME = """
import pandas as pd
df = pd.read_json("data/news/train.jsonl", lines=True)
if not os.path.exists("gpt2"):
    os.symlink("models/gpt2", "gpt2")
"""
SNIPPETS = {
    # Names that a snippet takes from the reader's own program, and what holds afterwards.
    "docs/batches.md": (
        "lengths, rank, collate = [3, 1, 2, 9] * 200, 0, list\ndataset = lengths",
        "assert sum(map(len, sampler)) <= len(lengths) and len(loader) == len(sampler) > 0",
    ),
    "docs/python.md": (FRAME, ""),
    "README.md": (FRAME, ""),
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    """Number of its first line."""
    language: str
    text: str

    @property
    def commands(self) -> Iterator[tuple[str, str]]:
        """(place, command) of every line, without the comment after it."""
        for number, line in enumerate(self.text.splitlines(), self.line):
            yield f"{name_of(self.page)}:{number}", re.split(r"\s+#\s", line)[0]


def name_of(page: Path) -> str:
    """Return the page's path in the repository."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Find the fenced blocks of a page, also those inside of lists."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, each.start()) + 2, each[2], each[3]) for each in found]


def prose_of(page: Path) -> str:
    """Return the text of a page without blocks and tables."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def environment_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split a line into the variables set before a command, and the command."""
    names = [word for word in words if re.match(r"[A-Z_]+=", word)]
    first = next((i for i, word in enumerate(words) if word not in names), len(words))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


class Folder:
    """A clone with data and a finished run, in which the commands of the pages run."""

    def __init__(self, path: Path) -> None:
        """`path`: empty; gets the clone, and `runs/NAME`, trained for real."""
        self.path = path
        self._done: dict[tuple[str, ...], str] = {}
        for name in ("launch", "slurm", "configs"):
            shutil.copytree(REPOSITORY / name, path / name, ignore=shutil.ignore_patterns("site.env"))
        for name in ("tests", "agnews_dist"):
            (path / name).symlink_to(REPOSITORY / name, target_is_directory=True)
        for name in ("requirements.lock", "pyproject.toml", "Makefile", "Dockerfile"):
            shutil.copy(REPOSITORY / name, path / name)
        self._write_environment()
        (path / "my.yaml").write_text(yaml.safe_dump(group_by_section(CHEAP)))
        (path / "texts.txt").write_text("Shares fell.\nThe striker scored twice.\n")
        (path / "data" / "news").mkdir(parents=True)
        for split, num_rows in (("train", 48), ("test", 12)):
            rows = [f'{{"text": "{split} text number {i}", "label": {i % 4}}}\n' for i in range(num_rows)]
            (path / "data" / "news" / f"{split}.jsonl").write_text("".join(rows))
        # Files take a third of the time of a model and text made on the spot.
        first = ["train", "--config", "my.yaml", "--model.name", "embedded", "--run.name", "NAME"]
        self.run_module("agnews_dist", first)
        shutil.copytree(path / "runs" / "NAME", path / "runs" / "OTHER")
        (path / "models").mkdir()
        (path / "models" / "gpt2").symlink_to(path / "runs" / "NAME" / "model", target_is_directory=True)

    def _write_environment(self) -> None:
        """Write a .venv that launch/env.sh takes as up to date; pytest and the linters only print their arguments."""
        programs = self.path / ".venv" / "bin"
        programs.mkdir(parents=True)
        (self.path / "bin").mkdir()
        real = shlex.quote(str(REPOSITORY / ".venv" / "bin" / "python"))
        scripts = {programs / name: f'echo {name} "$@"' for name in ("ruff", "basedpyright", "lint-imports")}
        scripts[programs / "python"] = f'[[ "$1 $2" != "-m pytest" ]] || exec echo "$@"\nexec {real} "$@"'
        scripts |= {self.path / "bin" / name: text for name, text in STUBS.items()}
        for file, text in scripts.items():
            file.write_text(f"#!/usr/bin/env bash\n{text}\n")
            file.chmod(0o755)
        stamp = "pwd; cksum requirements.lock pyproject.toml"
        wanted = subprocess.run(["bash", "-c", stamp], cwd=self.path, capture_output=True, text=True, check=True).stdout
        (self.path / ".venv" / "agnews_dist.stamp").write_text(wanted)

    def run(self, command: str) -> str:
        """Run one command by the rule that covers it; return what it printed.

        Raises:
            AssertionError: no rule covers it, or it failed.
        """
        for pattern, rule in RULES:
            if re.search(pattern, command):
                return rule(self, command)
        raise AssertionError("no rule of tests/run/test_documents.py covers this command")

    def run_module(self, module: str, words: list[str], num_ranks: int = 1, **environ: str) -> str:
        """Run a module in forked processes, once per set of arguments."""
        done = (module, *words, str(num_ranks), *environ.values())
        if done not in self._done:
            code = ["-c", RUN_MODULE, str(self.path), module, *words]
            if num_ranks == 1:
                self._done[done] = fork_server.run_python(*code, **environ).stdout
            else:
                self._done[done] = fork_server.run_ranks(num_ranks, *code, **environ).stdout
        return self._done[done]

    def run_bash(self, command: str, **environ: str) -> str:
        """Run a line in bash, with the stand-ins of `STUBS` first in PATH; what it wrote to both streams."""
        path = f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        keep = {name: value for name, value in environment(**environ).items() if not name.startswith(("SLURM_", "SBATCH_"))}
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.path,
            env={**keep, "PATH": path, "NPROC": "2", "OMP_NUM_THREADS": "1"} | environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def cheapened(words: list[str]) -> list[str]:
    """Add the settings of `CHEAP` that a command does not set itself."""
    command = words[0]
    without = {key: list[str]() for key in ("predict", "restarts", "schema", "report", "runs")}
    keys = {"cache": ["data.cache_dir"], **without}.get(command, list(CHEAP))
    if command == "evaluate":
        keys = ["data.cache_dir"]
    if command.startswith("-") or "--help" in words:
        keys = []
    return [*words, *(word for key in keys if f"--{key}" not in words for word in (f"--{key}", str(CHEAP[key])))]


def split_module(words: list[str]) -> tuple[str, list[str]]:
    """Return (module, cheap arguments) of the last `-m agnews_dist...`."""
    place = max(i for i, word in enumerate(words) if word == "-m" and words[i + 1].startswith("agnews_dist"))
    module, *arguments = words[place + 1 :]
    assert module in ("agnews_dist", "agnews_dist.train"), module
    return module, cheapened(arguments) if module == "agnews_dist" else cheapened(["train", *arguments])[1:]


def run_python(folder: Folder, command: str) -> str:
    """Run `python -m agnews_dist...`, `agnews-dist ...` or `torchrun ... -m agnews_dist...`."""
    environ, (program, *words) = environment_of(shlex.split(command))
    num_ranks, output = 1, None
    if ">" in words:
        *words, _, output = words
    if "--install_completion" in words:
        environ["HOME"] = str(folder.path)
    if program == "agnews-dist":
        assert shutil.which("agnews-dist", path=str(REPOSITORY / ".venv" / "bin"))
        words = ["-m", "agnews_dist", *words]
    elif program == "torchrun":
        options = get_args_parser().parse_args(words)
        assert options.module
        assert int(options.nproc_per_node) > 1
        num_ranks, words = 2, ["-m", options.training_script, *options.training_script_args]
    printed = folder.run_module(*split_module(words), num_ranks, **environ)
    if output is not None:
        (folder.path / output).write_text(printed)
    return printed


def run_tests_program(_: Folder, command: str) -> str:
    """Start a program of tests/; it reads its options, and `--help` ends it."""
    _, words = environment_of(shlex.split(command))
    return fork_server.run_python(*words[1:], "--help").stdout


def run_launcher(folder: Folder, command: str) -> str:
    """Let a script of launch/ print its command, and run that on one rank."""
    printed = folder.run_bash(command, DRY_RUN="1").splitlines()[-1]
    words = shlex.split(printed)
    assert "torch.distributed.run" in words or "launch" in printed
    if "DRY_RUN=1" in command:
        return printed
    return folder.run_module(*split_module(words))


def check_printed(folder: Folder, command: str) -> str:
    """Let a script for several machines print its commands, and check their settings and options of torchrun."""
    output = folder.run_bash(command, DRY_RUN="1")
    starts = [shlex.split(line) for line in output.splitlines() if "torch.distributed.run" in line]
    submits = [line for line in output.splitlines() if line.startswith("sbatch ")]
    assert starts or submits, output
    for words in starts:
        get_args_parser().parse_args(words[words.index("torch.distributed.run") + 1 :])
        _, (name, *arguments) = split_module(words)
        files = [word for word in arguments if word.endswith(".yaml") and not word.startswith("runs/")]
        assert all((folder.path / file).is_file() for file in files)
        if name == "train":
            load([str(folder.path / word) if word in files else word for word in arguments], TRAINING_OPTIONS)
        assert name in COMMANDS
    for line in submits:
        assert any((folder.path / word).is_file() for word in shlex.split(line) if word.endswith(".sbatch")), line
    return output


def run_bash(folder: Folder, command: str) -> str:
    """Run a line as it is."""
    return folder.run_bash(command)


def run_make(folder: Folder, command: str) -> str:
    """Check that the Makefile has a target."""
    skip_without("make")
    return folder.run_bash(f"{command} --dry-run")


def run_pytest(_: Folder, command: str) -> str:
    """Check that a selection of tests selects some; they run in their own right."""
    # pytest cannot rewrite the asserts of plugins that the fork server has loaded, and warns of it.
    quiet = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    options = ("--collect-only", "-q", "-p", "no:cacheprovider", "-W", quiet)
    return fork_server.run_python(*shlex.split(command)[1:], *options).stdout


RULES: list[tuple[str, Callable[[Folder, str], str]]] = [
    (r"^([A-Z_]+=\S+ )*(python|agnews-dist|torchrun) .*-m agnews_dist|^agnews-dist ", run_python),
    (r"^PYTHONPATH=tests python tests/", run_tests_program),
    (r"^PYTHONPATH=tests \.venv/bin/python -m support\.house ", run_bash),
    (r"^([A-Z_]+=\S+ )*(bash )?launch/(local|deepspeed|accelerate|quickstart)\.sh\b", run_launcher),
    (r"^([A-Z_]+=\S+ )*(launch/node\.sh|sbatch .*slurm/\w+\.sbatch|slurm/submit\.sh)\b", check_printed),
    (r"^bash launch/(test|env)\.sh", run_bash),
    (r"^cp slurm/site\.env\.example slurm/site\.env$|^source slurm/site\.env$", run_bash),
    (r"^kubectl (apply -f|get trainjob) |^sky jobs launch |^docker (build|run) ", run_bash),
    (
        r"^\.venv/bin/python -m pip install \"agnews_dist\[\w+\]\"$",
        lambda folder, command: folder.run_bash(f"{command} --no-index"),
    ),
    (r"^\.venv/bin/python -m pytest ", run_pytest),
    (r"^make \w+", run_make),
]
"""(pattern, how such a command is run), the first that matches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("clone"))


def test_pages_hold_as_many_commands_as_expected() -> None:
    found = {
        name_of(page): sum(len(list(block.commands)) for block in blocks_of(page) if block.language == "bash") for page in PAGES
    }
    assert found == NUM_COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_run(page: Path, folder: Folder) -> None:
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= {"bash", "python", "text"}
    for block in blocks:
        if block.language != "bash":
            continue
        for place, command in block.commands:
            try:
                folder.run(command)
            except AssertionError as error:
                raise AssertionError(f"{place}: {command}\n{error}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_of_a_page_run(page: Path, folder: Folder) -> None:
    for block in blocks_of(page):
        if block.language == "python":
            before, after = SNIPPETS.get(name_of(page), ("", ""))
            code = f"import os\nos.chdir({str(folder.path)!r})\n{before}\n{block.text}\n{after}"
            fork_server.run_python("-c", code)


def test_a_command_without_a_rule_is_refused(folder: Folder) -> None:
    for command in ("agnews_dist train", "python -m agnews_dist.predict x", "launch/nowhere.sh", "make -j"):
        with pytest.raises((AssertionError, ValueError)):
            folder.run(command)


def test_links_and_paths_exist() -> None:
    num_links = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{name_of(page)}: {link}"
            num_links += 1
        for path in re.findall(r"`((?:agnews_dist|tests|launch|slurm|configs|docs|\.ci)/[\w./-]*)`", text):
            assert "NAME" in path or (REPOSITORY / path).exists(), f"{name_of(page)}: {path}"
    assert num_links > 20


def test_readme_is_short_and_its_map_is_the_tree() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 160
    (block,) = [block for block in blocks_of(REPOSITORY / "README.md") if "agnews_dist/\n" in block.text]
    shown, parents = {}, ["", "agnews_dist/"]
    for line in block.text.splitlines()[1:]:
        name, words = re.fullmatch(r" *([\w/]+)/ +(.+)", line).groups()
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[: depth + 1], f"{parents[depth]}{name}/"]
        shown[parents[depth] + name] = len(words.split())
    assert set(shown.values()) == {5}
    folders = {name_of(path.parent) for path in (REPOSITORY / "agnews_dist").rglob("__init__.py")} - {"agnews_dist"}
    assert folders == {name for name in shown if name.startswith("agnews_dist/")}
    assert all((REPOSITORY / name).is_dir() for name in shown)


def test_reading_list_is_eight_short_files() -> None:
    text = (REPOSITORY / "docs" / "reading.md").read_text(encoding="utf-8")
    files = re.findall(r"^\d\. `([^`]+)`", text, re.MULTILINE)
    assert len(set(files)) == 8
    assert sum((REPOSITORY / file).read_text(encoding="utf-8").count("\n") for file in files) <= 1450


def test_commands_page_lists_every_command() -> None:
    text = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_words_are_plain_and_sentences_short(page: Path) -> None:
    prose = prose_of(page)
    assert house.BANNED.findall(prose) == []
    long = [text for text in house.sentences(prose) if len(text.split()) > house.MAX_SENTENCE]
    assert long == []
