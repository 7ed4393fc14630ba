"""The best evaluation so far: its weights and its validation scores; and running totals over the steps."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from agnews_dist.data.batching.shares import Share, Tally
from agnews_dist.distributed import collectives
from agnews_dist.engine.strategy import Strategy
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Metric, Scores


class BestWeights:
    """The trainable weights with the best validation score. Ties go to the lower loss, then to the earlier evaluation."""

    def __init__(self, strategy: Strategy, metric: Metric = "accuracy") -> None:
        self._strategy = strategy
        self._metric: Metric = metric
        self.weights: dict[str, Tensor] = {}
        """Name -> weight, on rank 0 alone; empty on the other ranks."""
        self.epoch = 0
        """Number of their epoch, from 1; 0 before the first evaluation."""
        self.step = 0
        """Steps done before them."""
        self.num_worse = 0
        """Evaluations since then, none of which was better."""
        self._scores: SplitScores | None = None

    @property
    def name(self) -> str:
        """Name of the directory next to the checkpoints."""
        return f"best-{self.step:08d}"

    @property
    def scores(self) -> SplitScores:
        """The scores of the validation split with these weights."""
        assert self._scores is not None
        return self._scores

    def update(self, epoch: int, scores: SplitScores, *, step: int) -> None:
        """Keep a copy of the weights if this evaluation, after `step` in `epoch`, is better; else count it. Collective."""
        new, old = scores.scores, self._scores.scores if self._scores else None
        assert new is not None, "validation has labels"
        is_better = old is None or _order(new, self._metric) > _order(old, self._metric)
        # Rank 0 decides: on hosts of different kinds the last bit of a loss may differ.
        if collectives.all_gather(is_better)[0]:
            self.epoch, self.step, self._scores, self.num_worse = epoch, step, scores, 0
            # Drop the old copy before making the new one: memory need hold only one.
            self.weights = {}
            self.weights = self._strategy.gather_weights()
        else:
            self.num_worse += 1

    def restore(self) -> None:
        """Load the best weights into the strategy. Collective."""
        self._strategy.load_weights(self.weights)

    def state_dict(self) -> dict[str, object] | None:
        """Return the JSON part of the state; None before the first evaluation."""
        if self._scores is None:
            return None
        counts = {"epoch": self.epoch, "step": self.step, "num_worse": self.num_worse}
        return {"name": self.name, **counts, **self._scores.state_dict()}

    def load_state_dict(
        self, state: Mapping[str, Any], score_tensors: Mapping[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        """Restore from `state_dict()`, the score tensors (on every rank) and the weights (on rank 0)."""
        self.epoch, self.step = state["epoch"], state["step"]
        # A checkpoint of before has no count.
        self.num_worse = state.get("num_worse", 0)
        self._scores, self.weights = SplitScores.restore(score_tensors, state), weights


def _order(scores: Scores, metric: Metric) -> tuple[float, float]:
    """Return the key by which evaluations compare: the larger, the better. A loss that is not finite is the worst."""
    if not math.isfinite(scores.loss):
        return -math.inf, -math.inf  # logits that are NaN predict the first class, which may be the most frequent one
    return {"accuracy": scores.num_correct, "macro_f1": scores.macro_f1, "loss": -scores.loss}[metric], -scores.loss


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
