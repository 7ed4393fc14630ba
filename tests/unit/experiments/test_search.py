"""Proposals of Optuna: repeatable from the same results, different from each other."""

import math
from collections.abc import Callable
from functools import partial

import pytest

from agnews_dist.config.fields import replace_values
from agnews_dist.config.schema import Config
from agnews_dist.errors import ConfigError
from agnews_dist.experiments.search import OptunaSearch
from agnews_dist.experiments.space import Dimension, Interval, Space

optuna = pytest.importorskip("optuna")
SPACE = Space((Dimension("optim.lr", (), Interval(1e-5, 1e-1)), Dimension("optim.class_weights", ("none", (1.0, 2.0)))), (0,))


def run(
    num_samples: int,
    *,
    per_round: int = 1,
    seed: int = 0,
    space: Space = SPACE,
    check: Callable[[object], object] = lambda _: None,
) -> list[dict]:
    """Search for the rate 1e-3, as a sweep does: propose, score, tell."""
    search = OptunaSearch(space, num_samples=num_samples, per_round=per_round, seed=seed, check=check)
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


@pytest.mark.parametrize("per_round", [1, 3])
def test_proposals_that_contradict_themselves_are_replaced(per_round: int) -> None:
    dimensions = (Dimension("model.trainable_blocks", (0, 1)), Dimension("model.standardize", (True, False)))
    space = Space((Dimension("optim.lr", (), Interval(1e-5, 1e-1)), *dimensions), (0,))
    check = partial(replace_values, Config())
    found = run(20, per_round=per_round, space=space, check=check)
    assert found == run(20, per_round=per_round, space=space, check=check)
    assert len(found) == 20
    pairs = {(each["model.trainable_blocks"], each["model.standardize"]) for each in found}
    assert pairs == {(0, True), (0, False), (1, False)}


def test_space_of_contradictions_alone_is_refused() -> None:
    space = Space((Dimension("model.trainable_blocks", (1, 2)), Dimension("model.standardize", (True,))), (0,))
    with pytest.raises(ConfigError, match=r"every proposal contradicts itself\. The first: model\.standardize true with"):
        run(3, space=space, check=partial(replace_values, Config()))


def test_rounds_copy_no_former_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of all trials, one for each trial in each round, would take hours for a thousand samples."""
    monkeypatch.setattr(optuna.Study, "trials", property(lambda _: pytest.fail("all trials are copied")))
    assert len(run(12)) == 12
