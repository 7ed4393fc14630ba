"""launch/*.sh and slurm/*: what they start, with which ranks and threads, and what they say when they cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agnews_dist.cli import load

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "slurm"
SCRIPTS = sorted([*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / ".ci" / "run", *SLURM.glob("*.*")])
SOURCED = {"job.sh", "network.sh", "site.env.example", "site.env"}
"""Not started: they are read by others, in whose shell errors are theirs to handle."""
BATCH = {"train.sbatch", "debug.sbatch", "sweep.sbatch", "evaluate.sbatch", "prepare.sbatch"}
LAUNCHERS = {"local.sh": "torchrun", "deepspeed.sh": "deepspeed", "accelerate.sh": "accelerate"}
FOREIGN = ("NPROC", "OMP_NUM_THREADS", "PYTHON", "INTERPRETER", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")


def start(script: Path, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in FOREIGN}
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
        f'"-m agnews_dist.node") exec {sys.executable} "$@" ;;\n'
        '"-c import importlib"*) [ -z "$WITHOUT_DEEPSPEED" ] ;;\n'
        '"-c import base64"*) echo "world of $3" ;;\n'
        '"-c import socket"*) echo 4321 ;;\n'
        '*) echo "threads $OMP_NUM_THREADS"; for a in "$@"; do echo "[$a]"; done ;;\n'
        "esac\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    return tmp_path / "clone"


def test_every_script_is_strict_executable_and_parses() -> None:
    assert set(LAUNCHERS) | SOURCED - {"site.env"} | BATCH < {script.name for script in SCRIPTS}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script
        if script.name in SOURCED:
            continue
        assert text.startswith("#!/usr/bin/env bash\n"), script
        if script.name in BATCH:
            # They have to go on after an error: to say what it was, and to go back into the queue.
            assert '\nsource "$root/slurm/job.sh"\n' in text, script
        else:
            assert "\nset -euo pipefail\n" in text, script
            assert os.access(script, os.X_OK), script


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(REPOSITORY), *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout


def expected_command(clone: Path, script: str, ranks: int, devices: list[str]) -> list[str]:
    """What `script` runs before the user's arguments."""
    train = ["-m", "agnews_dist.train"]
    if script == "local.sh":
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--max_restarts",
            "0",
            "--standalone",
        ]
        return [*launcher, "--no_python", f"{clone}/launch/rank.sh", f"{clone}/.venv/bin/python", *train]
    if script == "accelerate.sh":
        config = ["--config_file", str(clone / "configs" / "accelerate" / "default.yaml")]
        return ["-m", "accelerate.commands.launch", *config, "--num_processes", str(ranks), *train]
    launcher = ["-m", "deepspeed.launcher.launch", "--quiet", f"--world_info=world of {ranks}", "--master_port=4321"]
    program = ["--no_python", "--no_local_rank", "env", *devices, str(clone / ".venv" / "bin" / "python"), *train]
    return [*launcher, *program, "--config", str(clone / "configs" / "deepspeed.yaml")]


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("environ", "ranks", "threads"),
    [
        ({"NPROC": "1"}, 1, len(os.sched_getaffinity(0))),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "OMP_NUM_THREADS": "5"}, 3, 5),
        ({"NPROC": "4096"}, 4096, 1),
        ({"NPROC": "2", "OMP_NUM_THREADS": "7"}, 2, 7),
    ],
)
def test_a_launcher_is_started(
    clone: Path, tmp_path: Path, script: str, environ: dict[str, str], ranks: int, threads: int
) -> None:
    arguments = ["--config", "my file.yaml", "--run.name", "a 'b' $c", "--run.overwrite", ""]
    done = start(clone / "launch" / script, *arguments, cwd=tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    first, *started = done.stdout.splitlines()
    assert first == f"threads {threads}"
    devices = [f"{name}={value}" for name, value in environ.items() if name == "CUDA_VISIBLE_DEVICES"]
    assert started == [f"[{word}]" for word in expected_command(clone, script, ranks, devices) + arguments]


@pytest.mark.parametrize("devices", ["", "6,7", "GPU-1f"])
def test_deepspeed_gives_back_the_devices_that_were_chosen(clone: Path, tmp_path: Path, devices: str) -> None:
    done = start(clone / "launch" / "deepspeed.sh", cwd=tmp_path, NPROC="2", CUDA_VISIBLE_DEVICES=devices)
    command = expected_command(clone, "deepspeed.sh", 2, [f"CUDA_VISIBLE_DEVICES={devices}"])
    assert done.stdout.splitlines()[1:] == [f"[{word}]" for word in command]


def test_deepspeed_missing_says_how_to_install_it(clone: Path, tmp_path: Path) -> None:
    done = start(clone / "launch" / "deepspeed.sh", cwd=tmp_path, NPROC="2", WITHOUT_DEEPSPEED="yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"DeepSpeed is not in {clone}/.venv" in done.stderr
    assert 'pip install "agnews_dist[deepspeed]"' in done.stderr
    for script in ("local.sh", "accelerate.sh"):
        assert start(clone / "launch" / script, cwd=tmp_path, NPROC="2", WITHOUT_DEEPSPEED="yes").returncode == 0


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_a_bad_count_is_refused(clone: Path, tmp_path: Path, script: str, count: str) -> None:
    done = start(clone / "launch" / script, cwd=tmp_path, NPROC=count)
    assert done.returncode == 2
    assert f"NPROC='{count}' is no count: {LAUNCHERS[script]} would not know" in done.stderr
    assert "Give a number such as NPROC=2." in done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_without_an_environment_it_says_how_to_make_one(clone: Path, tmp_path: Path, script: str) -> None:
    shutil.rmtree(clone / ".venv")
    done = start(clone / "launch" / script, cwd=tmp_path)
    assert done.returncode == 1
    assert "Run bash launch/env.sh first." in done.stderr


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ([], "deepspeed"),
        (["--config", "mine.yaml"], "deepspeed"),
        (["--config", "ddp.yaml"], "ddp"),
        (["--engine.backend", "ddp"], "ddp"),
    ],
)
def test_deepspeeds_default_gives_way_to_the_users_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], backend: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("optim: {epochs: 1}", encoding="utf-8")
    Path("ddp.yaml").write_text("engine: {backend: ddp}", encoding="utf-8")
    default = str(REPOSITORY / "configs" / "deepspeed.yaml")
    assert load("train", ["--config", default, *arguments]).config.engine.backend == backend


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
