"""Pieces of CPU work side by side: in order, truly at once, one thread each, and nothing left behind after an error."""

import threading
import time
from functools import partial

import pytest
import torch

from agnews_dist.model.packed import side_by_side

CPU = torch.device("cpu")
OTHER = torch.device("meta")
"""Any device that is not a CPU."""


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
@pytest.mark.parametrize("num_pieces", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_pieces(num_pieces: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    assert side_by_side([partial(slowest_first, n) for n in range(num_pieces)], CPU) == list(range(num_pieces))
    assert torch.get_num_threads() == num_threads


def test_pieces_run_at_the_same_time() -> None:
    """Each waits for the other; with one thread, the negative control, the first waits in vain."""
    together = threading.Barrier(2)
    assert sorted(side_by_side([partial(together.wait, 20)] * 2, CPU)) == [0, 1]
    torch.set_num_threads(1)
    alone = threading.Barrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        side_by_side([partial(alone.wait, 0.1)] * 2, CPU)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_no_more_pieces_at_once_than_threads(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    lock, now, most = threading.Lock(), 0, 0

    def piece() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    side_by_side([piece] * 8, CPU)
    assert most == num_threads


@pytest.mark.parametrize("num_pieces", [1, 4])
def test_a_piece_has_one_thread(num_pieces: int) -> None:
    """A single piece too: its result must not depend on how many others there are."""
    assert side_by_side([torch.get_num_threads] * num_pieces, CPU) == [1] * num_pieces
    assert torch.get_num_threads() == 2


def fail() -> int:
    raise ValueError("this piece is broken")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_error_is_raised_and_the_threads_are_given_back(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    with pytest.raises(ValueError, match="this piece is broken"):
        side_by_side([partial(int, "1"), fail, partial(int, "2")], CPU)
    assert torch.get_num_threads() == num_threads


def test_after_an_error_what_had_begun_ends_and_the_rest_never_begins() -> None:
    begun, ended = [], []
    companion_began = threading.Event()

    def fail_beside_another() -> None:
        assert companion_began.wait(20)
        fail()

    def slow(number: int) -> None:
        begun.append(number)
        companion_began.set()
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ValueError, match="this piece is broken"):
        side_by_side([fail_beside_another, *(partial(slow, number) for number in range(50))], CPU)
    assert 1 <= len(begun) <= 3
    assert sorted(ended) == sorted(begun), "nothing runs on behind the caller's back"
    assert torch.get_num_threads() == 2


def test_on_a_gpu_pieces_follow_each_other_in_the_calling_thread() -> None:
    order: list[int] = []
    pieces = [lambda n=n: order.append(n) or threading.get_ident() for n in range(3)]
    assert side_by_side(pieces, OTHER) == [threading.get_ident()] * 3
    assert order == [0, 1, 2]
    assert side_by_side([torch.get_num_threads], OTHER) == [2], "which leaves the CPU's threads alone"
    on_the_cpu = side_by_side(pieces, CPU)
    assert threading.get_ident() not in on_the_cpu, "the negative control"
