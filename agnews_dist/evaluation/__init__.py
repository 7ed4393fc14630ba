"""Scores of a split, the same on any number of ranks."""

from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
from agnews_dist.events import Scores

__all__ = ["Scores", "SplitScores", "evaluate_split"]
