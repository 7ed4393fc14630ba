"""Scripts in launch/ and slurm/: the commands that they start, their ranks and threads, and their error messages."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import TIMEOUT
from support.tools import requires_tool

from agnews_dist.commands.arguments import load

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "slurm"
SCRIPTS = sorted([*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / ".ci" / "run", *SLURM.glob("*.*")])
SCRIPTS.remove(SLURM / "README.md")
SOURCED = {"job.sh", "network.sh", "tools.sh", "site.env.example", "site.env"}
"""Read by other scripts, which handle errors themselves."""
BOOTSTRAP = """\
# Slurm runs a copy of this file elsewhere; job.sh is in the folder of the submitted file.
# shellcheck source=slurm/job.sh
source "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/[^/]*\\.sbatch.*/job.sh/; s/^ *Command=//p' | tail -n 1)" ||
    { echo "error: no job.sh next to the submitted file. Keep NAME.sbatch in the repository's slurm/." >&2; exit 2; }
"""
"""Lines that are equal in every batch script."""
BATCH = {"train.sbatch", "debug.sbatch", "sweep.sbatch", "evaluate.sbatch", "prepare.sbatch"}
LAUNCHERS = {"local.sh": "torchrun", "deepspeed.sh": "deepspeed", "accelerate.sh": "accelerate"}
REMOVED = ("NPROC", "OMP_NUM_THREADS", "PYTHON", "INTERPRETER", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")


def run_script(script: Path, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in REMOVED}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env={**clean, **environ}, capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose interpreter only prints its arguments."""
    for folder in ("launch", "configs", ".ci"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "clone" / folder)
    for file in ("pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / file, tmp_path / "clone" / file)
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        f'"-m agnews_dist.distributed.node_resources") exec {sys.executable} "$@" ;;\n'
        '"-c import importlib"*) [ -z "$WITHOUT_DEEPSPEED" ] ;;\n'
        '"-c import base64"*) echo "world of $3" ;;\n'
        '"-c from agnews_dist.distributed.node_resources import free_port"*) echo 4321 ;;\n'
        '*) echo "threads $OMP_NUM_THREADS"; for a in "$@"; do echo "[$a]"; done ;;\n'
        "esac\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    return tmp_path / "clone"


def test_scripts_parse_and_are_strict_and_executable() -> None:
    assert set(LAUNCHERS) | SOURCED - {"site.env"} | BATCH < {script.name for script in SCRIPTS}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script
        if script.name in SOURCED:
            continue
        assert text.startswith("#!/usr/bin/env bash\n"), script
        if script.name in BATCH:
            # They continue after an error: to print it and to requeue the job.
            assert BOOTSTRAP in text, script
        else:
            assert "\nset -euo pipefail\n" in text, script
            assert os.access(script, os.X_OK), script


@requires_tool("shellcheck")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(REPOSITORY), *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout


def expected_command(clone: Path, script: str, ranks: int, devices: list[str]) -> list[str]:
    """Return the command of `script` without the user's arguments."""
    train = ["-m", "agnews_dist.train"]
    if script == "local.sh":
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--max_restarts",
            "0",
            *("--standalone", "--local_addr", "127.0.0.1"),
        ]
        return [*launcher, "--no_python", f"{clone}/launch/rank.sh", f"{clone}/.venv/bin/python", "-m", "agnews_dist", "train"]
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
def test_launcher_starts_with_ranks_threads_and_arguments(
    clone: Path, tmp_path: Path, script: str, environ: dict[str, str], ranks: int, threads: int
) -> None:
    arguments = ["--config", "my file.yaml", "--run.name", "a 'b' $c", "--run.overwrite", ""]
    done = run_script(clone / "launch" / script, *arguments, cwd=tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    first, *started = done.stdout.splitlines()
    assert first == f"threads {threads}"
    devices = [f"{name}={value}" for name, value in environ.items() if name == "CUDA_VISIBLE_DEVICES"]
    assert started == [f"[{word}]" for word in expected_command(clone, script, ranks, devices) + arguments]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_launcher_prints_its_command_in_a_dry_run(clone: Path, tmp_path: Path, script: str) -> None:
    arguments = ["--config", "my file.yaml", "--run.name", "a 'b' $c", "--run.overwrite", ""]
    done = run_script(clone / "launch" / script, *arguments, cwd=tmp_path, NPROC="2", DRY_RUN="1", LOGS=str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert shlex.split(line) == [f"{clone}/.venv/bin/python", *expected_command(clone, script, 2, []), *arguments]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("devices", ["", "6,7", "GPU-1f"])
def test_deepspeed_restores_the_visible_devices(clone: Path, tmp_path: Path, devices: str) -> None:
    done = run_script(clone / "launch" / "deepspeed.sh", cwd=tmp_path, NPROC="2", CUDA_VISIBLE_DEVICES=devices)
    command = expected_command(clone, "deepspeed.sh", 2, [f"CUDA_VISIBLE_DEVICES={devices}"])
    assert done.stdout.splitlines()[1:] == [f"[{word}]" for word in command]


def test_deepspeed_refuses_to_start_if_it_is_not_installed(clone: Path, tmp_path: Path) -> None:
    done = run_script(clone / "launch" / "deepspeed.sh", cwd=tmp_path, NPROC="2", WITHOUT_DEEPSPEED="yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"DeepSpeed is not installed in {clone}/.venv" in done.stderr
    assert 'pip install "agnews_dist[deepspeed]"' in done.stderr
    for script in ("local.sh", "accelerate.sh"):
        assert run_script(clone / "launch" / script, cwd=tmp_path, NPROC="2", WITHOUT_DEEPSPEED="yes").returncode == 0


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_launcher_refuses_a_wrong_number_of_ranks(clone: Path, tmp_path: Path, script: str, count: str) -> None:
    done = run_script(clone / "launch" / script, cwd=tmp_path, NPROC=count)
    assert done.returncode == 2
    assert f"NPROC='{count}': {LAUNCHERS[script]} needs a number of ranks" in done.stderr
    assert "Set NPROC=2, for example." in done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_launcher_without_an_environment_names_the_script_that_creates_it(clone: Path, tmp_path: Path, script: str) -> None:
    shutil.rmtree(clone / ".venv")
    done = run_script(clone / "launch" / script, cwd=tmp_path)
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
def test_deepspeed_config_yields_to_the_users_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], backend: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("optim: {epochs: 1}", encoding="utf-8")
    Path("ddp.yaml").write_text("engine: {backend: ddp}", encoding="utf-8")
    default = str(REPOSITORY / "configs" / "deepspeed.yaml")
    assert load(["--config", default, *arguments]).config.engine.backend == backend


@pytest.fixture
def old_python(tmp_path: Path) -> str:
    python = tmp_path / "python3.9"
    python.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; *) echo 3.9 ;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    return str(python)


def test_env_refuses_an_old_or_missing_python(clone: Path, tmp_path: Path, old_python: str) -> None:
    done = run_script(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON=old_python)
    assert done.returncode == 1
    assert f"{old_python} is Python 3.9: the package needs 3.10 or later." in done.stderr
    done = run_script(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON="python-of-nowhere")
    assert done.returncode == 1
    assert "python-of-nowhere not found" in done.stderr
    assert "PYTHON=python3.11" in done.stderr


def test_env_does_nothing_if_lock_and_project_are_unchanged(clone: Path, tmp_path: Path, old_python: str) -> None:
    checksums = subprocess.run(
        ["cksum", "requirements.lock", "pyproject.toml"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    (clone / ".venv" / "agnews_dist.stamp").write_text(f"{clone}\n{checksums}", encoding="utf-8")
    # This interpreter would be refused: success shows that it was not used.
    assert run_script(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON=old_python).returncode == 0
    with (clone / "requirements.lock").open("a", encoding="utf-8") as lock:
        lock.write("# changed\n")
    assert run_script(clone / "launch" / "env.sh", cwd=tmp_path, PYTHON=old_python).returncode == 1


def test_tools_lists_what_is_missing_and_how_to_install_it(tmp_path: Path) -> None:
    names = ("awk", "sort", "paste", "bash", "make", "cc", "g++", "munged", "slurmctld", "shellcheck", "ip", "openssl")
    for name in names:
        program = shutil.which(name) if name in ("awk", "sort", "paste", "bash") else "/bin/true"
        (tmp_path / name).symlink_to(program or "/bin/true")
    report = "source launch/tools.sh; PATH=$1; report_missing_tools"
    command = ["bash", "-c", report, "bash", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    assert re.findall(r"^   (\w+) +(.*)$", out, re.MULTILINE) == [
        ("faketime", "wrong clocks"),
        ("cpulimit", "ranks with too little CPU time"),
        ("zsh", "completion in zsh"),
        ("fish", "completion in fish"),
        ("chromium", "the report in a browser"),
    ]
    assert "apt-get update && apt-get install -y --no-install-recommends chromium cpulimit faketime fish zsh" in out
    for tool in ("faketime", "cpulimit", "fish", "zsh", "chromium"):
        (tmp_path / tool).symlink_to("/bin/true")
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout == ""


def test_ci_fails_without_the_shared_data(clone: Path, tmp_path: Path) -> None:
    done = run_script(clone / ".ci" / "run", cwd=tmp_path, AGNEWS_SHARED=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "no shared test data" in done.stderr
    assert "set AGNEWS_SHARED" in done.stderr


def start_rank(number: int, program: str, cwd: Path, **environ: str) -> subprocess.Popen[str]:
    """Start launch/rank.sh as torchrun does, in its own process group."""
    own = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", **environ}
    clean = {key: value for key, value in os.environ.items() if key not in REMOVED}
    return subprocess.Popen(
        [str(REPOSITORY / "launch" / "rank.sh"), sys.executable, "-c", program],
        env={**clean, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
    )


def test_rank_binds_to_its_own_cores(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    program = "import os; print(*sorted(os.sched_getaffinity(0)))"
    lists = f"{cores[0]} {cores[1]}"
    ranks = [start_rank(number, program, tmp_path, RANK_CORES=lists) for number in (0, 1)]
    assert [process.communicate(timeout=TIMEOUT)[0].strip() for process in ranks] == lists.split()
    out, _ = start_rank(1, program, tmp_path, RANK_CORES="").communicate(timeout=TIMEOUT)
    assert out.split() == list(map(str, cores))


PRINTS_AT_THE_END = """
import os, signal, sys, time

def stop(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    print("an error", file=sys.stderr, flush=True)
    sys.exit(3)

signal.signal(signal.SIGTERM, stop)
print("begins", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [0, 1])
def test_rank_logs_its_last_lines_though_the_whole_group_is_signalled(tmp_path: Path, number: int) -> None:
    logs = tmp_path / "a b" / "logs"
    process = start_rank(number, PRINTS_AT_THE_END, tmp_path, LOGS=str(logs), SLURM_RESTART_COUNT="2")
    log = logs / f"rank-{number}.log"
    end = time.monotonic() + TIMEOUT
    while not log.is_file() or "begins\n" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    # Slurm and terminals signal the whole group, and so the process that writes the log.
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 3
    header, *lines = log.read_text().splitlines()
    assert header.startswith(f"== rank {number} of 2 on ")
    assert header.endswith(", restart 2")
    assert lines == ["begins", "saved", "an error"]
    # Rank 0 is shown as well.
    assert (out.splitlines(), err) == (lines if number == 0 else [], "")
