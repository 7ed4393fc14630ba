"""StepProgress and TaskProgress: rates and time left."""

import pytest
from support.events import Clock, make_progress, make_step

from agnews_dist.report.progress import StepProgress, TaskProgress


def test_eta_needs_two_steps_and_a_total() -> None:
    clock = Clock()
    for num_steps, expected in ((10, [None, 8.0, 7.0]), (0, [None, None, None])):
        progress = StepProgress(num_steps, clock)
        found: list[float | None] = []
        for number in range(1, 4):
            clock.now += 1.0
            progress.add(make_step(number))
            found.append(progress.eta)
        assert found == expected


def test_rate_excludes_work_of_the_first_report() -> None:
    clock = Clock()
    progress = TaskProgress(make_progress(5_000_000), clock)
    progress.add(make_progress(5_000_000))
    clock.now += 10.0
    progress.add(make_progress(5_400_000))
    assert (progress.rate, progress.eta) == (40_000.0, 20.0)
    clock.now += 20.0
    progress.add(make_progress(6_200_000))
    assert progress.format_line() == "frozen prefix: 6,200,000 tokens done in 30.0 s, 40,000 tokens/s"


def test_rate_excludes_work_reported_at_once() -> None:
    clock = Clock()
    progress = TaskProgress(make_progress(0), clock)
    for done in (0, 1_000_000, 5_000_000):
        progress.add(make_progress(done))
        assert (progress.rate, progress.eta) == (None, None)
        clock.now += 0.01
    # Without later work there is still no rate.
    clock.now += 9.99
    assert (progress.rate, progress.eta) == (None, None)
    progress.add(make_progress(5_400_000))
    assert progress.rate == pytest.approx(40_000, rel=0.01)
    assert progress.eta == pytest.approx(20, rel=0.01)
    clock.now += 20.0
    # The last reports may also come at once.
    for done in (6_000_000, 6_200_000):
        progress.add(make_progress(done))
    assert progress.rate == pytest.approx(40_000, rel=0.01)


def test_rate_needs_a_tenth_of_a_second() -> None:
    clock = Clock()
    progress = TaskProgress(make_progress(0), clock)
    found: list[float | None] = []
    # At 1/16 s the start of the rate still moves; 1/16 s later too little time has passed. Binary fractions are exact.
    for done in (0, 10, 20, 30, 40):
        progress.add(make_progress(done))
        found.append(progress.rate)
        clock.now += 1 / 16
    assert found == [None, None, None, 160.0, 160.0]
