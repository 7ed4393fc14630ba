"""Parallel tasks on a CPU: results in order, one thread each, nothing running after an error."""

import threading
import time
from functools import partial

import pytest
import torch

from agnews_dist.model.packed import run_in_threads

CPU = torch.device("cpu")
OTHER = torch.device("meta")
"""A device other than a CPU."""


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def slowest_first(number: int) -> int:
    time.sleep(0.01 * (5 - number))
    return number


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 5])
def test_run_in_threads_keeps_the_order(num_tasks: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    assert run_in_threads([partial(slowest_first, n) for n in range(num_tasks)], CPU) == list(range(num_tasks))
    assert torch.get_num_threads() == num_threads


def test_run_in_threads_runs_tasks_at_the_same_time() -> None:
    """Each task waits for the other. With one thread, the control, the first waits in vain."""
    barrier = threading.Barrier(2)
    assert sorted(run_in_threads([partial(barrier.wait, 20)] * 2, CPU)) == [0, 1]
    torch.set_num_threads(1)
    barrier = threading.Barrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        run_in_threads([partial(barrier.wait, 0.1)] * 2, CPU)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_run_in_threads_runs_no_more_tasks_than_threads(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    lock, num_running, most = threading.Lock(), 0, 0

    def task() -> None:
        nonlocal num_running, most
        with lock:
            num_running += 1
            most = max(most, num_running)
        time.sleep(0.02)
        with lock:
            num_running -= 1

    run_in_threads([task] * 8, CPU)
    assert most == num_threads


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_run_in_threads_gives_a_task_one_thread(num_tasks: int) -> None:
    """Check a single task too: its result must not depend on the number of tasks."""
    assert run_in_threads([torch.get_num_threads] * num_tasks, CPU) == [1] * num_tasks
    assert torch.get_num_threads() == 2


def fail() -> int:
    raise ValueError("this task is broken")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_run_in_threads_raises_errors_and_restores_the_threads(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    with pytest.raises(ValueError, match="this task is broken"):
        run_in_threads([partial(int, "1"), fail, partial(int, "2")], CPU)
    assert torch.get_num_threads() == num_threads


def test_run_in_threads_starts_no_task_after_an_error() -> None:
    started, ended = [], []
    other_started = threading.Event()

    def fail_after_another_started() -> None:
        assert other_started.wait(20)
        fail()

    def slow(number: int) -> None:
        started.append(number)
        other_started.set()
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ValueError, match="this task is broken"):
        run_in_threads([fail_after_another_started, *(partial(slow, number) for number in range(50))], CPU)
    assert 1 <= len(started) <= 3
    assert sorted(ended) == sorted(started), "no task still runs"
    assert torch.get_num_threads() == 2


def test_run_in_threads_on_a_gpu_runs_in_sequence() -> None:
    order: list[int] = []
    tasks = [lambda n=n: order.append(n) or threading.get_ident() for n in range(3)]
    assert run_in_threads(tasks, OTHER) == [threading.get_ident()] * 3
    assert order == [0, 1, 2]
    assert run_in_threads([torch.get_num_threads], OTHER) == [2], "the number of threads stays"
    on_cpu = run_in_threads(tasks, CPU)
    assert threading.get_ident() not in on_cpu, "control"
