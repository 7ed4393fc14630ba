"""The selection of a setting among those that ended in different ways."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agnews_dist.config.schema import Config
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.experiments.members import build_members
from agnews_dist.experiments.selection import finish_sweep
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.experiments.sweep_runner import SweepRunner


def test_setting_that_halving_dropped_is_not_selected(tmp_path: Path) -> None:
    """The survivor of the last rung diverged after it, so that no setting has reached the end."""
    directory = SweepDirectory(tmp_path / "sweep")
    directory.open({"format": 1}, overwrite=False)
    unused: Any = SimpleNamespace(world=World(), emit=lambda _: None)
    runner = SweepRunner(Config(), 2, 1, unused, directory, unused, worker=(0, 1))
    runner.members = build_members(Config(), [{"optim.lr": 0.1}, {"optim.lr": 0.2}], (0,))
    dropped = MemberResult(member=0, setting=0, values={"optim.lr": 0.1}, seed=0, state="halved", accuracy=0.9, loss=0.1)
    survivor = replace(dropped, member=1, setting=1, values={"optim.lr": 0.2}, state="diverged", reason="loss at step 7 is nan")
    for result in (dropped, survivor):
        directory.write_result(result)
    with pytest.raises(UserError, match=r"every setting that was not dropped diverged \(loss at step 7 is nan\)\. Lower optim"):
        finish_sweep(runner, frozenset())
    assert not (directory.path / "sweep.json").exists()
