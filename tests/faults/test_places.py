"""Directories, files and displays that change or hang while a run uses them; starts in unusual surroundings."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import yaml
from support import fork_server
from support.jobs import TRAIN
from support.processes import TIMEOUT, environment
from support.small_run import (
    NUM_STEPS,
    arguments,
    differences,
    finish,
    read_results,
    run_directory,
    start,
    wait_for,
    write_inputs,
)
from support.tools import requires_tool


def test_run_follows_its_directory_that_is_moved(whole, tmp_path):
    runs = tmp_path / "runs"
    fault = {"AT_STEP": "20", "FAULT": "move", "FROM": str(runs), "TO": str(tmp_path / "old")}
    output = wait_for(start(tmp_path, fault="support.faults:inject", **fault), tmp_path)
    moved = tmp_path / "old" / "small"
    assert output.count(f"warning: run {runs}/small: its directory was moved to {moved}, and the run continues there.") == 1
    assert not runs.exists()
    assert differences(moved, run_directory(whole)) == []
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["small"], "its lock file was removed there"


def test_run_ends_with_one_error_when_its_directory_is_removed(tmp_path):
    fault = {"AT_STEP": "20", "FAULT": "move", "FROM": str(tmp_path / "runs")}
    output = wait_for(start(tmp_path, fault="support.faults:inject", **fault), tmp_path, 1)
    assert output.count("error: ") == 1
    assert (
        "small: its directory was removed while the run writes there, so its results would be lost. Start it again." in output
    )
    assert not (tmp_path / "runs").exists(), "no half of the results anywhere"


def test_run_survives_a_model_file_that_is_cut_off(whole, tmp_path):
    shutil.copytree(write_inputs() / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    fault = {"AT_STEP": "20", "FAULT": "cut", "CUT": str(weights), "ON_RANK": "all"}
    job = start(tmp_path, "--model.name", str(tmp_path / "model"), fault="support.faults:inject", **fault)
    output = wait_for(job, tmp_path)
    assert output.count(f"warning: model file {weights} has changed since it was read: ") == 1
    assert differences(run_directory(tmp_path), run_directory(whole)) == []


def test_display_that_is_not_read_delays_no_step(tmp_path):
    # Its pipe holds less than the lines of the run. It is read after the results are there.
    display = tmp_path / "display"
    os.mkfifo(display)
    end = os.open(display, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
    variables = fork_server.rank_variables(2)
    # Rank 1 has a log of its own: a waiting writer of the same pipe would hide which rank waits.
    streams = [fork_server.Streams(out, out) for out in (display, tmp_path / "log")]
    command = ["-c", TRAIN, "", *arguments(tmp_path, "--run.debug", "true")]
    ranks = [
        fork_server.start(command, {**environment(), **own}, stream) for own, stream in zip(variables, streams, strict=True)
    ]
    result = run_directory(tmp_path) / "result.json"
    deadline = threading.Event()
    while not result.exists() and not deadline.wait(0.05) and all(rank.is_alive() for rank in ranks):
        pass
    assert result.exists(), "the training has not waited"
    os.set_blocking(end, True)
    content = b""
    while chunk := os.read(end, 4096):
        content += chunk
    os.close(end)
    for rank in ranks:
        rank.join(TIMEOUT)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    lines = content.decode().splitlines()
    # So few lines are kept until they are read.
    steps = [int(found[1]) for line in lines if (found := re.match(rf"\S+ step +(\d+)/{NUM_STEPS} ", line))]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert any(line.endswith("done") for line in lines)


TWO_STARTS = """
import datetime, sys
from agnews_dist.__main__ import main
from agnews_dist.run import attempt

class StandingClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 29, tzinfo=tz)

attempt.datetime = StandingClock
sys.exit(main(["train", *sys.argv[1:], "--report.write", "false"]))
"""


def test_two_starts_in_one_second_have_names_of_their_own(tmp_path):
    words = arguments(tmp_path, "--optim.epochs", "1")
    del words[words.index("--run.name") : words.index("--run.name") + 2]
    started = [
        fork_server.start(
            ["-c", TWO_STARTS, *words, "--run.seed", seed], environment(), fork_server.Streams(tmp_path / seed, tmp_path / seed)
        )
        for seed in "12"
    ]
    for process in started:
        process.join(TIMEOUT)
    assert [process.exitcode for process in started] == [0, 0], [(tmp_path / seed).read_text()[-2000:] for seed in "12"]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in runs] == ["model-20261129-000000", "model-20261129-000000-2"]
    assert {read_results(run)["status"] for run in runs} == {"finished"}
    assert sorted(yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] for run in runs) == [1, 2]


@requires_tool("unshare")
def test_start_without_streams_home_and_name_of_the_user(tmp_path):
    # As a container with a random user id starts it, with all streams closed and every message of torch asked for.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "agnews_dist.train"]
    words = [*arguments(tmp_path, "--optim.epochs", "1"), "--data.cache_dir", "null"]
    user = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    names = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME")
    environ = {name: value for name, value in environment().items() if name not in names}
    environ |= {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [*user, "bash", "-c", 'exec "$@" <&- >&- 2>&-', "-", *launcher, *words],
        env=environ,
        cwd=tmp_path / "work",
        timeout=TIMEOUT,
        check=False,
    )
    status = json.loads((run_directory(tmp_path) / "status.json").read_text())
    assert (done.returncode, status["state"]) == (0, "finished"), status
    assert list((tmp_path / "work").iterdir()) == [], "nothing called ~"
    assert [path.name for path in (tmp_path / "tmp").iterdir() if "home" in path.name] == ["agnews_dist-home-12345"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root")
def test_compiling_on_a_disk_without_programs_is_refused(tmp_path):
    # TorchInductor itself would fail only after a minute of work.
    code = (
        "from agnews_dist.engine.device import find_compiler_fault; print(find_compiler_fault());"
        "from agnews_dist.engine.device import check_compiler; check_compiler('always')"
    )
    mount = 'mount -t tmpfs -o noexec tmpfs "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", mount, "-", tmp_path, sys.executable, "-c", code],
        env=environment(TORCHINDUCTOR_CACHE_DIR=f"{tmp_path}/new", CXX="/bin/true"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    reason = f"torch.compile loads the libraries that it makes in {tmp_path}/new, which is noexec or read-only"
    assert done.returncode == 1
    assert f"UserError: engine.compile always: {reason}. Set TORCHINDUCTOR_CACHE_DIR to another" in done.stderr


def test_run_that_the_disk_cannot_hold_is_refused_before_it_begins(tmp_path):
    # Not only the model counts: also the checkpoints, of which one more than checkpoint.keep exists for a while.
    words = ("--checkpoint.keep", "1000000000")
    output = wait_for(start(tmp_path, *words), tmp_path, 1)
    assert "free, the model and the checkpoints take " in output
    assert "lower --checkpoint.keep" in output
    assert "run started" not in output
    assert not run_directory(tmp_path).exists()
    assert finish(tmp_path, "--optim.epochs", "1").exists()
