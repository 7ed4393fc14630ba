"""The training loop: stopped and resumed anywhere, it ends with the same bits as without a stop."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.events import recorder
from support.toy import toy_classifier, toy_split
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import SharedError, Stopped
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
from agnews_dist.events import EvalDone, Event, StepDone, StoppedEarly
from agnews_dist.features.extension import GrowingFeatures
from agnews_dist.model.prefix import uncached_features
from agnews_dist.report.event_log import EventLog
from agnews_dist.training.checkpoint import Checkpoint, best_name, list_checkpoints, read_checkpoint
from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings, OnDisk
from agnews_dist.training.loop import Monitors, Trainer
from agnews_dist.training.timing import StageTimer
from agnews_dist.training.trainer_settings import TrainerSettings

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


class WaitingManager(CheckpointManager):
    """A manager that misses no checkpoint: each is on disk before training continues."""

    def save(self, *arguments: Any, **options: Any) -> None:
        """Save and wait."""
        super().save(*arguments, **{**options, "wait": True})


class Run:
    """One start of a small training."""

    def __init__(
        self,
        directory: Path,
        *,
        stop_at: int | None = None,
        batch_size: int = 6,
        changes: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        class_weights_C: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        self.classifier, self.events = toy_classifier(dropout=0.2, **model or {}), list[Event]()
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
        monitors = Monitors(recorder(self.events), self.timer, self.preemption)
        self.trainer = Trainer(self.classifier, self.engine, loader, settings, monitors)
        self.timer.seconds["prefix"] = 0.5
        features = GrowingFeatures(self.classifier, uncached_features(self.classifier.prefix))
        self.trainer.use_features(features, features.extend)
        self._log, self._options = EventLog(directory / "events.jsonl"), options
        self.after_step: Callable[[], object] = lambda: None

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint."""
        name = best_name(checkpoint.state)
        best = read_checkpoint(checkpoint.path.with_name(name)).tensors if name else {}
        self.trainer.load_state(checkpoint.state, checkpoint.tensors, best)

    def fit(self, validate: Callable[[], SplitScores] | None = None, *, every_steps: int | None = None) -> None:
        """Train to the end, or to the step before which a stop is requested."""
        manager = WaitingManager(
            lambda: self.folder,
            self.trainer.strategy,
            CheckpointSettings(keep=9, every_steps=every_steps, every_minutes=None),
            metadata={"precision": self.engine.precision},
            log=self._log,
            emit=recorder(self.events),
            **self._options,
        )
        with closing(manager):
            self.trainer.fit(validate or self.validate, manager, self.after_step)

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


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"trainable_blocks": "all", "train_embeddings": True}, {}),
        ({"pooling": "mean"}, {}),
        ({"trainable_blocks": 0}, {"standardize": True}),
    ],
    ids=["embeddings", "mean", "standardised"],
)
def test_resumed_recipe_equals_an_uninterrupted_one(tmp_path, model, changes):
    of_whole = Run(tmp_path / "whole", model=model, changes=changes)
    of_whole.fit()
    first = Run(tmp_path, stop_at=2, model=model, changes=changes)
    stop(first, 2)
    second = resume(tmp_path, model=model, changes=changes)
    second.fit()
    assert same(second.outcome(), of_whole.outcome())
    assert steps_of(first) + steps_of(second) == steps_of(of_whole)


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
        *("precision", "position", "scored_step", "num_updates", "num_averaged", "scaling", "totals", "seconds", "step"),
        *("log_bytes", "best"),
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


EVERY_3 = {"evaluate_every": 3, "epochs": 3, "best_metric": "loss", "label_smoothing": 0.1, "average": "ema"}
"""Twelve steps, with evaluations after 3, 6, 9 and 12, none of which ends an epoch but the last. Averages from step 7 on."""
WEIGHTS_C = np.array([0.3, 1.0, 7.0, 2.1])


def evaluations(*runs: Run) -> list[tuple[int, int, float]]:
    """Return epoch, step and loss of every evaluation."""
    return [(event.epoch, event.step, event.scores.loss) for run in runs for event in run.events if isinstance(event, EvalDone)]


def resume(directory: Path, **options: Any) -> Run:
    """Start again from the newest checkpoint."""
    checkpoint = read_checkpoint(list_checkpoints(directory / "checkpoints")[0])
    on_disk = OnDisk(checkpoint.path.name, checkpoint.state["step"], best_name(checkpoint.state))
    run = Run(directory, on_disk=on_disk, **options)
    run.load(checkpoint)
    return run


@pytest.fixture(scope="module")
def whole_by_steps(tmp_path_factory) -> Run:
    """Return a training without a stop, with evaluations inside the epochs."""
    run = Run(tmp_path_factory.mktemp("steps"), changes=EVERY_3, class_weights_C=WEIGHTS_C)
    run.fit()
    return run


def test_evaluations_count_their_steps_over_the_whole_run(whole_by_steps):
    assert [found[:2] for found in evaluations(whole_by_steps)] == [(1, 3), (2, 6), (3, 9), (3, 12)]
    names = [path.name for path in list_checkpoints(whole_by_steps.folder)]
    assert names == ["step-00000012-scored", "step-00000008", "step-00000004"], "the ends of the epochs are saved"
    losses = {step: loss for _, step, loss in evaluations(whole_by_steps)}
    assert whole_by_steps.trainer.best.step == min(losses, key=lambda step: losses[step])


@pytest.mark.parametrize(
    ("at", "every_steps"), [(2, None), ("validation", None), (3, None), (7, None), (2, 1), ("validation", 1)]
)
def test_resumed_training_evaluates_inside_an_epoch_exactly_once(whole_by_steps, tmp_path, at, every_steps):
    first = Run(tmp_path, stop_at=at if isinstance(at, int) else None, changes=EVERY_3, class_weights_C=WEIGHTS_C)

    def validate() -> SplitScores:
        if at == "validation":
            raise Stopped
        return first.validate()

    with pytest.raises(Stopped):
        first.fit(validate, every_steps=every_steps)
    second = resume(tmp_path, changes=EVERY_3, class_weights_C=WEIGHTS_C)
    second.fit()
    assert same(second.outcome(), whole_by_steps.outcome())
    assert steps_of(first) + steps_of(second) == steps_of(whole_by_steps)
    assert evaluations(first, second) == evaluations(whole_by_steps)


def test_every_checkpoint_continues_with_the_same_bits(whole_by_steps, tmp_path):
    """Resume as after a kill: from each checkpoint of a run that saved after every step."""
    saved = Run(tmp_path / "saved", changes=EVERY_3, class_weights_C=WEIGHTS_C)
    saved.fit(every_steps=1)
    paths = list_checkpoints(saved.folder)
    assert [path.name[5:] for path in paths[:4]] == ["00000012-scored", "00000011", "00000010", "00000009-scored"]
    assert len(paths) == 9
    for path in paths:
        run = Run(tmp_path / path.name, changes=EVERY_3, class_weights_C=WEIGHTS_C)
        run.load(read_checkpoint(path))
        run.fit()
        assert same(run.outcome(), whole_by_steps.outcome()), path.name
        step = int(path.name[5:13])
        assert [found[1] for found in evaluations(run)] == [each for each in (6, 9, 12) if each > step]


def test_class_weights_change_the_training_and_not_the_evaluation(tmp_path):
    plain, weighted = (
        Run(tmp_path / name, changes={"epochs": 1, "max_steps": 1}, class_weights_C=weights_C)
        for name, weights_C in (("plain", None), ("weighted", WEIGHTS_C))
    )
    assert plain.validate().scores == weighted.validate().scores
    plain.fit()
    weighted.fit()
    assert steps_of(plain)[0][2] != steps_of(weighted)[0][2]
    assert plain.validate().scores != weighted.validate().scores


@pytest.mark.parametrize(("max_steps", "epochs"), [(3, [1]), (4, [1]), (11, [1, 2, 3])])
def test_max_steps_replace_the_epochs_and_the_schedule(tmp_path, max_steps, epochs):
    run = Run(tmp_path, changes={"max_steps": max_steps, "warmup_ratio": 0.0})
    assert run.trainer.num_steps == max_steps
    run.fit()
    steps = steps_of(run)
    assert [step for step, *_ in steps] == list(range(1, max_steps + 1))
    assert steps[-1][3] == pytest.approx(1e-2 / max_steps), "the decay ends with the run"
    ends = [end for end in (4, 8) if end < max_steps]
    assert [found[:2] for found in evaluations(run)] == list(zip(epochs, [*ends, max_steps], strict=True))
    assert run.trainer.end_reason == "it has trained all its steps"


def test_more_max_steps_continue_inside_the_cut_epoch(tmp_path):
    Run(tmp_path, changes={"max_steps": 3}).fit()
    longer = resume(tmp_path, changes={"max_steps": 9})
    longer.fit()
    assert [found[:2] for found in steps_of(longer)] == [(4, 1), (5, 2), (6, 2), (7, 2), (8, 2), (9, 3)]
    assert longer.trainer.totals.tally.real == sum(LENGTHS) * 2 + steps_tokens(longer, after=8), "every example, twice"


def steps_tokens(run: Run, *, after: int) -> int:
    """Return the tokens of the steps after the first `after`."""
    return sum(event.num_tokens for event in run.events if isinstance(event, StepDone) and event.step > after)


def test_fewer_steps_than_are_done_end_with_an_evaluation(tmp_path):
    with pytest.raises(Stopped):
        Run(tmp_path, stop_at=5).fit()
    run = resume(tmp_path, changes={"max_steps": 5})
    run.fit()
    assert steps_of(run) == []
    assert [found[:2] for found in evaluations(run)] == [(2, 6)]


STOPPING = {"evaluate_every": 1, "epochs": 5, "patience": 3}


def worsening(run: Run, best_at: int) -> Callable[[], SplitScores]:
    """Return a validation that is best after step `best_at`."""

    def validate() -> SplitScores:
        found = run.validate()
        distance = abs(run.trainer.step - best_at)
        return replace(found, scores=replace(found.scores, num_correct=24 - distance))

    return validate


@pytest.mark.parametrize("stop_at", [None, 4, 5, 6])
def test_training_stops_after_as_many_worse_evaluations_in_all_attempts(tmp_path, stop_at):
    runs = [Run(tmp_path, stop_at=stop_at, changes=STOPPING)]
    if stop_at is not None:
        with pytest.raises(Stopped):
            runs[0].fit(worsening(runs[0], 4))
        runs.append(resume(tmp_path, changes=STOPPING))
    runs[-1].fit(worsening(runs[-1], 4))
    assert [step for _, step, _ in evaluations(*runs)] == [1, 2, 3, 4, 5, 6, 7]
    trainer = runs[-1].trainer
    assert (trainer.step, trainer.best.step, trainer.best.num_worse) == (7, 4, 3)
    assert trainer.end_reason == "it stopped early: 3 evaluations without a better accuracy"
    stops = [event for run in runs for event in run.events if isinstance(event, StoppedEarly)]
    assert stops == [StoppedEarly(step=7, epoch=2, num_worse=3, metric="accuracy", best_step=4)]
    assert list_checkpoints(runs[-1].folder)[0].name == "step-00000007-scored"


def test_start_after_an_early_stop_trains_no_further_and_a_larger_patience_does(tmp_path):
    first = Run(tmp_path, changes=STOPPING)
    first.fit(worsening(first, 4))
    again = resume(tmp_path, changes={**STOPPING, "epochs": 9})
    again.fit(worsening(again, 4))
    assert [event.is_best for event in first.events if isinstance(event, EvalDone)] == [True] * 4 + [False] * 3
    assert (steps_of(again), again.trainer.step) == ([], 7)
    assert [type(event) for event in again.events] == [StoppedEarly]
    patient = resume(tmp_path, changes={**STOPPING, "patience": 5})
    patient.fit(worsening(patient, 4))
    assert [step for step, *_ in steps_of(patient)] == [8, 9]
    assert patient.trainer.best.num_worse == 5


def test_patience_that_ends_with_the_last_step_is_not_an_early_stop(tmp_path):
    run = Run(tmp_path, changes={"evaluate_every": 1, "epochs": 1, "patience": 3})
    run.fit(worsening(run, 1))
    assert (run.trainer.step, run.trainer.best.num_worse) == (4, 3)
    assert run.trainer.end_reason == "it has trained all its epochs"
    assert not any(isinstance(event, StoppedEarly) for event in run.events)


@pytest.mark.parametrize(("name", "pending"), [("step-00000004-scored", []), ("step-00000004", [(1, 4)])])
def test_checkpoint_of_before_says_by_its_position_whether_it_is_scored(whole, tmp_path, name, pending):
    checkpoint = read_checkpoint(whole.folder / "step-00000004-scored")
    del checkpoint.state["scored_step"]
    # An earlier version moved to the next epoch after the evaluation.
    checkpoint.state["position"].update({"epoch": 1, "step": 0} if name.endswith("scored") else {"epoch": 0, "step": 4})
    run = Run(tmp_path)
    run.load(checkpoint)
    run.fit()
    assert [found[:2] for found in evaluations(run)] == [*pending, (2, 8)]
    assert steps_of(run) == steps_of(whole)[4:]


def moving_average(averages: Sequence[Tensor], currents: Sequence[Tensor], num_averaged: Tensor) -> None:
    """Update averages as `optim.ema_decay` 0.99 describes, for torch's AveragedModel."""
    decay = min(0.99, (1 + float(num_averaged)) / (10 + float(num_averaged)))
    for average, current in zip(averages, currents, strict=True):
        average.mul_(decay).add_(current, alpha=1 - decay)


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"average": "swa"}, get_swa_multi_avg_fn()),
        ({"average": "ema", "ema_decay": 0.1}, get_ema_multi_avg_fn(0.1)),
        ({"average": "ema"}, moving_average),
    ],
)
def test_averages_are_torchs_and_leave_the_training_alone(whole, tmp_path, changes, reference):
    run = Run(tmp_path, changes={**changes, "average_start": 0.3, "best_metric": "loss"})
    expected = AveragedModel(run.classifier.suffix, multi_avg_fn=reference)

    def after_step() -> None:
        if run.trainer.step > 2:  # 0.3 x 8 steps
            expected.update_parameters(run.classifier.suffix)

    run.after_step = after_step
    run.fit()
    assert steps_of(run) == steps_of(whole), "training continues with the weights"
    assert run.trainer.strategy.num_averaged == expected.n_averaged == 6
    averages, weights = dict(expected.module.named_parameters()), dict(run.classifier.suffix.named_parameters())
    assert all(not torch.equal(averages[name], weight) for name, weight in weights.items() if not name.endswith("c_attn.bias"))
    found = run.trainer.strategy.gather_weights()
    for name, value in averages.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(weight, whole.outcome()["weights"][name]) for name, weight in weights.items())
    # The last evaluation scored the average, and the best weights are those of an evaluation.
    run.classifier.suffix.load_state_dict(found)
    assert run.validate().scores.loss == evaluations(run)[-1][2] != evaluations(whole)[-1][2]
    assert run.trainer.best.step == 8
    assert same(run.trainer.best.weights, found)


def test_average_follows_settings_that_were_accepted(tmp_path):
    averaged = {"average": "swa", "average_start": 0.0}
    with pytest.raises(Stopped):
        Run(tmp_path, stop_at=4, changes=averaged).fit()
    assert read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0]).tensors.keys() == {"weights", "moments", "averages"}
    counts = {
        name: resume(tmp_path, changes=changes).trainer.strategy.num_averaged
        for name, changes in {"same": averaged, "none": {}, "later": {**averaged, "average_start": 0.9}}.items()
    }
    assert counts == {"same": 5, "none": 0, "later": 0}


def test_checkpoint_of_before_can_be_averaged(tmp_path):
    with pytest.raises(Stopped):
        Run(tmp_path, stop_at=5).fit()
    checkpoint = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0])
    assert checkpoint.tensors.keys() == {"weights", "moments"}
    del checkpoint.state["num_averaged"]
    run = Run(tmp_path, changes={"average": "swa"})
    run.load(checkpoint)
    run.fit()
    assert (run.trainer.step, run.trainer.strategy.num_averaged) == (8, 2)


FREEZING = {"freeze_schedule": (3, 2, 0), "epochs": 4, "average": "ema", "average_start": 0.1, "layer_decay": 0.8}
"""Sixteen steps, of which epochs 3 and 4 train the final norm and the head. Averages from step 2 on."""


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_resumed_freezing_equals_an_uninterrupted_one(tmp_path, pooling):
    options: dict[str, Any] = {"model": {"trainable_blocks": 3, "pooling": pooling}, "changes": FREEZING}
    whole = Run(tmp_path / "whole", **options)
    whole.fit()
    for at in (2, 3, 9):
        stop(Run(tmp_path / str(at), stop_at=at, **options), at)
        second = resume(tmp_path / str(at), **options)
        second.fit()
        assert same(second.outcome(), whole.outcome()), at
        assert evaluations(second) == evaluations(whole)[-len(evaluations(second)) :]


def test_frozen_blocks_keep_their_weights_and_lose_moments_and_average(tmp_path):
    run, seen = Run(tmp_path, model={"trainable_blocks": 3}, changes=FREEZING), list[dict[str, Tensor]]()
    run.after_step = lambda: seen.append({name: w.detach().clone() for name, w in run.classifier.suffix.named_parameters()})
    run.fit()
    for block, last_step in ((0, EPOCH_STEPS), (1, 2 * EPOCH_STEPS), (2, 2 * EPOCH_STEPS)):
        name = f"h.{block}.mlp.c_fc.weight"
        assert [torch.equal(seen[step][name], seen[-1][name]) for step in range(last_step - 2, 16)] == [
            False,
            *[True] * (17 - last_step),
        ]
        state = dict(run.trainer.strategy.gather_state())
        assert not state[f"exp_avg.{name}"].any()
        assert torch.equal(state[f"average.{name}"], seen[-1][name])
    assert not torch.equal(state["average.out_head.weight"], seen[-1]["out_head.weight"])
    assert state["exp_avg.out_head.weight"].any()


def test_best_weights_from_before_a_freezing_run_through_the_whole_suffix(tmp_path):
    run = Run(tmp_path, model={"trainable_blocks": 3}, changes={"freeze_schedule": (3, 1)})
    scored = list[SplitScores]()

    def validate() -> SplitScores:
        scored.append(run.validate())
        assert scored[-1].scores is not None
        return scored[0] if len(scored) == 1 else replace(scored[-1], scores=replace(scored[-1].scores, num_correct=-1))

    run.fit(validate)
    assert run.trainer.best.epoch == 1
    with run.classifier.suffix.whole():
        assert run.validate().scores == scored[1].scores, "every evaluation runs all blocks"
    run.trainer.restore_best()
    assert run.validate().scores == scored[0].scores
    assert scored[1].scores != scored[0].scores
