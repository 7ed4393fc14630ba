"""The training of sweep members on one rank: each as `train` would do it alone, and several on the same batches."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from agnews_dist.config.schema import Config
from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import StepBatches, TrainLoader
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
from agnews_dist.events import ignore_event
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.members import Member
from agnews_dist.experiments.standings import MemberResult, State
from agnews_dist.features.extension import GrowingFeatures
from agnews_dist.model.gpt2 import Classifier, copy_untrained, set_dropout
from agnews_dist.model.prefix import Features, FeatureSource
from agnews_dist.model.suffix import Standard
from agnews_dist.run import setup
from agnews_dist.run.fingerprints import setting_values
from agnews_dist.training.loop import Monitors, Trainer
from agnews_dist.training.step import NonFiniteError


class SharedLoader(TrainLoader):
    """Loader that reads the batches of a step once for all members that are at it, and their features too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.source: FeatureSource | None = None
        """Source of the features; set it before training."""
        self._reading: Iterator[StepBatches] = iter(())
        self._position = (-1, -1)
        """(epoch, step in it) of the newest batches."""
        self._newest: StepBatches | None = None
        self._features: dict[int, Features] = {}
        """Features of its micro-batches, by their places."""

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatches]:
        """Yield the steps of the epoch from `start`."""
        for step in range(start, self.epoch_steps(epoch)):
            yield self._read(epoch, step)

    def features(self, batch: Batch) -> Features:
        """Return the features of a micro-batch of the newest step."""
        assert self.source is not None
        newest = self._newest.micro_batches if self._newest is not None else ()
        place = next((i for i, each in enumerate(newest) if each is batch), None)
        if place is None:
            return self.source(batch)
        if place not in self._features:
            self._features[place] = self.source(batch)
        return self._features[place]

    def _read(self, epoch: int, step: int) -> StepBatches:
        if self._position != (epoch, step) or self._newest is None:
            if self._position != (epoch, step - 1):
                self._reading = super().steps(epoch, step)
            self._newest, self._position = next(self._reading), (epoch, step)
            self._features.clear()
        return self._newest


class MemberTraining:
    """The training of one member. It can pause after any step."""

    def __init__(self, member: Member, group: FeatureGroup, loader: SharedLoader, monitors: Monitors) -> None:
        """Copy the untrained suffix. `monitors`: get the member's events and see its stop requests."""
        self.member, self._group = member, group
        classifier = copy_untrained(group.inputs.classifier, member.seed)
        if member.config.model.dropout is not None:
            set_dropout(classifier.suffix, member.config.model.dropout)
        inputs = replace(group.inputs, classifier=classifier)
        # Its events are those of one member among many: a sweep shows results.
        silent = replace(monitors, emit=ignore_event)
        self.trainer: Trainer = setup.build_trainer(member.config, inputs, group.engine, loader, silent)
        # The output of frozen blocks is computed at every use: kept for each member, it would take too much memory.
        growing = GrowingFeatures(classifier, loader.features)
        self.trainer.use_features(growing, growing.extend)
        self.classifier, self._monitors = classifier, monitors
        self._run = self._iterate()
        self._fault = ""
        self._seconds = 0.0

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self.trainer.step

    def advance(self) -> bool:
        """Make one step, with the evaluation that follows it; return whether more are left.

        Raises:
            Stopped: the run is to stop.
        """
        begin = time.perf_counter()
        try:
            is_left = next(self._run, None) is not None and not self.trainer.is_done
            if not is_left:
                self.close()
            return is_left
        except NonFiniteError as error:
            # The end of this member alone.
            self._fault = str(error)
            return False
        finally:
            self._seconds += time.perf_counter() - begin

    def close(self) -> None:
        """End the training before its end too. It would keep the weights in memory: it is in a cycle with this object."""
        self._run.close()

    def result(self, state: State) -> MemberResult:
        """Return the result so far; `diverged` replaces `state` if no evaluation has a finite loss."""
        best, member = self.trainer.best, self.member
        scores = best.scores.scores if best.step else None
        is_finite = scores is not None and math.isfinite(scores.loss)
        if not is_finite and not self._fault:
            self._fault = "its validation loss is not finite"
        all_values = setting_values(member.config)
        return MemberResult(
            member=member.index,
            setting=member.setting,
            values={key: all_values[key] for key in member.values},
            seed=member.seed,
            state="diverged" if self._fault else state,
            reason=self._fault,
            accuracy=scores.accuracy if scores else math.nan,
            macro_f1=scores.macro_f1 if scores else math.nan,
            loss=scores.loss if scores else math.nan,
            best_step=best.step,
            best_epoch=best.epoch,
            num_steps=self.step,
            seconds=round(self._seconds, 3),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the best weights and the predictions for validation with them, for a file."""
        best = self.trainer.best
        tensors = {f"weights.{name}": weight for name, weight in best.weights.items()}
        if (standard := self.classifier.suffix.standard) is not None:
            tensors |= {f"standard.{name}": tensor.cpu() for name, tensor in zip(Standard._fields, standard, strict=True)}
        return tensors | {f"validation.{name}": tensor for name, tensor in best.scores.tensors().items()}

    def _iterate(self) -> Generator[bool]:
        for _ in self.trainer.iterate(self._validate):
            yield True

    def _validate(self) -> SplitScores:
        group = self._group
        return evaluate_split(
            self.classifier,
            group.tables["validation"],
            group.engine,
            features=group.features("validation"),
            is_stopping=lambda: self._monitors.preemption.is_stopping,
        )


def train_in_lock_step(
    trainings: Sequence[MemberTraining], until: Mapping[int, int] | None = None, *, after_step: Callable[[], object]
) -> None:
    """Train members to their ends, or to the step `until[index]`, one step of each in turn."""
    active = list(trainings)
    while active:
        active = [
            training
            for training in active
            if (until is None or training.step < until[training.member.index]) and training.advance()
        ]
        after_step()


def load_member(group: FeatureGroup, member: Member, tensors: Mapping[str, Tensor]) -> tuple[Classifier, dict[str, Tensor]]:
    """Return the classifier that `MemberTraining.tensors` are of, and its weights by name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        parts.setdefault(kind, {})[name] = tensor
    classifier = copy_untrained(group.inputs.classifier, member.seed)
    classifier.suffix.load_state_dict(parts["weights"])
    if "standard" in parts:
        device = classifier.suffix.out_head.weight.device
        classifier.suffix.standard = Standard(*(parts["standard"][name].to(device) for name in Standard._fields))
    return classifier, parts["weights"]


def build_shared_loader(group: FeatureGroup, config: Config) -> SharedLoader:
    """Build the loader that the members of a wave share."""
    table, world = group.tables["train"], group.engine.world
    loader = setup.build_loader(config, group.inputs.classifier, table, world, loader_type=SharedLoader)
    loader.source = group.features("train")
    return loader


def list_evaluations(loader: TrainLoader, epochs: int, max_steps: int | None, every: int | Literal["epoch"]) -> list[int]:
    """Return the steps of a whole run after which validation is scored, unless it stops early. The last is the end."""
    num_steps, ends, epoch = loader.num_steps(epochs, max_steps), list[int](), 0
    if every != "epoch":
        ends = list(range(every, num_steps, every))
    while every == "epoch" and (ends[-1] if ends else 0) < num_steps:
        ends.append((ends[-1] if ends else 0) + loader.epoch_steps(epoch))
        epoch += 1
    return [*(end for end in ends if end < num_steps), num_steps]
