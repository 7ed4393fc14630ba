"""When a run has to end by itself: its own time limit and its job's, whichever comes first; and ending it while it begins."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest

from agnews_dist.config.schema import Config, RunConfig
from agnews_dist.distributed.world import World
from agnews_dist.report.console import Sinks
from agnews_dist.run.attempt import SLURM_MARGIN_SECONDS, Attempt, set_deadline
from agnews_dist.run.status import StatusFile, read_status


class Heard:
    """In place of a `Watch`: what it is told."""

    deadlines: tuple = ()

    def set_deadline(self, seconds_from_now: float, why: str) -> None:
        self.deadlines += ((seconds_from_now, why),)


@pytest.mark.parametrize(
    ("max_minutes", "left_of_job", "expected", "why"),
    [
        (None, None, None, ""),
        # Counted from the start of the process, imports included; half a minute is for saving.
        (60.0, None, 60 * 60 - 30, "run.max_minutes 60"),
        (0.5, None, 30 - 3, "run.max_minutes 0.5"),
        (None, 600, 600 - SLURM_MARGIN_SECONDS, "the time limit of the Slurm job"),
        (60.0, 600, 600 - SLURM_MARGIN_SECONDS, "the time limit of the Slurm job"),
        (2.0, 100_000, 120 - 12, "run.max_minutes 2"),
    ],
)
def test_the_earliest_limit_counts(monkeypatch, max_minutes, left_of_job, expected, why):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if left_of_job is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left_of_job))
    watch = Heard()
    set_deadline(watch, max_minutes)
    if expected is None:
        assert watch.deadlines == ()
        return
    ((seconds, said),) = watch.deadlines
    age = time.time() - psutil.Process(os.getpid()).create_time()
    assert said == why
    assert seconds == pytest.approx(expected - (age if "max_minutes" in why else 0), abs=1.5)


@pytest.fixture
def attempt(tmp_path):
    """Of a run that is about to begin, and its watch; as on rank 0."""
    engine = SimpleNamespace(world=World(), precision="fp32")
    config, watch = (
        Config(run=RunConfig(dir=str(tmp_path), name="small")),
        SimpleNamespace(asked="SIGTERM", last_words=None),
    )
    with Sinks() as emit, Attempt(config, engine, watch, emit, accept="") as attempt:
        attempt.claim()
        yield attempt, watch


@pytest.mark.parametrize("first", ["begins", "ends"])
def test_a_run_that_is_ended_while_it_begins_says_so_whichever_comes_first(attempt, tmp_path, monkeypatch, first):
    """The watch ends the process from another thread: what the main thread was about to write must not come after."""
    attempt, watch = attempt
    write, is_told, may_begin = StatusFile.write, threading.Event(), threading.Event()

    def slow(self: StatusFile, state: str, reason: str) -> None:
        if state == "running":
            may_begin.set()
            is_told.wait(0.5)
        write(self, state, reason)  # pyright: ignore[reportArgumentType]
        if state != "running":
            is_told.set()

    monkeypatch.setattr(StatusFile, "write", slow)
    with ThreadPoolExecutor() as pool:
        if first == "begins":
            beginning = pool.submit(attempt.begin, {})
            assert may_begin.wait(5)
        watch.last_words("preempted", "SIGTERM")
        if first == "ends":
            beginning = pool.submit(attempt.begin, {})
        beginning.result(5)
    status = read_status(tmp_path / "small")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    assert not [path for path in tmp_path.glob(".small.*") if path.is_dir()], (
        "neither a half begun nor a replaced run is left"
    )
