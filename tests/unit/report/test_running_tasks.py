"""RunningTasks: rates and time left by rich's own classes; phases end when another task begins."""

import io

import pytest
import rich.console
from support.events import Clock, make_progress

from agnews_dist.events import begin_phase
from agnews_dist.report.running_tasks import RunningTasks, format_task


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tasks(clock: Clock) -> RunningTasks:
    return RunningTasks(rich.console.Console(file=io.StringIO()), clock)


def test_rate_excludes_work_of_the_first_report(clock: Clock, tasks: RunningTasks) -> None:
    tasks.report(make_progress(5_000_000))
    tasks.report(make_progress(5_000_000))
    clock.now += 10.0
    task = tasks.report(make_progress(5_400_000))
    assert (task.speed, task.time_remaining) == (40_000.0, 20)
    clock.now += 20.0
    task = tasks.report(make_progress(6_200_000))
    assert format_task(task) == "frozen prefix: 6,200,000 tokens done in 30.0 s, 40,000 tokens/s"
    assert tasks.tasks == [], "a complete task is no longer kept"


def test_rate_excludes_work_reported_at_once(clock: Clock, tasks: RunningTasks) -> None:
    for done in (0, 1_000_000, 5_000_000):
        task = tasks.report(make_progress(done))
        assert (task.speed, task.time_remaining) == (None, None)
        clock.now += 0.01
    clock.now += 9.99
    assert (task.speed, task.time_remaining) == (None, None), "without later work there is still no rate"
    task = tasks.report(make_progress(5_400_000))
    assert task.speed == pytest.approx(40_000, rel=0.01)
    assert task.time_remaining == pytest.approx(20, abs=1)
    clock.now += 20.0
    for done in (6_000_000, 6_200_000):
        task = tasks.report(make_progress(done))
    assert task.speed == pytest.approx(40_000, rel=0.01), "the last reports may also come at once"


def test_phase_ends_with_the_next_task(clock: Clock, tasks: RunningTasks) -> None:
    phase = tasks.report(begin_phase("load gpt2"))
    clock.now += 7.0
    assert format_task(phase) == "load gpt2: 7.0 s so far"
    tasks.report(make_progress(0))
    assert [task.fields["name"] for task in tasks.tasks] == ["frozen prefix"]
    tasks.report(begin_phase("load gpt2"))
    assert [task.fields["name"] for task in tasks.tasks] == ["frozen prefix", "load gpt2"], "only phases end this way"
    tasks.end_all(but="load gpt2")
    assert [task.fields["name"] for task in tasks.tasks] == ["load gpt2"]
