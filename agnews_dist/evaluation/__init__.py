"""Scores of a split, the same on any number of ranks."""

from typing import TYPE_CHECKING, Any

from agnews_dist.events import Scores

if TYPE_CHECKING:
    from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split

__all__ = ["Scores", "SplitScores", "evaluate_split"]


def __getattr__(name: str) -> Any:
    # Imported at the first use: the console needs metrics.py, which must not load torch.
    if name in ("SplitScores", "evaluate_split"):
        from agnews_dist.evaluation import evaluator

        return getattr(evaluator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
