"""The training loop: stopped and resumed anywhere, it ends with the same bits as without a stop."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import SharedError, Stopped
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
from agnews_dist.events import EvalDone, Event, StepDone
from agnews_dist.model.prefix import uncached_features
from agnews_dist.report.event_log import EventLog
from agnews_dist.training.checkpoint import Checkpoint, best_name, list_checkpoints, read_checkpoint
from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings, OnDisk
from agnews_dist.training.loop import Monitors, Trainer, TrainerSettings
from agnews_dist.training.timing import StageTimer

LENGTHS = np.random.default_rng(4).integers(1, 31, 24).tolist()
EPOCHS, EPOCH_STEPS = 2, 4


class FakePreemptionHandler:
    """Asks to stop from a given step on, and records the exit."""

    def __init__(self, events: list[Event], stop_at: int | None) -> None:
        self._events, self._stop_at = events, stop_at
        self.is_exiting = False

    @property
    def is_stopping(self) -> bool:
        """True from the step before which the stop is requested."""
        return self._stop_at is not None and sum(isinstance(event, StepDone) for event in self._events) >= self._stop_at

    def begin_exit(self) -> None:
        """Record the call."""
        self.is_exiting = True


class Run:
    """One start of a small training."""

    def __init__(
        self,
        directory: Path,
        *,
        stop_at: int | None = None,
        batch_size: int = 6,
        changes: dict[str, Any] | None = None,
        class_weights_C: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        self.classifier, self.events = toy_classifier(dropout=0.2), list[Event]()
        self.preemption = FakePreemptionHandler(self.events, stop_at)
        self.timer, self.folder = StageTimer(0.0), directory / "checkpoints"
        self.table = TokenTable(toy_split(LENGTHS), pad_id=0, device=self.engine.device)
        plan = PlanSettings(global_batch_size=batch_size)
        loader = TrainLoader(
            self.table, self.engine.world, plan, max_tokens_per_rank=100, quadratic=0.0, class_weights_C=class_weights_C
        )
        settings = TrainerSettings(
            epochs=EPOCHS,
            max_steps=None,
            lr=1e-2,
            weight_decay=0.1,
            warmup_ratio=0.2,
            schedule="linear",
            max_grad_norm=1.0,
            label_smoothing=0.0,
            best_metric="accuracy",
            evaluate_every="epoch",
            patience=None,
            nonfinite="stop",
            seed=3,
            class_names=("a", "b", "c", "d"),
        )
        settings = replace(settings, **changes or {})
        monitors = Monitors(self.events.append, self.timer, self.preemption)
        self.trainer = Trainer(self.classifier, self.engine, loader, settings, monitors)
        self.timer.seconds["prefix"] = 0.5
        self.trainer.use_features(uncached_features(self.classifier.prefix))
        self._log, self._options = EventLog(directory / "events.jsonl"), options

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint."""
        name = best_name(checkpoint.state)
        best = read_checkpoint(checkpoint.path.with_name(name)).tensors if name else {}
        self.trainer.load_state(checkpoint.state, checkpoint.tensors, best)

    def fit(self, validate: Callable[[], SplitScores] | None = None, *, every_steps: int | None = None) -> None:
        """Train to the end, or to the step before which a stop is requested."""
        manager = CheckpointManager(
            self.folder,
            self.trainer.strategy,
            CheckpointSettings(keep=9, every_steps=every_steps, every_minutes=None),
            metadata={"precision": self.engine.precision},
            log=self._log,
            emit=self.events.append,
            **self._options,
        )
        with closing(manager):
            # Waiting after each step makes the number of checkpoints certain.
            self.trainer.fit(validate or self.validate, manager, after_step=manager.wait)

    def validate(self) -> SplitScores:
        """Score the training texts."""
        return evaluate_split(self.classifier, self.table, self.engine)

    def outcome(self) -> dict[str, Any]:
        """Return everything that a stop must not change."""
        weights = {name: value.detach().clone() for name, value in self.classifier.suffix.named_parameters()}
        best = self.trainer.best
        return {
            "weights": weights,
            "best weights": best.weights,
            "state": dict(self.trainer.strategy.gather_state()),
            "best": (best.epoch, best.name, best.scores.scores, best.scores.predictions_N.tolist()),
            "step": self.trainer.step,
            "tally": vars(self.trainer.totals.tally),
        }


def steps_of(run: Run) -> list[tuple[int, int, float, float]]:
    """Return what the log says of each step."""
    return [(event.step, event.epoch, event.loss, event.lr) for event in run.events if isinstance(event, StepDone)]


def same(one: Any, other: Any) -> bool:
    """Return whether two outcomes are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """Return a training without a stop."""
    run = Run(tmp_path_factory.mktemp("whole"))
    run.fit()
    return run


def stop(run: Run, at: int | str) -> None:
    """Train until the stop: after a step, or during the first validation."""

    def validate() -> SplitScores:
        raise Stopped

    with pytest.raises(Stopped):
        run.fit(validate if at == "validation" else None)
    assert run.preemption.is_exiting


@pytest.mark.parametrize("at", [2, "validation", 5])
def test_resumed_training_equals_an_uninterrupted_one(whole, tmp_path, at):
    first = Run(tmp_path, stop_at=at if isinstance(at, int) else None)
    stop(first, at)
    num_steps = first.trainer.step
    assert num_steps == (EPOCH_STEPS if at == "validation" else at + 1), "the vote acts after the step that carries it"
    checkpoint = read_checkpoint(list_checkpoints(first.folder)[0])
    assert checkpoint.path.name == f"step-{num_steps:08d}"
    second = Run(tmp_path, on_disk=OnDisk(checkpoint.path.name, num_steps, best_name(checkpoint.state)))
    second.load(checkpoint)
    assert second.trainer.step == num_steps
    assert second.timer.earlier_seconds == checkpoint.state["seconds"]
    second.fit()
    assert same(second.outcome(), whole.outcome())
    assert steps_of(first) + steps_of(second) == steps_of(whole)
    assert not same(second.outcome(), {**whole.outcome(), "step": 0}), "the comparison finds a difference"
    scored = [path.name for path in list_checkpoints(second.folder) if path.name.endswith("-scored")]
    assert scored == ["step-00000008-scored", "step-00000004-scored"]


def test_stop_again_at_the_resumed_checkpoint_keeps_it(tmp_path):
    first = Run(tmp_path)
    stop(first, "validation")
    checkpoint = read_checkpoint(list_checkpoints(first.folder)[0])
    second = Run(tmp_path, on_disk=OnDisk(checkpoint.path.name, EPOCH_STEPS, None))
    second.load(checkpoint)
    stop(second, "validation")
    assert [path.name for path in list_checkpoints(second.folder)] == [checkpoint.path.name]
    assert second.events == [], "nothing is computed or written twice"


def test_checkpoint_holds_the_state_in_a_fixed_order(tmp_path):
    run = Run(tmp_path)
    run.fit(every_steps=3)
    names = [path.name for path in list_checkpoints(run.folder)]
    assert names == [f"step-0000000{end}" for end in ("8-scored", "6", "4-scored", "3")]
    state = read_checkpoint(run.folder / "step-00000006").state
    assert list(state) == [
        *("precision", "position", "scored_step", "num_updates", "scaling", "totals", "seconds", "step", "log_bytes", "best")
    ]
    assert (state["position"]["epoch"], state["position"]["step"], state["num_updates"]) == (1, 2, 6)
    assert list(state["best"]) == ["name", "epoch", "step", "num_worse", "scores", "seconds"]
    assert list(state["totals"]) == ["seconds", "tally"]
    assert state["seconds"]["train"] == pytest.approx(state["totals"]["seconds"], abs=1e-3), "features are a part of it"
    assert state["seconds"]["prefix"] >= 0.5
    evaluations = [event for event in run.events if isinstance(event, EvalDone)]
    assert [(event.split, event.epoch) for event in evaluations] == [("validation", 1), ("validation", 2)]


def test_load_state_refuses_a_position_of_another_plan(whole, tmp_path):
    checkpoint = read_checkpoint(list_checkpoints(whole.folder)[0])
    run = Run(tmp_path, batch_size=8)
    before = [weight.detach().clone() for weight in run.classifier.suffix.parameters()]
    with pytest.raises(SharedError, match=r"belongs to another plan \(global_batch_size was 6, is 8\)"):
        run.load(checkpoint)
    assert run.trainer.step == 0
    assert same(dict(enumerate(before)), dict(enumerate(run.classifier.suffix.parameters())))


@pytest.mark.parametrize(("precision", "expected"), [("fp32", [(512.0, 7)]), ("fp16", [])])
def test_load_state_restores_the_loss_scale_of_the_same_precision_only(whole, tmp_path, monkeypatch, precision, expected):
    checkpoint = read_checkpoint(list_checkpoints(whole.folder)[0])
    checkpoint.state.update(precision=precision, scaling=[512.0, 7])
    run, loaded = Run(tmp_path), []
    monkeypatch.setattr(run.trainer.strategy, "load_scaling", lambda *scaling: loaded.append(scaling))
    run.load(checkpoint)
    assert loaded == expected


def test_load_state_adds_the_totals_of_earlier_attempts(whole, tmp_path):
    checkpoint = read_checkpoint(list_checkpoints(whole.folder)[0])
    run = Run(tmp_path)
    assert run.trainer.totals.seconds == 0.5, "the features were computed before the first step"
    run.load(checkpoint)
    assert run.trainer.totals.seconds == 0.5 + checkpoint.state["totals"]["seconds"]
    assert vars(run.trainer.totals.tally) == checkpoint.state["totals"]["tally"]
    before = run.timer.totals()
    run.fit()
    assert steps_of(run) == [], "the run was at its end"
    assert run.timer.totals()["setup"] == before["setup"] == checkpoint.state["seconds"]["setup"]


def test_step_with_a_stop_request_saves_before_it_raises(tmp_path):
    run = Run(tmp_path, stop_at=0)
    with pytest.raises(Stopped):
        run.fit()
    (path,) = list_checkpoints(run.folder)
    assert path.name == "step-00000001"
    assert read_checkpoint(path).state["best"] is None, "no epoch is scored yet"
