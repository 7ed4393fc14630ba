"""The best epoch so far: its weights and its validation scores; and running totals over the steps."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from agnews_dist.data.batching.shares import Share, Tally
from agnews_dist.engine.strategy import Strategy
from agnews_dist.evaluation.evaluator import SplitScores


class BestEpoch:
    """The trainable weights after the epoch with the highest validation accuracy. Ties go to the lower loss."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.weights: dict[str, Tensor] = {}
        """Name -> weight, on rank 0 alone; empty on the other ranks."""
        self.epoch = 0
        """The epoch's number, from 1; 0 before the first evaluation."""
        self._step = 0
        self._scores: SplitScores | None = None

    @property
    def name(self) -> str:
        """Name of the directory next to the checkpoints."""
        return f"best-{self._step:08d}"

    @property
    def scores(self) -> SplitScores:
        """The scores of the validation split after that epoch."""
        assert self._scores is not None
        return self._scores

    def update(self, epoch: int, scores: SplitScores, *, step: int) -> None:
        """Keep a copy of the weights if this epoch, which ended with `step`, is better. Collective.

        Every rank decides from the same integers, so all decide alike.
        """
        new, old = scores.scores, self._scores.scores if self._scores else None
        assert new is not None, "validation has labels"
        if old is None or (new.num_correct, -new.loss) > (old.num_correct, -old.loss):
            self.epoch, self._step, self._scores = epoch, step, scores
            # Drop the old copy before making the new one: memory need hold only one.
            self.weights = {}
            self.weights = self._strategy.gather_weights()

    def restore(self) -> None:
        """Load the best epoch's weights into the strategy. Collective."""
        self._strategy.load_weights(self.weights)

    def state_dict(self) -> dict[str, object] | None:
        """Return the JSON part of the state; None before the first evaluation."""
        if self._scores is None:
            return None
        return {"name": self.name, "epoch": self.epoch, "step": self._step, **self._scores.state_dict()}

    def load_state_dict(
        self, state: Mapping[str, Any], score_tensors: Mapping[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        """Restore from `state_dict()`, the score tensors (on every rank) and the weights (on rank 0)."""
        self.epoch, self._step = state["epoch"], state["step"]
        self._scores, self.weights = SplitScores.restore(score_tensors, state), weights


class RunningTotals:
    """Tokens and seconds of all steps so far. Equal on every rank, except for the seconds."""

    def __init__(self) -> None:
        self.seconds, self.tally = 0.0, Tally()

    def add(self, share: Share, seconds: float) -> None:
        """Add one step."""
        self.seconds += seconds
        self.tally.add(share)

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-ready state."""
        return {"seconds": self.seconds, "tally": vars(self.tally)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add what earlier attempts counted."""
        self.seconds += state["seconds"]
        self.tally = Tally(**state["tally"])
