"""The training loop: from where a run stands to its end, epoch after epoch, or to where all ranks agree to stop.

A run's position is (epoch, steps done in it, steps done in all); with all of an epoch's steps done, its evaluation is what
comes next. Nothing else outlives a step but weights, moments and loss scale: the learning rate, the order of the examples and
all random numbers are functions of the seed and the position.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from agnews_dist.config.schema import Config
from agnews_dist.data.batching.loader import StepBatches, TrainLoader
from agnews_dist.data.batching.position import load_position, save_position
from agnews_dist.data.batching.shares import Tally
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import Stopped
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Emit, NonFinite, StepDone
from agnews_dist.model.dropout import step_key
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.training.best_epoch import BestEpoch, RunningTotals
from agnews_dist.training.checkpoint_manager import CheckpointManager
from agnews_dist.training.optim import learning_rate, set_lr
from agnews_dist.training.step import NonFiniteError, StepResult, train_step
from agnews_dist.training.timing import StageTimer, TimedFeatures


class Trainer:
    """One run's training; every rank has one."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        classifier: Classifier,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        loader: TrainLoader,
        embed: TimedFeatures,
        *,
        about: Mapping[str, Any],
        built_seconds: float,
        num_steps: int,
        timer: StageTimer,
        preemption: PreemptionHandler,
        emit: Emit,
    ) -> None:
        """`about`: what every checkpoint says beside the position; `built_seconds`: what the features took before."""
        self._config, self._engine, self._classifier = config, engine, classifier
        self._strategy, self._optimizer, self._loader, self._embed = strategy, optimizer, loader, embed
        self._about, self._built_seconds, self._num_steps = about, built_seconds, num_steps
        self._timer, self._preemption, self._emit = timer, preemption, emit
        self._epoch, self._done = 0, 0
        self.step = 0
        """Steps done in all."""
        self.best, self.totals = BestEpoch(strategy), RunningTotals(built_seconds)

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Take over the position and what belongs to it; weights, moments and the best epoch are loaded elsewhere.

        Raises:
            UserError: the position belongs to another plan.
        """
        self._epoch, self._done = load_position(state["position"], self._loader.fingerprint)
        self.step = state["step"]
        totals = state["totals"]
        self.totals.seconds += totals["seconds"]
        self.totals.tally = Tally(**totals["tally"])
        self._timer.before = dict(state["seconds"])
        if self._engine.precision == state["precision"]:
            self._strategy.load_scaling(*state["scaling"])

    def run(
        self, score: Callable[[str], SplitScores], saver: CheckpointManager, after_step: Callable[[], None]
    ) -> None:
        """Train to the end; `score` evaluates a split, `after_step` is called after every step.

        Raises:
            Stopped: all ranks have agreed to stop, and a checkpoint was saved.
            NonFiniteError: see `train_step`.
        """
        try:
            while self._epoch < self._config.optim.epochs:
                for batches in self._loader.steps(self._epoch, self._done):
                    result = self._step(batches, saver)
                    after_step()
                    if result.stop:
                        raise Stopped
                    if result.save:
                        self._save(saver)
                self._evaluate(score)
                self._save(saver, is_scored=True)
        except Stopped:
            self._preemption.leaving()
            self._save(saver, wait=True)
            raise

    def _step(self, batches: StepBatches, saver: CheckpointManager) -> StepResult:
        begin = time.perf_counter()
        optim, world = self._config.optim, self._engine.world
        lr = learning_rate(
            self.step,
            num_steps=self._num_steps,
            peak=optim.lr,
            warmup_ratio=optim.warmup_ratio,
            schedule=optim.schedule,
        )
        set_lr(self._optimizer, lr)
        key = step_key(self._config.run.seed, self.step)
        # For the blocks below the last one, and the plain path: they draw from torch. Each rank its own, none from before.
        torch.manual_seed(step_key(key, world.rank) % 2**63)
        self._classifier.suffix.train()
        try:
            result = train_step(
                self._engine,
                self._embed,
                self._strategy,
                batches,
                dropout_key=key,
                nonfinite=optim.nonfinite,
                stop=self._preemption.is_stopping,
                save=saver.due(self.step + 1),
            )
        except NonFiniteError as error:
            self._emit(NonFinite(step=self.step + 1, epoch=self._epoch + 1, ids=error.ids))
            raise
        self.step += 1
        self._done += 1
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

    def _evaluate(self, score: Callable[[str], SplitScores]) -> None:
        validation = score("validation")
        self._emit(validation.event("validation", self._epoch + 1, self._about["class_names"]))
        self.best.offer(self._epoch + 1, validation, step=self.step)
        self._epoch, self._done = self._epoch + 1, 0

    def _save(self, saver: CheckpointManager, *, is_scored: bool = False, wait: bool = False) -> None:
        self._time()
        position = save_position(self._epoch, self._done, self._loader.fingerprint)
        tally = self.totals.tally
        state = {
            **self._about,
            "position": position,
            "num_updates": self._strategy.num_updates,
            "scaling": self._strategy.scaling,
            "totals": {"seconds": self.totals.seconds, "tally": vars(tally)},
            "seconds": self._timer.stop(),
        }
        saver.save(self.step, state, self.best, is_scored=is_scored, wait=wait)

    def _time(self) -> None:
        """Bring the clock up to date; `prefix` is a part of `train`."""
        self._timer.seconds["train"] = self.totals.seconds - self._timer.before["train"]
        self._timer.seconds["prefix"] = self._built_seconds + self._embed.seconds()
