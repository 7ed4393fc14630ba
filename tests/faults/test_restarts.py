"""torchrun restarts a failed job: it resumes from the last checkpoint, also with fewer nodes."""

import re
import subprocess
import sys
from pathlib import Path

import psutil
from support.processes import REPOSITORY, TIMEOUT, environment, wait_until
from support.small_run import arguments, differences, read_status, run_directory
from support.timeline import Timeline

from agnews_dist.distributed.node_resources import free_port

FAULTY_RANK = str(REPOSITORY / "tests" / "ranks" / "faulty_rank.py")


def agent(log: Path, *options: str, script: tuple[str, ...], **environ: str) -> subprocess.Popen:
    """Start a torchrun agent in its own session, so that a whole node can be killed."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *script],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(**environ),
            cwd=REPOSITORY,
            start_new_session=True,
        )


def kill_node(node: subprocess.Popen) -> None:
    """Kill an agent and all its processes at once, as a loss of power does."""
    if node.poll() is None:
        processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in processes:
            process.suspend()
        for process in processes:
            process.kill()
    node.wait(timeout=TIMEOUT)


def test_rank_that_crashes_once_is_restarted_and_the_run_ends_the_same(whole, tmp_path):
    log, mark = tmp_path / "log.txt", tmp_path / "crashed"
    # These options apply to the first start only.
    options = ("--checkpoint.resume", "never", "--run.overwrite", "true")
    script = (FAULTY_RANK, "1", "crash once", "train", *arguments(tmp_path, *options))
    job = agent(
        log, "--standalone", "--nproc_per_node=2", "--max-restarts=2", script=script, CRASHED=str(mark), FAULT_STEP="30"
    )
    try:
        assert job.wait(timeout=TIMEOUT) == 0, log.read_text()[-6000:]
    finally:
        kill_node(job)
    output = log.read_text()
    assert mark.exists()
    assert output.count("ZeroDivisionError: a bug on one rank") == 1
    # The checkpoint of step 28 may still be being written at the crash in step 30.
    resumed = re.search(r"resumed from step (\d+), attempt 2: ", output)
    assert resumed, output[-6000:]
    assert int(resumed[1]) in (7, 14, 21, 28)
    assert read_status(tmp_path) == {**read_status(tmp_path), "state": "finished", "attempt": 2}
    assert differences(run_directory(tmp_path), run_directory(whole)) == []


def test_remaining_node_resumes_when_the_other_is_lost(tmp_path):
    """Start two agents with one rank each and kill one of them with its rank."""
    # The first agent hosts the rendezvous, so it must stay.
    rendezvous = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    options = [
        *("--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=lost"),
        *(f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", "--monitor-interval=0.3"),
    ]
    script = ("-m", "agnews_dist.train", *arguments(tmp_path, "--optim.epochs", "6"))
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    first = agent(logs[0], *options, f"--rdzv-conf={rendezvous}1", script=script)
    second = None
    timeline = Timeline(run_directory(tmp_path))
    try:
        second = agent(logs[1], *options, f"--rdzv-conf={rendezvous}0", script=script)
        assert wait_until(lambda: timeline.steps > 30, every=0.05), logs[0].read_text()[-4000:]
        kill_node(second)
        assert first.wait(timeout=TIMEOUT) == 0, logs[0].read_text()[-6000:]
    finally:
        for node in (first, second):
            if node is not None:
                kill_node(node)
    assert re.search(r"resumed from step \d+, attempt 2: ", "".join(log.read_text() for log in logs))
    events = timeline.events()
    ranks = [event["facts"]["ranks"] for event in events if event["event"] == "RunStarted"]
    assert len(ranks) == 2
    steps = [event["step"] for event in events if event["event"] == "StepDone"]
    assert steps == list(range(1, len(steps) + 1))
    assert read_status(tmp_path)["state"] == "finished"
