"""launch/*.sh: what they start, with which ranks and threads, and what they say when they cannot."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / ".ci" / "run"])


def start(script: Path, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("NPROC", "OMP_NUM_THREADS", "PYTHON")}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env={**clean, **environ}, capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose interpreter only prints what it was started with."""
    for folder in ("launch", "configs", ".ci"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "clone" / folder)
    for file in ("pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / file, tmp_path / "clone" / file)
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        '"-c import torch"*) echo 3 ;;\n'
        '"-c import os"*) echo 8 ;;\n'
        '*) echo "threads $OMP_NUM_THREADS"; for a in "$@"; do echo "[$a]"; done ;;\n'
        "esac\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    return tmp_path / "clone"


def test_every_script_is_strict_executable_and_parses() -> None:
    assert len(SCRIPTS) >= 5
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n"), script
        assert "\nset -euo pipefail\n" in text, script
        assert os.access(script, os.X_OK), script
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script


@pytest.mark.parametrize(
    ("environ", "ranks", "threads"),
    [({"NPROC": "4"}, 4, 2), ({}, 3, 2), ({"NPROC": "16"}, 16, 1), ({"NPROC": "2", "OMP_NUM_THREADS": "7"}, 2, 7)],
)
def test_local_starts_torchrun(clone: Path, tmp_path: Path, environ: dict[str, str], ranks: int, threads: int) -> None:
    arguments = ["--config", "my file.yaml", "--run.name", "a 'b' $c", "--run.overwrite"]
    done = start(clone / "launch" / "local.sh", *arguments, cwd=tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    first, *started = done.stdout.splitlines()
    assert first == f"threads {threads}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "agnews_dist.train"]
    assert started == [f"[{word}]" for word in torchrun + arguments]


@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_local_refuses_a_bad_count(clone: Path, tmp_path: Path, count: str) -> None:
    done = start(clone / "launch" / "local.sh", cwd=tmp_path, NPROC=count)
    assert done.returncode == 2
    assert f"NPROC='{count}' is no count" in done.stderr
    assert "Give a number such as NPROC=2." in done.stderr


def test_local_without_an_environment_says_how_to_make_one(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / ".venv")
    done = start(clone / "launch" / "local.sh", cwd=tmp_path)
    assert done.returncode == 1
    assert "Run bash launch/env.sh first." in done.stderr


@pytest.fixture
def old_python(tmp_path: Path) -> str:
    python = tmp_path / "python3.9"
    python.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; *) echo 3.9 ;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    return str(python)


def test_env_refuses_an_old_or_missing_python(clone: Path, tmp_path: Path, old_python: str) -> None:
    done = start(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON=old_python)
    assert done.returncode == 1
    assert f"{old_python} is Python 3.9: the package needs 3.10 or later." in done.stderr
    done = start(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON="python-of-nowhere")
    assert done.returncode == 1
    assert "python-of-nowhere not found" in done.stderr
    assert "PYTHON=python3.11" in done.stderr


def test_env_does_nothing_while_lock_and_project_are_unchanged(clone: Path, tmp_path: Path, old_python: str) -> None:
    checksums = subprocess.run(
        ["cksum", "requirements.lock", "pyproject.toml"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    (clone / ".venv" / "agnews_dist.stamp").write_text(f"{clone}\n{checksums}", encoding="utf-8")
    # An interpreter that would be refused shows that none is asked.
    assert start(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON=old_python).returncode == 0
    with (clone / "requirements.lock").open("a", encoding="utf-8") as lock:
        lock.write("# changed\n")
    assert start(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON=old_python).returncode == 1


def test_ci_fails_without_the_shared_data(clone: Path, tmp_path: Path) -> None:
    done = start(clone / ".ci" / "run", cwd=tmp_path, AGNEWS_SHARED=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "no shared test data" in done.stderr
    assert "set AGNEWS_SHARED" in done.stderr
