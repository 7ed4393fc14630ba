"""How many members of a sweep a rank trains at once."""

from typing import Any

import pytest

from agnews_dist.config.schema import Config
from agnews_dist.errors import UserError
from agnews_dist.experiments.halving import HalvingRunner
from agnews_dist.experiments.members import build_members
from agnews_dist.experiments.sweep_runner import MAX_WAVE, SweepRunner

GIGABYTE = 10**9


def build(kind: type[SweepRunner], num_workers: int = 1) -> SweepRunner:
    unused: Any = None
    return kind(Config(), 20, 1, unused, unused, unused, worker=(0, num_workers))


MEMBERS = build_members(Config(), [{"optim.lr": 0.001 * number} for number in range(1, 21)], (0,))


@pytest.mark.parametrize(
    ("free", "num_workers", "expected"),
    [(99 * GIGABYTE, 1, MAX_WAVE), (99 * GIGABYTE, 5, 4), (int(2.9 * GIGABYTE), 1, 2), (0, 1, 1), (-GIGABYTE, 1, 1)],
)
def test_waves_are_cut_to_what_fits(free: int, num_workers: int, expected: int) -> None:
    assert build(SweepRunner, num_workers)._choose_limit(MEMBERS, free, GIGABYTE) == expected


def test_halving_refuses_members_that_do_not_fit() -> None:
    assert build(HalvingRunner)._choose_limit(MEMBERS, 20 * GIGABYTE, GIGABYTE) == 20
    assert build(HalvingRunner, 4)._choose_limit(MEMBERS, 5 * GIGABYTE, GIGABYTE) == 5
    with pytest.raises(UserError, match=r"20 members wait in memory, 20\.0 GB, and 19\.0 GB are left"):
        build(HalvingRunner)._choose_limit(MEMBERS, 19 * GIGABYTE, GIGABYTE)
