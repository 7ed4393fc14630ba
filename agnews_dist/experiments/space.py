"""The settings that a sweep varies: lists and ranges of values, and the combinations of them. Needs no torch.

--optim.lr 1e-4,3e-4,1e-3    a list; of a setting that is itself a list, or of texts with commas: ["a", "b"] as in JSON or YAML
--run.seed 0..4              whole numbers from 0 to 4
--optim.lr 1e-4..1e-2        any number between, for random samples; on a logarithmic scale if the ends are far apart
"""

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, cast, get_origin

from agnews_dist.config.fields import Problems, RawValue, Setting, all_settings, check_value, format_value, split_type
from agnews_dist.errors import ConfigError, quote

SEED = "run.seed"
"""Setting of which every combination has all values: members that differ in it alone are repetitions."""
MAX_MEMBERS = 100_000
LOG_RATIO = 10.0
"""Ratio of the ends of a range from which on it is sampled on a logarithmic scale."""


@dataclass(frozen=True)
class Interval:
    """All numbers between two ends."""

    low: float
    high: float

    @property
    def is_logarithmic(self) -> bool:
        return self.low > 0 and self.high / self.low >= LOG_RATIO

    def sample(self, generator: random.Random) -> float:
        """Draw a number."""
        if self.is_logarithmic:
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = generator.uniform(self.low, self.high)
        return self.round(drawn)

    def round(self, number: float) -> float:
        """Round to three digits: more would only make command lines long."""
        return min(self.high, max(self.low, float(f"{number:.3g}")))


@dataclass(frozen=True)
class Dimension:
    """A setting with the values that a sweep tries."""

    key: str
    values: tuple[Any, ...]
    """Checked values, in the order given; empty if there is an interval."""
    interval: Interval | None = None

    def describe(self) -> list[object]:
        """Return the values as JSON holds them."""
        if self.interval is not None:
            return [f"{self.interval.low:g}..{self.interval.high:g}"]
        return [list(value) if isinstance(value, tuple) else value for value in self.values]


@dataclass(frozen=True)
class Space:
    """Combinations of settings, each with all seeds."""

    dimensions: tuple[Dimension, ...]
    """Without the seed."""
    seeds: tuple[int, ...]

    @property
    def has_interval(self) -> bool:
        return any(dimension.interval for dimension in self.dimensions)

    @property
    def num_combinations(self) -> int:
        """Number of combinations of listed values, without seeds."""
        return math.prod(len(dimension.values) for dimension in self.dimensions)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield every combination: setting -> value. The last setting changes fastest."""
        for values in product(*(dimension.values for dimension in self.dimensions)):
            yield dict(zip((dimension.key for dimension in self.dimensions), values, strict=True))

    def sample(self, num_samples: int, seed: int) -> list[dict[str, Any]]:
        """Draw different combinations at random; all, in a random order, if there are no more than that."""
        generator = random.Random(seed)
        if not self.has_interval and self.num_combinations <= num_samples:
            every = list(self.grid())
            generator.shuffle(every)
            return every
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        # Intervals may be so narrow that rounding leaves few values: a bounded number of draws.
        for _ in range(100 * num_samples):
            drawn = {each.key: _draw(each, generator) for each in self.dimensions}
            found.setdefault(tuple(drawn.values()), drawn)
            if len(found) == num_samples:
                break
        return list(found.values())


def _draw(dimension: Dimension, generator: random.Random) -> Any:
    return dimension.interval.sample(generator) if dimension.interval else generator.choice(dimension.values)


def split_dimensions(raw_values: Sequence[RawValue], problems: Problems) -> tuple[list[RawValue], tuple[Dimension, ...]]:
    """Take the lists and ranges out of raw values: return the values with the first of each in its place, and the dimensions.

    Of a setting given more than once, the last value counts.
    """
    last = {raw.name: raw for raw in raw_values}
    fixed, dimensions = list[RawValue](), list[Dimension]()
    for raw in last.values():
        try:
            parts = _split(raw, all_settings()[raw.name])
            if parts is None:
                fixed.append(raw)
                continue
            dimension, first = _check_dimension(raw, all_settings()[raw.name], parts)
        except ValueError as error:
            problems.add(str(error), raw.name)
            continue
        dimensions.append(dimension)
        fixed.append(first)
    return fixed, tuple(dimensions)


def make_space(dimensions: Sequence[Dimension], *, seed: int, num_samples: int | None) -> Space:
    """Make the space of a sweep. `seed`: the seed of all members if none is listed; `num_samples`: combinations to draw.

    Raises:
        ConfigError: there is nothing to vary, a range without samples, or too many members.
    """
    seeds = next((dimension.values for dimension in dimensions if dimension.key == SEED), (seed,))
    space = Space(tuple(each for each in dimensions if each.key != SEED), cast("tuple[int, ...]", seeds))
    if not dimensions:
        raise ConfigError("sweep: no setting has a list or a range. Write for example --optim.lr 3e-4,1e-3 --run.seed 0..4.")
    for dimension in space.dimensions if num_samples is None else ():
        if dimension.interval is not None:
            raise ConfigError(
                f"--{dimension.key} {dimension.describe()[0]}: a range of numbers has no end. Set --samples N, or list values."
            )
    num_members = (num_samples if num_samples is not None else space.num_combinations) * len(space.seeds)
    if num_members > MAX_MEMBERS:
        raise ConfigError(
            f"sweep: {num_members:,} members, at most {MAX_MEMBERS:,} are allowed. List fewer values, or draw with --samples N."
        )
    return space


def format_values(values: Mapping[str, object]) -> str:
    """Format settings as short flags: `optim.lr=0.001 model.trainable_blocks=2`; `-` if there are none."""
    return " ".join(f"{key}={format_value(value)}" for key, value in values.items()) or "-"


def _split(raw: RawValue, setting: Setting) -> list[object] | None:
    """Return the raw values of a list, or an `Interval` in a list for a range; None: it is one value.

    A path that members share is one value, whatever its name.

    Raises:
        ValueError: a range is empty or too long; the text is the whole message.
    """
    if setting.sweep in ("not sweepable", "ignored") and any(member is str for member, _ in split_type(setting.type)):
        return None
    if isinstance(raw.value, list):  # from YAML
        items = cast("list[object]", raw.value)
        takes_list = any(get_origin(member) is tuple for member, _ in split_type(setting.type))
        return None if takes_list and not any(isinstance(item, list) for item in items) else items
    if not isinstance(raw.value, str):
        return None
    if raw.value.startswith("["):
        return _split_json(raw, setting)
    members = [member for member, _ in split_type(setting.type)]
    if any(get_origin(member) is tuple for member in members) or _admits_any_text(setting):
        return None
    parts = [part.strip() for part in raw.value.split(",")]
    found: list[object] = []
    for part in parts:
        low, dots, high = part.partition("..")
        is_number = dots and (int in members or float in members)
        text = None if part in ("null", "Null", "NULL") else part
        found += _expand_range(raw, low, high, is_whole=float not in members) if is_number else [text]
    return found if len(parts) > 1 or found != parts else None


def _split_json(raw: RawValue, setting: Setting) -> list[object] | None:
    try:
        items: Any = json.loads(str(raw.value))
    except ValueError:
        return None
    single = replace(raw, value=[_to_raw(item) for item in items])
    return _split(single, setting)


def _to_raw(value: Any) -> object:
    """Return a JSON value as YAML would hold it."""
    if isinstance(value, list):
        return [_to_raw(item) for item in cast("list[object]", value)]
    return value if value is None or isinstance(value, str) else json.dumps(value, allow_nan=False)


def _admits_any_text(setting: Setting) -> bool:
    """Return whether commas may be part of a value: the empty text is a value too."""
    return any(member is str and not limits for member, limits in split_type(setting.type))


def _expand_range(raw: RawValue, low: str, high: str, *, is_whole: bool) -> Iterable[object]:
    try:
        first, last = (int(low), int(high)) if is_whole else (float(low), float(high))
    except ValueError:
        kind = "whole numbers" if is_whole else "numbers"
        raise ValueError(f"{raw.source}: a range is two {kind} with .. between them. Write for example 0..4.") from None
    if first > last:
        raise ValueError(f"{raw.source}: the range is empty, as {low} is above {high}. Write {high}..{low}.")
    if not is_whole:
        return [Interval(float(first), float(last))]
    if last - first >= MAX_MEMBERS:
        raise ValueError(f"{raw.source}: more than {MAX_MEMBERS:,} values. Write a shorter range.")
    return [str(number) for number in range(int(first), int(last) + 1)]


def _check_dimension(raw: RawValue, setting: Setting, parts: list[object]) -> tuple[Dimension, RawValue]:
    """Check every value; return the dimension, and its first value as a raw value."""
    intervals = [part for part in parts if isinstance(part, Interval)]
    if setting.sweep not in ("free", "changes features") and (len(parts) > 1 or intervals):
        why = "scores of different rows cannot be compared" * (setting.sweep == "decides scored rows")
        rule = why or "it is the same for all members of a sweep"
        raise ValueError(f"{raw.source}: {rule}. Give it one value, or run one sweep for each.")
    if intervals and len(parts) > 1:
        raise ValueError(f"{raw.source}: a range of real numbers is alone. Leave out the other values.")
    texts = parts if not intervals else [repr(intervals[0].low), repr(intervals[0].high)]
    if not texts or any(text == "" for text in texts):
        raise ValueError(f"{raw.source}: a value is empty. Write values with a comma between them.")
    raws = [replace(raw, value=text, source=f"--{raw.name} {quote(str(text))}") for text in islice(texts, MAX_MEMBERS + 1)]
    values = tuple(check_value(each, setting.type, setting.default)[1] for each in raws)
    if intervals:
        return Dimension(raw.name, (), intervals[0]), raws[0]
    for value in values:
        if values.count(value) > 1 if len(values) <= 1_000 else len(set(values)) < len(values):
            raise ValueError(f"{raw.source}: {format_value(value)} is listed twice. Remove one.")
    return Dimension(raw.name, values), raws[0]
