"""Proposals of Optuna: repeatable from the same results, different from each other."""

import math

import pytest

from agnews_dist.experiments.search import OptunaSearch
from agnews_dist.experiments.space import Dimension, Interval, Space

pytest.importorskip("optuna")
SPACE = Space((Dimension("optim.lr", (), Interval(1e-5, 1e-1)), Dimension("optim.class_weights", ("none", (1.0, 2.0)))), (0,))


def run(num_samples: int, *, per_round: int = 1, seed: int = 0, space: Space = SPACE) -> list[dict]:
    """Search for the rate 1e-3, as a sweep does: propose, score, tell."""
    search = OptunaSearch(space, num_samples=num_samples, per_round=per_round, seed=seed)
    found: list[dict] = []
    for proposed in search.rounds():
        assert len(proposed) <= per_round
        found += proposed
        rates = [each.get("optim.lr", 1e-3) for each in found]
        search.tell([-math.inf if rate > 0.05 else -abs(math.log10(rate) + 3) for rate in rates])
    return found


@pytest.mark.parametrize("per_round", [1, 4])
def test_proposals_repeat_from_the_same_results(per_round: int) -> None:
    first = run(18, per_round=per_round)
    assert first == run(18, per_round=per_round)
    assert first != run(18, per_round=per_round, seed=1)
    assert len({tuple(each.items()) for each in first}) == len(first) == 18


def test_later_proposals_are_nearer_to_the_best() -> None:
    rates = [math.log10(each["optim.lr"]) for each in run(40)]
    early, late = ([abs(rate + 3) for rate in part] for part in (rates[:10], rates[-10:]))
    assert sum(late) < sum(early)


def test_search_ends_when_all_combinations_are_tried() -> None:
    space = Space((Dimension("optim.epochs", (1, 2, 3)),), (0,))
    assert sorted(each["optim.epochs"] for each in run(20, space=space)) == [1, 2, 3]
