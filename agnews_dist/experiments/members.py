"""The members of a sweep, and what they can share: features, batches, a place in a wave. Needs no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from agnews_dist.config.fields import all_settings, replace_values, values_of
from agnews_dist.config.schema import Config
from agnews_dist.errors import ConfigError
from agnews_dist.experiments.space import SEED, format_values

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Member:
    """One training of a sweep."""

    index: int
    """Number in the sweep, from 0."""
    setting: int
    """Number of its combination of settings, from 0. Members of one combination differ in the seed."""
    values: Mapping[str, Any]
    """Setting -> value of the combination, without the seed."""
    config: Config

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def feature_key(self) -> Key:
        """Values that the features depend on: members with equal ones share them."""
        # Weights that are drawn depend on the seed, frozen ones too.
        seed = self.seed if self.config.model.init == "random" else None
        return (seed, *_values_where(self.config, lambda key: all_settings()[key].sweep == "changes features"))

    @property
    def plan_key(self) -> Key:
        """Values that batches and evaluations depend on: members with equal ones read the same batches in lock step."""
        batch, optim = _values_where(self.config, lambda key: key.startswith("batch.")), self.config.optim
        return (self.seed, optim.class_weights, optim.epochs, optim.max_steps, optim.evaluate_every, *batch)


@dataclass(frozen=True)
class Wave:
    """Members that one rank trains in lock step, on the same batches."""

    number: int
    members: tuple[Member, ...]


def build_members(base: Config, settings: Iterable[Mapping[str, Any]], seeds: Sequence[int], *, first: int = 0) -> list[Member]:
    """Build the members of combinations of settings, numbered from `first` combinations on.

    Raises:
        ConfigError: combinations contradict themselves, one line each.
    """
    members, problems = list[Member](), list[str]()
    for setting, values in enumerate(settings, first):
        for position, seed in enumerate(seeds):
            try:
                config = replace_values(base, {**values, SEED: seed})
            except ConfigError as error:
                problems.append(f"{format_values(values)}: {error}")
                break
            members.append(Member(setting * len(seeds) + position, setting, values, config))
    if problems:
        more = [f"{len(problems) - 5} more combinations: they contradict themselves too. Correct these first."]
        raise ConfigError("\n".join(problems[:5] + more * (len(problems) > 5)))
    return members


def list_ignored(config: Config) -> list[str]:
    """List settings that are not the defaults, and have no effect on members."""
    settings = all_settings()
    found = [key for key, value in values_of(config) if settings[key].sweep == "ignored" and value != settings[key].default]
    return found + ["the first check of run.debug"] * config.run.debug


def group_by_features(members: Sequence[Member]) -> list[list[Member]]:
    """Group members that share features, in the order of their first members."""
    groups: dict[Key, list[Member]] = {}
    for member in members:
        groups.setdefault(member.feature_key, []).append(member)
    return list(groups.values())


def cut_waves(members: Sequence[Member], *, limit: int, num_workers: int, first: int = 0) -> list[Wave]:
    """Cut members that share features into waves of at most `limit`, and into enough of them for all workers.

    Seeds are the outer order: so all combinations have their first seeds early, and the members of one wave share batches.
    """
    limit = max(1, min(limit, -(-len(members) // num_workers)))
    # Equal plans next to each other, in the order of the first member of each.
    order = {key: number for number, key in enumerate(dict.fromkeys(member.plan_key for member in members))}
    by_plan = groupby(sorted(members, key=lambda member: order[member.plan_key]), key=lambda member: member.plan_key)
    parts = [tuple(group) for _, group in by_plan]
    pieces = [part[begin : begin + limit] for part in parts for begin in range(0, len(part), limit)]
    return [Wave(number, piece) for number, piece in enumerate(pieces, first)]


def _values_where(config: Config, accepts: Callable[[str], bool]) -> Key:
    return tuple(value for key, value in values_of(config) if accepts(key))
