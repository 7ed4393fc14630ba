"""The best settings of a sweep by the validation scores of their members, and survivors of successive halving.

Test scores play no part here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal

from agnews_dist.events import Metric

State = Literal["finished", "halved", "diverged"]
"""Trained to the end, ended by successive halving, ended by a loss that is not finite."""


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """The outcome of a member that has ended, or of one at a rung."""

    member: int
    setting: int
    values: Mapping[str, Any]
    """Settings with values that JSON holds."""
    seed: int
    state: State
    reason: str = ""
    accuracy: float = math.nan
    """Scores of the best evaluation on validation so far; NaN if there was none."""
    macro_f1: float = math.nan
    loss: float = math.nan
    best_step: int = 0
    best_epoch: int = 0
    num_steps: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Seconds of training and evaluation."""

    def score(self, metric: Metric) -> float:
        """Return the score that counts, the larger, the better; minus infinity without a finite one."""
        value = -self.loss if metric == "loss" else getattr(self, metric)
        return value if self.state != "diverged" and math.isfinite(value) and math.isfinite(self.loss) else -math.inf


@dataclass(frozen=True)
class Standing:
    """A combination of settings with the results of its members so far."""

    setting: int
    values: Mapping[str, Any]
    results: tuple[MemberResult, ...]
    num_members: int

    @property
    def state(self) -> str:
        """`finished`, `halved`, `diverged` if any member is that; else how many members have ended."""
        states = {result.state for result in self.results}
        for state in ("diverged", "halved"):
            if state in states:
                return state
        return "finished" if len(self.results) == self.num_members else f"{len(self.results)} of {self.num_members}"

    def mean(self, metric: Metric) -> float:
        """Return the mean score of the members that have ended; a member that diverged makes it minus infinity."""
        return fmean(result.score(metric) for result in self.results) if self.results else -math.inf

    def deviation(self, metric: Metric) -> float:
        """Return the standard deviation over the seeds; NaN for fewer than two."""
        scores = [result.score(metric) for result in self.results]
        return stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else math.nan

    @property
    def mean_loss(self) -> float:
        return fmean(result.loss for result in self.results) if self.results else math.inf


def rank_settings(results: Sequence[MemberResult], num_seeds: int, metric: Metric) -> list[Standing]:
    """Rank the settings by their mean score, the best first. Halved ones come after finished ones, diverged ones last.

    Ties go to the lower mean loss, then to the setting that comes first.
    """
    by_setting: dict[int, list[MemberResult]] = {}
    for result in sorted(results, key=lambda each: each.member):
        by_setting.setdefault(result.setting, []).append(result)
    standings = [Standing(setting, of[0].values, tuple(of), num_seeds) for setting, of in by_setting.items()]
    return sorted(standings, key=partial(_order, metric))


def _order(metric: Metric, standing: Standing) -> tuple[Any, ...]:
    loss, stage = standing.mean_loss, {"halved": 1, "diverged": 2}.get(standing.state, 0)
    return stage, -standing.mean(metric), loss if math.isfinite(loss) else math.inf, standing.setting


def choose_survivors(results: Sequence[MemberResult], num_seeds: int, metric: Metric, *, factor: int) -> set[int]:
    """Return the settings that stay after a rung: the best 1/factor of those that compete, at least one.

    A setting with a member that diverged never stays; there may be none that does.
    """
    standings = rank_settings(results, num_seeds, metric)
    num_kept = max(1, -(-len(standings) // factor))
    return {standing.setting for standing in standings[:num_kept] if standing.state != "diverged"}


def count_rungs(num_settings: int, factor: int) -> int:
    """Return the number of rungs after which one setting is left.

    >>> [count_rungs(n, 3) for n in (1, 2, 3, 4, 27)]
    [0, 1, 1, 2, 3]
    """
    rungs = 0
    while num_settings > 1:
        num_settings, rungs = -(-num_settings // factor), rungs + 1
    return rungs


def place_rungs(num_rungs: int, factor: int, evaluations: Sequence[int]) -> list[int]:
    """Return the steps of a member's rungs, each an evaluation of its own before the end.

    With enough evaluations they are at 1/factor of the steps, 1/factor^2 and so on, the earliest first. With few of them there
    are fewer rungs.

    >>> place_rungs(2, 3, [1, 2, 3, 6, 9]), place_rungs(3, 3, [9, 18, 27]), place_rungs(1, 3, [9])
    ([1, 3], [9, 18], [])
    """
    *early, num_steps = evaluations
    found: list[int] = []
    for power in range(num_rungs, 0, -1):
        target = num_steps // factor**power
        later = [step for step in early if step >= target and (not found or step > found[-1])]
        if not later:
            break
        found.append(later[0])
    return found
