"""The run's own time limit and the job's: the earlier one sets the deadline."""

import os
import time

import psutil
import pytest

from agnews_dist.run.engine_setup import SLURM_MARGIN_SECONDS, set_deadline


class FakePreemptionHandler:
    """Records the deadlines that it is given."""

    def __init__(self, begin_time: float | None = None) -> None:
        self.begin_time = begin_time
        self.deadlines: list[tuple[float, str]] = []

    def set_deadline(self, seconds_from_now: float, reason: str) -> None:
        """Record a deadline."""
        self.deadlines.append((seconds_from_now, reason))


@pytest.mark.parametrize(
    ("max_minutes", "job_seconds_left", "expected", "reason"),
    [
        (None, None, None, ""),
        # Counted from the start of the process, imports included, less half a minute for saving.
        (60.0, None, 60 * 60 - 30, "run.max_minutes 60"),
        (0.5, None, 30 - 3, "run.max_minutes 0.5"),
        (None, 600, 600 - SLURM_MARGIN_SECONDS, "the time limit of the Slurm job"),
        (60.0, 600, 600 - SLURM_MARGIN_SECONDS, "the time limit of the Slurm job"),
        (2.0, 100_000, 120 - 12, "run.max_minutes 2"),
    ],
)
def test_set_deadline_takes_the_earliest_limit(monkeypatch, max_minutes, job_seconds_left, expected, reason):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if job_seconds_left is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + job_seconds_left))
    preemption = FakePreemptionHandler()
    set_deadline(preemption, max_minutes)
    if expected is None:
        assert preemption.deadlines == []
        return
    ((seconds, given_reason),) = preemption.deadlines
    age = time.time() - psutil.Process(os.getpid()).create_time()
    assert given_reason == reason
    assert seconds == pytest.approx(expected - (age if "max_minutes" in reason else 0), abs=1.5)


def test_set_deadline_counts_from_the_begin_of_a_run_inside_of_another_program(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    preemption = FakePreemptionHandler(begin_time=time.time() - 60)
    set_deadline(preemption, 60.0)
    assert preemption.deadlines == [(pytest.approx(60 * 60 - 30 - 60, abs=1.5), "run.max_minutes 60")]
