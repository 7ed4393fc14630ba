"""The number of members that a rank trains at once, and the work between them."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agnews_dist.config.schema import Config
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.experiments.halving import HalvingRunner
from agnews_dist.experiments.members import Member, Wave, build_members, cut_waves
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.experiments.sweep_runner import MAX_WAVE, SweepRunner

GIGABYTE = 10**9


def build(num_workers: int = 1) -> SweepRunner:
    unused: Any = None
    return SweepRunner(Config(), 20, 1, unused, unused, unused, worker=(0, num_workers))


def build_halving(task: int, num_tasks: int, rank: int, num_ranks: int) -> HalvingRunner:
    """Return the runner of a rank of a task of a job array, before it trains MEMBERS."""
    unused: Any = None
    engine: Any = SimpleNamespace(world=World(rank=rank, num_ranks=num_ranks))
    worker = task * num_ranks + rank, num_tasks * num_ranks
    runner = HalvingRunner(Config(), 20, 1, engine, unused, unused, worker=worker, factor=2)
    runner._own = runner._choose_own(cut_waves(MEMBERS, limit=MAX_WAVE, num_workers=worker[1]))
    return runner


MEMBERS = build_members(Config(), [{"optim.lr": 0.001 * number} for number in range(1, 21)], (0,))


@pytest.mark.parametrize(
    ("free", "num_workers", "expected"),
    [(99 * GIGABYTE, 1, MAX_WAVE), (99 * GIGABYTE, 5, 4), (int(2.9 * GIGABYTE), 1, 2), (0, 1, 1), (-GIGABYTE, 1, 1)],
)
def test_waves_are_cut_to_what_fits(free: int, num_workers: int, expected: int) -> None:
    assert build(num_workers)._choose_limit(MEMBERS, free, GIGABYTE) == expected


def test_halving_refuses_members_that_do_not_fit() -> None:
    assert build_halving(0, 1, 0, 1)._choose_limit(MEMBERS, 20 * GIGABYTE, GIGABYTE) == 20
    assert build_halving(0, 1, 3, 4)._choose_limit(MEMBERS, 5 * GIGABYTE, GIGABYTE) == 5
    # The other tasks of an array may wait in the queue for long.
    for num_tasks in (1, 10):
        with pytest.raises(UserError, match=r"20 members wait in memory, 20\.0 GB, and 19\.0 GB are left"):
            build_halving(0, num_tasks, 0, 1)._choose_limit(MEMBERS, 19 * GIGABYTE, GIGABYTE)


@pytest.mark.parametrize(("num_tasks", "num_ranks"), [(1, 1), (1, 3), (4, 1), (3, 2), (10, 4)])
def test_ranks_of_each_task_can_hold_all_waves_and_none_twice(num_tasks: int, num_ranks: int) -> None:
    waves = cut_waves(MEMBERS, limit=MAX_WAVE, num_workers=num_tasks * num_ranks)
    firsts = set[int]()
    for task in range(num_tasks):
        held = [build_halving(task, num_tasks, rank, num_ranks)._own for rank in range(num_ranks)]
        assert sorted(wave.number for own in held for wave in own) == [wave.number for wave in waves]
        firsts |= {own[0].number for own in held if own}
    assert len(firsts) == min(len(waves), num_tasks * num_ranks), "tasks begin at other waves"


class WithoutTraining(SweepRunner):
    """A runner whose members end at once."""

    def _train_wave(self, group: Any, wave: Wave) -> None:
        for member in wave.members:
            if member.index not in self.directory.find_ended(wave.members):
                result = MemberResult(
                    member=member.index, setting=member.setting, values=member.values, seed=0, state="finished"
                )
                self.directory.write_result(result)


def count_file_calls(path: Path, members: Sequence[Member], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many files are looked for, read or listed while all members train."""
    directory, count = SweepDirectory(path), 0
    directory.open({"format": 1}, overwrite=False)
    unused: Any = SimpleNamespace(world=World(), emit=lambda _: None)
    runner = WithoutTraining(Config(), len(members), 1, unused, directory, unused, worker=(0, 1))
    stat, scandir, read_bytes = os.stat, os.scandir, Path.read_bytes

    def counted(*arguments: Any, **options: Any) -> os.stat_result:
        nonlocal count
        count += 1
        return stat(*arguments, **options)

    def listed(*arguments: Any) -> Any:
        nonlocal count
        count += sum(1 for _ in scandir(*arguments))
        return scandir(*arguments)

    def read(path: Path) -> bytes:
        nonlocal count
        count += 1
        return read_bytes(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read)
        patched.setattr(os, "stat", counted)
        patched.setattr(os, "scandir", listed)
        runner._train_waves(unused, cut_waves(members, limit=1, num_workers=1))
    assert len(directory.read_results()) == len(members)
    return count


def test_file_calls_grow_with_the_members_and_not_with_their_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = build_members(Config(), [{"optim.lr": 0.001 * number} for number in range(1, 801)], (0,))
    assert count_file_calls(tmp_path / "sweep", members, monkeypatch) < 40 * len(members)
