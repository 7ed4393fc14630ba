"""The status of a sweep: written from its beginning on, with the steps of all members that have ended."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agnews_dist.errors import Stopped, UserError
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.experiments.sweep_status import SweepStatus, is_own_sweep
from agnews_dist.storage.locks import is_locked


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    found = SweepDirectory(tmp_path / "lr")
    found.open({"format": 1}, overwrite=False)
    return found


def read(directory: SweepDirectory) -> tuple[Any, ...]:
    content = json.loads((directory.path / "status.json").read_text())
    return content["state"], content["attempt"], content["step"], content["reason"]


def test_sweep_status_counts_attempts_and_steps_of_ended_members(directory: SweepDirectory) -> None:
    with suppress(Stopped), SweepStatus(directory, 8) as status:
        assert not (directory.path / "status.json").exists()
        status.begin()
        status.begin()
        assert read(directory) == ("running", 1, 0, "it began")
        assert is_locked(directory.path / ".status.json.lock")
        for member in range(2):
            result = MemberResult(member=member, setting=0, values={}, seed=member, state="finished", num_steps=30)
            directory.write_result(result)
        raise Stopped("SIGUSR1")
    assert read(directory) == ("preempted", 1, 60, "SIGUSR1")
    assert not is_locked(directory.path / ".status.json.lock")
    with SweepStatus(directory, 8) as status:
        status.begin()
    assert read(directory) == ("finished", 2, 60, "all members have ended")


def begin(directory: SweepDirectory) -> int:
    with SweepStatus(directory, 8) as status:
        status.begin()
    return status.pace


def test_start_after_one_without_a_new_member_trains_fewer_at_once(directory: SweepDirectory) -> None:
    assert [begin(directory) for _ in range(4)] == [8, 2, 1, 1]
    for member, pace in enumerate((2, 4, 8, 8)):
        directory.write_result(MemberResult(member=member, setting=0, values={}, seed=0, state="finished"))
        assert begin(directory) == pace
    (directory.path / ".status.json.pace").write_text("4")
    assert begin(directory) == 8


def test_job_that_joins_another_is_not_slowed(directory: SweepDirectory) -> None:
    with SweepStatus(directory, 8) as status:
        status.begin()
        assert begin(directory) == 8


def test_sweep_that_fails_before_its_beginning_has_no_new_status(directory: SweepDirectory) -> None:
    with suppress(UserError), SweepStatus(directory, 8):
        raise UserError("data.source")
    assert not (directory.path / "status.json").exists()
    with suppress(UserError), SweepStatus(directory, 8) as status:
        status.begin()
        raise UserError("a file\ncannot be read")
    assert read(directory) == ("failed", 1, 0, "a file")


def test_sweep_that_is_stopped_before_its_beginning_says_so(directory: SweepDirectory) -> None:
    SweepStatus(directory, 8).end_early("failed", "unknown")
    assert not (directory.path / "status.json").exists()
    SweepStatus(directory, 8).end_early("preempted", "SIGTERM")
    assert read(directory)[0] == "preempted"


@pytest.mark.parametrize(
    ("later", "is_own"),
    [
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, True),  # a task that waited in the queue
        ({"SLURM_JOB_ID": "11", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "21", "SLURM_ARRAY_JOB_ID": "20"}, False),
    ],
)
def test_later_tasks_of_a_job_array_keep_its_sweep(
    directory: SweepDirectory, monkeypatch: pytest.MonkeyPatch, later: dict[str, str], *, is_own: bool
) -> None:
    first = {"SLURM_JOB_ID": "11", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    for name, value in first.items():
        monkeypatch.setenv(name, value)
    assert not is_own_sweep(directory.path)
    with SweepStatus(directory, 8) as status:
        status.begin()
    for name, value in later.items():
        monkeypatch.setenv(name, value)
    assert is_own_sweep(directory.path) == is_own


def test_sweep_started_again_by_hand_is_not_kept(directory: SweepDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    with SweepStatus(directory, 8) as status:
        status.begin()
    assert not is_own_sweep(directory.path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_own_sweep(directory.path)
