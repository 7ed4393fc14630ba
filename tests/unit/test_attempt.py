"""When a run has to end by itself: its own time limit and its job's, whichever comes first."""

import os
import time

import psutil
import pytest

from agnews_dist.attempt import SLURM_MARGIN_SECONDS, set_deadline


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
