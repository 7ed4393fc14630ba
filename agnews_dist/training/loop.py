"""The training loop: from a run's position to its end, or to the step at which all ranks agree to stop.

The position is (epoch, steps done in it, steps done in all, steps done before the last evaluation). An evaluation that is due
comes before the next step, also after a restart. Besides the position only weights, their average, moments, the loss scale and
the best evaluation outlive a step. Learning rate, order of examples and random numbers are functions of seed and position.
"""

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agnews_dist.data.batching.loader import StepBatches, TrainLoader
from agnews_dist.data.batching.position import load_position, save_position
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import Stopped, count_noun
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Emit, NonFinite, StepDone, StoppedEarly, begin_phase
from agnews_dist.model.dropout import step_key
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.model.suffix import Standard
from agnews_dist.training.best_weights import BestWeights, RunningTotals
from agnews_dist.training.checkpoint import Groups
from agnews_dist.training.checkpoint_manager import CheckpointManager, load_weights
from agnews_dist.training.head_inputs import measure_standard
from agnews_dist.training.losses import StepSettings
from agnews_dist.training.optim import averaging_rate, build_optimizer, is_averaged, learning_rate, set_lr
from agnews_dist.training.step import NonFiniteError, StepResult, train_step
from agnews_dist.training.timing import StageTimer, TimedFeatures
from agnews_dist.training.trainer_settings import TrainerSettings


@dataclass(frozen=True)
class Monitors:
    """Objects that watch a run: who receives its events, where its time goes, whether it must stop."""

    emit: Emit
    timer: StageTimer
    preemption: PreemptionHandler


class Trainer:
    """One run's training. Every rank has one."""

    def __init__(
        self, classifier: Classifier, engine: Engine, loader: TrainLoader, settings: TrainerSettings, monitors: Monitors
    ) -> None:
        """Hand the trainable part to the engine. Collective."""
        self._classifier, self._engine, self._loader, self._settings = classifier, engine, loader, settings
        self._emit, self._timer, self._preemption = monitors.emit, monitors.timer, monitors.preemption
        self._optimizer = build_optimizer(
            classifier.suffix, lr=settings.lr, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
        )
        self.strategy: Strategy = engine.prepare(classifier.suffix, self._optimizer, max_grad_norm=settings.max_grad_norm)
        self.class_names = settings.class_names
        class_weights_C = None if loader.class_weights_C is None else torch.from_numpy(loader.class_weights_C).to(engine.device)
        self._step_settings = StepSettings(
            label_smoothing=settings.label_smoothing,
            class_weights_C=class_weights_C,
            r_drop=settings.r_drop,
            nonfinite=settings.nonfinite,
        )
        self.num_steps = loader.num_steps(settings.epochs, settings.max_steps)
        """Steps of the whole run, unless it stops early."""
        self._epoch, self._epoch_step = 0, 0
        self.step = 0
        """Steps done so far, in all epochs."""
        self._scored_step = 0
        """Steps done before the last evaluation; 0: there was none."""
        self._checked_step = -1
        """Steps done before the last comparison of the ranks' weights."""
        self.best, self.totals = BestWeights(self.strategy, settings.best_metric), RunningTotals()
        self._features: TimedFeatures | None = None

    def use_features(self, source: FeatureSource, extend: Callable[[], object] = lambda: None) -> None:
        """Train on the features of `source`. The time that computing them took so far counts as training.

        `extend`: called when blocks have been frozen; from then on `source` returns their output. Collective.
        """
        self._features, self._extend = TimedFeatures(source), extend
        self._seconds_before = self._timer.seconds["prefix"]
        self.totals.seconds += self._seconds_before

    def use_soft_targets(self, targets_NC: Tensor) -> None:
        """Train on the probabilities `targets_NC`, row by row of the training split, in place of the labels."""
        self._step_settings = replace(self._step_settings, targets_NC=targets_NC.to(self._engine.device))

    def load_state(self, state: Mapping[str, Any], tensors: Groups, best_tensors: Groups) -> None:
        """Resume from a checkpoint: position, totals, loss scale, weights, moments and best weights. Collective.

        `state`: the JSON part, equal on every rank. The tensors are read on rank 0 alone.
        """
        outcome = collectives.catch(lambda: load_position(state["position"], self._loader.fingerprint))
        self._epoch, self._epoch_step = collectives.raise_if_any_failed(outcome)
        self.step = state["step"]
        # Checkpoints of before were evaluated exactly where an epoch began.
        self._scored_step = state.get("scored_step", 0 if self._epoch_step else self.step)
        self.totals.load_state_dict(state["totals"])
        self._timer.earlier_seconds = dict(state["seconds"])
        if self._engine.precision == state["precision"]:
            self.strategy.load_scaling(*state["scaling"])
        # Other settings may have been accepted: an average that begins later begins from nothing.
        num_averaged = state.get("num_averaged", 0) if self._is_averaged else 0
        load_weights(self.strategy, tensors, state["num_updates"], num_averaged)
        if (standard := state.get("standard")) is not None:
            self._classifier.suffix.standard = Standard(*(torch.tensor(each, device=self._engine.device) for each in standard))
        if state["best"] is not None:
            scores: dict[str, Tensor] = collectives.all_gather(dict(best_tensors.get("scored", {})))[0]
            self.best.load_state_dict(state["best"], scores, dict(best_tensors.get("weights", {})))

    def fit(
        self,
        validate: Callable[[], SplitScores],
        checkpoints: CheckpointManager,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        """Train to the end. `validate` scores the validation split. Collective.

        Raises:
            Stopped: all ranks agreed to stop, and a checkpoint was saved.
            NonFiniteError: see `train_step`.
            SharedError: the ranks' weights differ. They are neither scored nor saved.
        """
        try:
            for _ in self.iterate(validate, checkpoints):
                after_step()
            checkpoints.wait()
            if self._has_stopped_early:
                counts = {"step": self.step, "num_worse": self.best.num_worse, "best_step": self.best.step}
                self._emit(StoppedEarly(epoch=self._epoch + 1, metric=self._settings.best_metric, **counts))
        except Stopped:
            self._preemption.begin_exit()
            self._save(checkpoints, wait=True)
            raise

    def iterate(self, validate: Callable[[], SplitScores], checkpoints: CheckpointManager | None = None) -> Generator[None]:
        """Train to the end, and pause after every step, with its evaluation and checkpoint. Arguments and errors: see `fit`."""
        self._standardise()
        if self._is_evaluation_due:
            self._evaluate(validate)
            self._save(checkpoints)
        if not self.is_done:
            self._emit(begin_phase("first step"))
        while not self.is_done:
            if not self._is_epoch_end:
                self._freeze()
            for batches in self._loader.steps(self._epoch, self._epoch_step):
                result = self._train_step(batches, checkpoints)
                if result.stop:
                    raise Stopped
                if self._is_evaluation_due:
                    self._evaluate(validate)
                if result.save or self._is_epoch_end or self.is_done:
                    self._save(checkpoints)
                yield
                if self.is_done:
                    break
            else:
                self._epoch, self._epoch_step = self._epoch + 1, 0

    @property
    def is_done(self) -> bool:
        """True if the last evaluation was the end of the training: all steps are done, or nothing improves any more."""
        return self._scored_step == self.step > 0 and (self.step >= self.num_steps or self._has_stopped_early)

    @property
    def end_reason(self) -> str:
        """The reason for the end of the training, for `status.json`."""
        if self._has_stopped_early:
            evaluations = count_noun(self.best.num_worse, "evaluation")
            return f"it stopped early: {evaluations} without a better {self._settings.best_metric}"
        return "it has trained all its epochs" if self._settings.max_steps is None else "it has trained all its steps"

    @property
    def _has_stopped_early(self) -> bool:
        patience = self._settings.patience
        return patience is not None and self.best.num_worse >= patience and self.step < self.num_steps

    @property
    def _is_epoch_end(self) -> bool:
        return self._epoch_step == self._loader.epoch_steps(self._epoch)

    @property
    def _is_evaluation_due(self) -> bool:
        every = self._settings.evaluate_every
        is_due = self.step >= self.num_steps or (self._is_epoch_end if every == "epoch" else self.step % every == 0)
        return is_due and self._scored_step != self.step

    @property
    def _is_averaged(self) -> bool:
        """True if the weights after the last step belong to the average."""
        settings = self._settings
        return is_averaged(self.step, num_steps=self.num_steps, average=settings.average, start=settings.average_start)

    def restore_best(self) -> None:
        """Load the best weights, for a suffix that runs all its blocks again. Collective."""
        self.best.restore()
        self._classifier.suffix.num_frozen = 0

    def _freeze(self) -> None:
        """Freeze the blocks that this epoch does not train, and extend the features by them. Collective."""
        suffix, schedule = self._classifier.suffix, self._settings.freeze_schedule
        num_frozen = 0 if schedule is None else len(suffix.h) - schedule[min(self._epoch, len(schedule) - 1)]
        if num_frozen == suffix.num_frozen:
            return
        begin = time.perf_counter()
        self._emit(begin_phase(f"freeze {count_noun(num_frozen - suffix.num_frozen, 'block')}"))
        self._engine.freeze(self.strategy, suffix.freeze(num_frozen))
        self._extend()
        self._seconds_before += (seconds := time.perf_counter() - begin)
        self.totals.seconds += seconds

    def _standardise(self) -> None:
        """Measure the inputs of `out_head`, unless the checkpoint had the measures. Collective."""
        suffix, loader = self._classifier.suffix, self._loader
        if self._settings.standardize and suffix.standard is None:
            assert self._features is not None, "use_features comes first"
            begin = time.perf_counter()
            suffix.standard = measure_standard(suffix, loader.table, self._features, self._engine, loader.owner_N)
            self.totals.seconds += time.perf_counter() - begin

    def _train_step(self, batches: StepBatches, checkpoints: CheckpointManager | None) -> StepResult:
        begin = time.perf_counter()
        settings, world = self._settings, self._engine.world
        lr = learning_rate(
            self.step,
            num_steps=self.num_steps,
            peak=settings.lr,
            warmup_ratio=settings.warmup_ratio,
            schedule=settings.schedule,
        )
        set_lr(self._optimizer, lr)
        key = step_key(settings.seed, self.step)
        # Blocks below the last one, and the plain path, draw dropout from torch: seed it per step and rank.
        self._engine.set_random_state(step_key(key, world.rank) % 2**63)
        self._classifier.suffix.train()
        assert self._features is not None, "use_features comes first"
        try:
            result = train_step(
                self._engine,
                self._features,
                self.strategy,
                batches,
                dropout_key=key,
                settings=self._step_settings,
                stop=self._preemption.is_stopping,
                save=checkpoints is not None and checkpoints.is_due(self.step + 1),
            )
        except NonFiniteError as error:
            self._emit(NonFinite(step=self.step + 1, epoch=self._epoch + 1, ids=error.ids))
            raise
        self.step += 1
        self._epoch_step += 1
        if self._is_averaged:
            count = self.strategy.num_averaged
            self.strategy.average(averaging_rate(count, average=settings.average, ema_decay=settings.ema_decay))
        seconds = time.perf_counter() - begin
        self.totals.add(batches.share, seconds)
        self._emit(
            StepDone(
                step=self.step,
                epoch=self._epoch + 1,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                num_examples=batches.num_examples,
                num_tokens=batches.share.num_real_tokens,
                seconds=seconds,
            )
        )
        if result.bad_ids:
            self._emit(NonFinite(step=self.step, epoch=self._epoch + 1, ids=result.bad_ids))
        return result

    def _check_replicas(self) -> None:
        """Compare the weights over ranks, once after each step. Collective."""
        if self._checked_step != self.step:
            self.strategy.check_replicas(self.step)
            self._checked_step = self.step

    def _evaluate(self, validate: Callable[[], SplitScores]) -> None:
        """Score the validation split, report the scores, and keep the weights if they are the best. Collective."""
        self._check_replicas()
        # All blocks run, as they do in the exported model.
        with self.strategy.averaged(), self._classifier.suffix.whole():
            epoch, validation = self._epoch + 1, validate()
        self.best.update(epoch, validation, step=self.step)
        is_best = self.best.step == self.step
        self._emit(validation.to_event("validation", epoch, self.class_names, step=self.step, is_best=is_best))
        self._scored_step = self.step

    def _save(self, checkpoints: CheckpointManager | None, *, wait: bool = False) -> None:
        if checkpoints is None:
            return
        assert self._features is not None
        self._check_replicas()
        # `prefix` is part of `train`.
        self._timer.seconds["train"] = self.totals.seconds - self._timer.earlier_seconds["train"]
        self._timer.seconds["prefix"] = self._seconds_before + self._features.seconds()
        state = {
            "position": save_position(self._epoch, self._epoch_step, self._loader.fingerprint),
            "scored_step": self._scored_step,
            "num_updates": self.strategy.num_updates,
            "num_averaged": self.strategy.num_averaged,
            "scaling": self.strategy.scaling,
            "totals": self.totals.state_dict(),
            "seconds": self._timer.totals(),
        }
        if (standard := self._classifier.suffix.standard) is not None:
            state["standard"] = [each.tolist() for each in standard]
        checkpoints.save(self.step, state, self.best, is_scored=self._scored_step == self.step, wait=wait)
