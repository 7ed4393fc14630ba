"""The checkpoints of a run: when they are due, what each holds, and what a failed write changes."""

import errno
import json
import math
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support.events import Clock, recorder

from agnews_dist.events import CheckpointSaved, Event, Progress, Warned
from agnews_dist.report.event_log import EventLog
from agnews_dist.training import checkpoint_manager
from agnews_dist.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings, Cost, OnDisk

METADATA = {"settings": {"optim.lr": 1.0}, "class_names": ["a", "b"]}
NO_BEST = SimpleNamespace(epoch=0, state_dict=lambda: None)


class FakeStrategy:
    """Trainable part of one weight and one moment, which counts how often its state is gathered."""

    def __init__(self) -> None:
        self.value, self.num_gathered = 1.0, 0

    def gather_state(self):
        """Yield the weight and the moment."""
        self.num_gathered += 1
        yield "weight.w", torch.full((2,), self.value)
        yield "exp_avg.w", torch.zeros(2)


class Run:
    """A manager with its folder, strategy and events."""

    def __init__(
        self, directory: Path, *, is_main: bool = True, keep: int = 2, on_disk: OnDisk | None = None, **intervals: float | None
    ) -> None:
        self.strategy, self.events, self.folder = FakeStrategy(), list[Event](), directory / "checkpoints"
        self.log = EventLog(directory / "events.jsonl") if is_main else None
        self.manager = CheckpointManager(
            lambda: self.folder,
            self.strategy,
            CheckpointSettings(**{"keep": keep, "every_steps": 5, "every_minutes": None, **intervals}),
            metadata=METADATA,
            log=self.log,
            emit=recorder(self.events),
            on_disk=on_disk,
        )

    def save(self, step: int, *, is_scored: bool = False, best=NO_BEST, wait: bool = True) -> None:
        """Save a checkpoint whose state names its step."""
        self.strategy.value = float(step)
        self.manager.save(step, {"position": step}, best, is_scored=is_scored, wait=wait)

    @property
    def saved(self) -> list[str]:
        """Names of the checkpoints on disk, newest first."""
        return [path.name for path in list_checkpoints(self.folder)]


@pytest.fixture
def run(tmp_path):
    """Yield a run on rank 0."""
    run = Run(tmp_path)
    with closing(run.manager):
        yield run


def test_every_checkpoint_has_the_metadata_first(run):
    run.log(Warned(message="a line"))
    for step, is_scored in ((5, False), (5, True)):
        run.save(step, is_scored=is_scored)
    for path in list_checkpoints(run.folder):
        checkpoint = read_checkpoint(path)
        expected = {**METADATA, "position": 5, "step": 5, "log_bytes": run.log.num_bytes, "best": None}
        assert checkpoint.state == expected
        assert list(checkpoint.state) == list(expected), "the order of the keys is part of the format"
        assert run.log.num_bytes > 0
        assert {group: list(tensors) for group, tensors in checkpoint.tensors.items()} == {
            "weights": ["w"],
            "moments": ["exp_avg.w"],
        }
        assert checkpoint.tensors["weights"]["w"].tolist() == [5.0, 5.0]
    assert run.saved == ["step-00000005-scored", "step-00000005"]
    assert [event.step for event in run.events if isinstance(event, CheckpointSaved)] == [5, 5]
    assert run.manager.last_saved == 5


def test_checkpoint_is_due_at_the_interval_on_rank_0_only(run, tmp_path):
    assert [step for step in range(1, 12) if run.manager.is_due(step)] == [5, 10]
    (tmp_path / "other").mkdir()
    with closing(Run(tmp_path / "other", is_main=False).manager) as other:
        assert not any(other.is_due(step) for step in range(1, 12))


def test_ranks_without_a_log_gather_but_write_nothing(tmp_path):
    run = Run(tmp_path, is_main=False)
    with closing(run.manager):
        run.save(5)
    assert run.strategy.num_gathered == 1
    assert (run.events, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("is_main", [True, False])
def test_saved_checkpoint_is_not_saved_again_on_any_rank(tmp_path, is_main):
    run = Run(tmp_path, is_main=is_main, on_disk=OnDisk("step-00000040", 40, None))
    with closing(run.manager):
        run.save(40)
        assert run.strategy.num_gathered == 0
        run.save(40, is_scored=True)
        run.save(40, is_scored=True)
    assert run.strategy.num_gathered == 1


def test_no_checkpoint_is_due_while_one_is_being_written(run, monkeypatch):
    may_end, write = threading.Event(), write_checkpoint

    def write_slowly(*content) -> int:
        assert may_end.wait(10)
        return write(*content)

    monkeypatch.setattr(checkpoint_manager, "write_checkpoint", write_slowly)
    run.save(5, wait=False)
    assert not run.manager.is_due(10)
    assert run.events == []
    monkeypatch.setattr(checkpoint_manager, "SLOW_SECONDS", 0.0)
    assert not run.manager.is_due(15)
    assert not run.manager.is_due(20)
    (warning,) = run.events
    assert warning.message.startswith("checkpoint of step 5: being written for 0 s, so the one due after step 15 waits.")
    run.strategy.value = 7.0  # training continues; the copy is unchanged
    may_end.set()
    run.manager.wait()
    assert run.manager.is_due(20)
    assert read_checkpoint(run.folder / "step-00000005").tensors["weights"]["w"].tolist() == [5.0, 5.0]


def test_failed_write_is_a_warning_and_tried_again(run, monkeypatch):
    run.save(5)

    def fail(*content) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(checkpoint_manager, "write_checkpoint", fail)
        run.save(10)
    (saved, warning) = run.events
    assert isinstance(saved, CheckpointSaved)
    assert warning.message.startswith(
        f"checkpoint of step 10: cannot be written to {run.folder} (No space left on device); a restart would resume from "
        "step 5."
    )
    assert (run.manager.last_saved, run.saved) == (5, ["step-00000005"])
    run.save(10)
    assert (run.manager.last_saved, run.saved) == (10, ["step-00000010", "step-00000005"])


def test_exit_waits_for_the_write_also_after_an_error(tmp_path):
    run, error = Run(tmp_path), ValueError("training failed")

    def train() -> None:
        with closing(run.manager):
            run.save(5, wait=False)
            raise error

    with pytest.raises(ValueError, match="training failed"):
        train()
    assert run.saved == ["step-00000005"]
    assert run.manager.last_saved == 5


def test_best_epoch_is_written_once_and_kept_while_a_checkpoint_refers_to_it(tmp_path):
    def best(step: int) -> SimpleNamespace:
        name = f"best-{step:08d}"
        scores = SimpleNamespace(tensors=lambda: {"labels": torch.tensor([step])})
        weights = {"w": torch.full((2,), float(step))}
        return SimpleNamespace(epoch=1, name=name, weights=weights, scores=scores, state_dict=lambda: {"name": name})

    run = Run(tmp_path, keep=1)
    with closing(run.manager):
        run.save(4, best=best(4))
        written = (run.folder / "best-00000004" / "MANIFEST").stat().st_mtime_ns
        run.save(8, best=best(4))
        assert sorted(path.name for path in run.folder.iterdir()) == ["best-00000004", "step-00000008"]
        assert (run.folder / "best-00000004" / "MANIFEST").stat().st_mtime_ns == written
        assert read_checkpoint(run.folder / "best-00000004").tensors["weights"]["w"].tolist() == [4.0, 4.0]
        run.save(12, best=best(12))
        assert sorted(path.name for path in run.folder.iterdir()) == ["best-00000012", "step-00000012"]
    assert json.loads((run.folder / "step-00000012" / "state.json").read_text())["best"] == {"name": "best-00000012"}


def test_interval_follows_the_measured_cost():
    settings = CheckpointSettings(keep=2, every_steps=None, every_minutes=None, max_overhead=0.01)
    assert settings.seconds_between(0.5, Cost(0, seconds=1.0, cpu_seconds=1.5)) == 200.0, "2 s are 1 % of 200 s"
    assert settings.seconds_between(0.0, Cost(0, seconds=40.0, cpu_seconds=0.1)) == 400.0, (
        "the disk is busy a tenth of the time"
    )
    assert settings.seconds_between(0.001, Cost(0, seconds=0.01, cpu_seconds=0.002)) == 1.0
    for change, expected in (
        ({"every_steps": 5}, math.inf),
        ({"every_minutes": 2.0}, 120.0),
        ({"max_overhead": None}, math.inf),
    ):
        assert replace(settings, **change).seconds_between(0.5, Cost(0, 1.0, 1.5)) == expected


def test_first_checkpoint_is_due_after_a_second_and_the_next_as_its_cost_says(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(checkpoint_manager.time, "monotonic", clock)
    run = Run(tmp_path, every_steps=None, max_overhead=0.01)
    with closing(run.manager):
        assert not run.manager.is_due(1)
        clock.now += 1.0
        assert run.manager.is_due(2)
        monkeypatch.setattr(run.manager, "_write", lambda *content: Cost(0, seconds=0.1, cpu_seconds=0.3))
        run.save(2)
        clock.now += 29.9
        assert not run.manager.is_due(3)
        clock.now += 0.2
        assert run.manager.is_due(4)


def test_failed_write_is_not_tried_again_at_every_step(run, monkeypatch):
    monkeypatch.setattr(run.manager, "_every_seconds", 1.0)
    monkeypatch.setattr(run.manager, "_write", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    run.save(5)
    assert run.manager._every_seconds == checkpoint_manager.RETRY_SECONDS


def test_long_wait_for_a_write_is_reported(run, monkeypatch):
    # A timed out write raises TimeoutError, as a wait does in Python 3.11.
    may_end, error = threading.Event(), TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    def write(*content) -> Cost:
        assert may_end.wait(10)
        raise error

    def emit(event: Event) -> None:
        if not isinstance(event, Progress):
            run.events.append(event)
            may_end.set()

    monkeypatch.setattr(checkpoint_manager, "REPEAT_SECONDS", 0.02)
    monkeypatch.setattr(run.manager, "_write", write)
    monkeypatch.setattr(run.manager, "_emit", emit)
    run.save(5)
    messages = [event.message for event in run.events]
    waits = "checkpoint of step 5: being written for 0 s, and training waits for it, as long as it takes. Check the disk of "
    assert messages[0] == f"{waits}{run.folder}."
    assert messages[-1].startswith("checkpoint of step 5: cannot be written")
