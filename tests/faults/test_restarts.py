"""torchrun starts a job again after a failure: it goes on from the last checkpoint, also with fewer nodes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from support.jobs import wait_until
from support.processes import REPOSITORY, environment
from support.small_run import arguments, differences, finish, status
from support.timeline import Timeline

from agnews_dist.distributed.node_resources import free_port

ODD_RANK = str(REPOSITORY / "tests" / "ranks" / "odd_rank.py")


def agent(log: Path, *options: str, script: tuple[str, ...], **environ: str) -> subprocess.Popen:
    """A torchrun agent, in a session of its own, so that all of a node can be killed."""
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


def take_away(node: subprocess.Popen) -> None:
    """As a machine that loses its power: the agent and all that it has started."""
    if node.poll() is None:
        processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in processes:
            process.suspend()
        for process in processes:
            process.kill()
    node.wait(timeout=30)


def test_a_rank_that_crashes_once_is_started_again_and_ends_as_if_it_had_not(tmp_path):
    whole = finish(tmp_path / "whole")
    log, mark = tmp_path / "log.txt", tmp_path / "crashed"
    # What it was to begin from is said to its first start.
    anew = ("--checkpoint.resume", "never", "--run.overwrite", "true")
    script = (ODD_RANK, "1", "crash once", "train", *arguments(tmp_path, *anew))
    job = agent(
        log, "--standalone", "--nproc_per_node=2", "--max-restarts=2", script=script, CRASHED=str(mark), ODD_STEP="30"
    )
    try:
        assert job.wait(timeout=150) == 0, log.read_text()[-6000:]
    finally:
        take_away(job)
    said = log.read_text()
    assert mark.exists()
    assert said.count("ZeroDivisionError: a bug on one rank") == 1
    assert "goes on from step 28, attempt 2: " in said
    assert status(tmp_path) == {**status(tmp_path), "state": "finished", "attempt": 2}
    assert differences(tmp_path / "runs" / "small", whole) == []


def test_our_launch_script_passes_on_what_clusters_send(tmp_path):
    """torchrun by itself dies of USR1, and leaves its ranks behind."""
    log, timeline = tmp_path / "log.txt", Timeline(tmp_path / "runs" / "small")
    with log.open("ab") as file:
        job = subprocess.Popen(
            ["bash", str(REPOSITORY / "launch" / "local.sh"), *arguments(tmp_path, "--optim.epochs", "300")],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(NPROC="2"),
            cwd=REPOSITORY,
            start_new_session=True,
        )
    try:
        assert wait_until(lambda: timeline.steps > 10 or job.poll() is not None, 90, every=0.05)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=30)
    finally:
        take_away(job)
    assert re.search(r"stopped \(SIGUSR1\) at step \d+, which is saved", log.read_text()), log.read_text()[-4000:]
    assert status(tmp_path)["state"] == "preempted"
    assert status(tmp_path)["step"] == timeline.steps


def test_a_node_that_is_lost_leaves_the_other_to_go_on(tmp_path):
    """Two agents, one rank each; one is killed with its rank, as a machine that is taken away."""
    # Who hosts the rendezvous must stay: without it nobody can meet again.
    rendezvous = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    options = [
        *("--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=lost"),
        *(f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", "--monitor-interval=0.3"),
    ]
    script = ("-m", "agnews_dist.train", *arguments(tmp_path, "--optim.epochs", "12"))
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    first = agent(logs[0], *options, f"--rdzv-conf={rendezvous}1", script=script)
    second = None
    timeline = Timeline(tmp_path / "runs" / "small")
    try:
        second = agent(logs[1], *options, f"--rdzv-conf={rendezvous}0", script=script)
        assert wait_until(lambda: timeline.steps > 30, 90, every=0.05), logs[0].read_text()[-4000:]
        take_away(second)
        assert first.wait(timeout=150) == 0, logs[0].read_text()[-6000:]
    finally:
        for node in (first, second):
            if node is not None:
                take_away(node)
    assert re.search(r"goes on from step \d+, attempt 2: ", "".join(log.read_text() for log in logs))
    events = timeline.events()
    ranks = [event["facts"]["ranks"] for event in events if event["event"] == "RunStarted"]
    assert len(ranks) == 2
    steps = [event["step"] for event in events if event["event"] == "StepDone"]
    assert steps == list(range(1, len(steps) + 1))
    assert status(tmp_path)["state"] == "finished"
