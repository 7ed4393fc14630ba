"""Settings of a finished sweep for its page: their scores, the axes of what varied, and the mean score by value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any, Literal

from agnews_dist.evaluation.intervals import Interval

MAX_VALUES = 8
"""Values of a setting up to which each one is shown; of more numbers, intervals."""
NUM_BINS = 6
LOG_RATIO = 5.0
"""Ratio of the largest and the smallest value from which on an axis may be logarithmic."""


@dataclass(frozen=True)
class Row:
    """One combination of settings with its scores on validation."""

    rank: int
    """From 1, the best first."""
    setting: int
    values: Mapping[str, Any]
    state: str
    scores: tuple[float, ...]
    """Scores of all seeds; empty if one is not finite."""
    deviation: float | None
    interval: Interval | None
    num_members: int
    num_steps: int
    """Largest number of steps of its members."""
    reason: str
    """Cause of an early end."""
    first_rung: float | None = None
    """Mean score at the first rung of halving; None without halving."""

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN if one is not finite."""
        return fmean(self.scores) if self.scores else math.nan

    @property
    def compared(self) -> float:
        """Mean score after the same share of training for all settings: at the first rung of halving, or at the end."""
        return self.mean if self.first_rung is None else self.first_rung

    @property
    def is_scored(self) -> bool:
        return bool(self.scores) and self.state != "diverged"


def read_rows(report: Mapping[str, Any]) -> list[Row]:
    """Read the settings of sweep.json, the best first."""
    members = {member["member"]: member for member in report["members"]}
    rows: list[Row] = []
    for rank, each in enumerate(report["settings"], 1):
        score, own = each["validation"][report["metric"]], [members[number] for number in each["members"]]
        rows.append(
            Row(
                rank=rank,
                setting=each["setting"],
                values=each["values"],
                state=each["state"],
                scores=tuple(score["values"]) if score["mean"] is not None else (),
                deviation=score["deviation"],
                interval=Interval(*score["interval"]) if score["interval"] else None,
                num_members=len(own),
                num_steps=max(member["num_steps"] for member in own),
                reason=next((member["reason"] for member in own if member["reason"]), ""),
                first_rung=each.get("first_rung"),
            )
        )
    return rows


def format_setting(value: object) -> str:
    """Format the value of a setting as a command line has it.

    >>> [format_setting(value) for value in (0.0003, 2, True, None, ["a", "b"])]
    ['0.0003', '2', 'true', 'null', 'a, b']
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(format_setting, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Axis:
    """A setting that varied, with places from 0 to 1 for its values."""

    key: str
    kind: Literal["logarithmic", "linear", "steps"]
    values: tuple[Any, ...]
    """All different values: numbers by size, then others in the order of the sweep."""

    @property
    def is_binned(self) -> bool:
        return self.kind != "steps" and len(self.values) > MAX_VALUES

    def place(self, value: Any) -> float:
        """Return the place of one of the values, or of any number on a scale of numbers."""
        if self.kind == "steps":
            return [*map(format_setting, self.values)].index(format_setting(value)) / (len(self.values) - 1)
        scale = math.log if self.kind == "logarithmic" else float
        low, high = scale(self.values[0]), scale(self.values[-1])
        return (scale(value) - low) / (high - low)

    def value_at(self, place: float) -> float:
        """Return the number at a place of a scale of numbers."""
        low, high = float(self.values[0]), float(self.values[-1])
        return low * (high / low) ** place if self.kind == "logarithmic" else low + (high - low) * place

    def group(self, value: Any) -> int:
        """Return the number of a value's group: the value itself, or its interval."""
        if self.is_binned:
            return min(NUM_BINS - 1, int(self.place(value) * NUM_BINS))
        return [*map(format_setting, self.values)].index(format_setting(value))

    def group_place(self, group: int) -> float:
        """Return the place of a group: of its value, or of the middle of its interval."""
        return (group + 0.5) / NUM_BINS if self.is_binned else self.place(self.values[group])

    def group_name(self, group: int) -> str:
        """Return the value of a group, or the ends of its interval."""
        if not self.is_binned:
            return format_setting(self.values[group])
        low, high = (self.value_at(end / NUM_BINS) for end in (group, group + 1))
        return f"{low:.3g} to {high:.3g}"

    def ticks(self, distance: float) -> list[tuple[float, str]]:
        """Return (place, text) of ticks that are at least `distance` apart."""
        marks: Sequence[Any] = self.values
        if self.is_binned:
            marks = [self.value_at(place) for place in (0, 0.25, 0.5, 0.75, 1)]
            first, last = (math.log10(self.values[end]) if self.kind == "logarithmic" else 0.0 for end in (0, -1))
            decades = [10.0**power for power in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
            if self.kind == "logarithmic" and len(decades) > 1:
                marks = decades
        found: list[tuple[float, str]] = []
        for mark in marks:
            place = self.place(mark)
            if not found or place - found[-1][0] >= distance - 1e-9:
                found.append((place, f"{mark:.2g}" if self.is_binned else format_setting(mark)))
        return found


def find_axes(rows: Sequence[Row]) -> list[Axis]:
    """Find the settings that took more than one value. Needs the rows of a whole sweep."""
    axes: list[Axis] = []
    in_order = sorted(rows, key=lambda row: row.setting)
    for key in dict.fromkeys(key for row in in_order for key in row.values):
        values = list({format_setting(row.values[key]): row.values[key] for row in in_order}.values())
        if len(values) < 2:
            continue
        numbers = sorted(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
        others = [value for value in values if value not in numbers or isinstance(value, bool)]
        kind: Literal["logarithmic", "linear", "steps"] = "steps"
        if not others and _looks_logarithmic(numbers):
            kind = "logarithmic"
        elif not others and len(numbers) > MAX_VALUES:
            kind = "linear"
        axes.append(Axis(key, kind, (*numbers, *others)))
    return axes


def _looks_logarithmic(numbers: Sequence[float]) -> bool:
    """Return whether sorted numbers span a wide range, with a median nearer to the middle of a logarithmic scale."""
    low, middle, high = numbers[0], median(numbers), numbers[-1]
    if low <= 0 or high / low < LOG_RATIO:
        return False
    return abs(math.log(middle / math.sqrt(low * high))) < abs(math.log(2 * middle / (low + high)))


@dataclass(frozen=True)
class Effect:
    """Scores of all settings with one value, or with a value in an interval."""

    group: int
    name: str
    means: tuple[float, ...]
    """Mean scores of the settings."""
    num_diverged: int

    @property
    def mean(self) -> float:
        return fmean(self.means) if self.means else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over the settings; NaN for fewer than two."""
        return stdev(self.means) if len(self.means) > 1 else math.nan


def compute_effects(axis: Axis, rows: Sequence[Row]) -> list[Effect]:
    """Compute the main effect of a setting: the scores by its value, over all values of the others."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(axis.group(row.values[axis.key]), []).append(row)
    return [
        Effect(
            number,
            axis.group_name(number),
            tuple(row.compared for row in groups[number] if row.is_scored),
            sum(not row.is_scored for row in groups[number]),
        )
        for number in sorted(groups)
    ]


def effect_size(effects: Sequence[Effect]) -> float:
    """Return the difference of the largest and the smallest mean."""
    means = [effect.mean for effect in effects if effect.means]
    return max(means) - min(means) if means else 0.0
