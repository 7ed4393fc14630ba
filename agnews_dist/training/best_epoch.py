"""The best epoch so far, kept beside training, and the totals of the steps."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from agnews_dist.data.batching.shares import Share, Tally
from agnews_dist.engine.strategy import Strategy
from agnews_dist.evaluation.evaluator import SplitScores


class BestEpoch:
    """Keeps what trains as it was after the epoch with the highest validation accuracy; ties go to the lower loss."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.state: dict[str, Tensor] = {}
        """Its weights, on rank 0 alone: the others get theirs back from there."""
        self.epoch = 0
        self._step = 0
        self._scored: SplitScores | None = None

    @property
    def name(self) -> str:
        """Its directory among the checkpoints."""
        return f"best-{self._step:08d}"

    @property
    def scored(self) -> SplitScores:
        """The validation split as the best epoch scored it."""
        assert self._scored is not None
        return self._scored

    def entry(self) -> dict[str, object] | None:
        """What a checkpoint says of it, but for its tensors; None before the first epoch's end."""
        if self._scored is None:
            return None
        return {"name": self.name, "epoch": self.epoch, "step": self._step, **self._scored.rest()}

    def recall(self, entry: Mapping[str, Any], scored: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
        """Be what gave this `entry()`; `state`: read on rank 0 alone."""
        self.epoch, self._step = entry["epoch"], entry["step"]
        self._scored, self.state = SplitScores.of(scored, entry), state

    def offer(self, epoch: int, scored: SplitScores, *, step: int) -> None:
        """Keep a copy if this epoch, which ended with `step`, is better; every rank decides alike, from the same integers.
        Collective."""
        new, old = scored.scores, self._scored.scores if self._scored else None
        if old is None or (new.num_correct, -new.loss) > (old.num_correct, -old.loss):
            self.epoch, self._step, self._scored = epoch, step, scored
            # The older copy first: there is room for one.
            self.state = {}
            self.state = self._strategy.full_state()

    def restore(self) -> None:
        """Put the best epoch's weights back. Collective."""
        self._strategy.load(self.state)


class RunningTotals:
    """Tokens and seconds of the steps so far; the same on every rank but for the seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        """`seconds`: what the features took before the first step; tokens per second are those of all that training needed."""
        self.seconds = seconds
        self.tally = Tally()

    def add(self, share: Share, seconds: float) -> None:
        """Take in one step."""
        self.seconds += seconds
        self.tally.add(share)
