"""Ranks of settings, and survivors of successive halving."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_dist.experiments.standings import MemberResult, choose_survivors, count_rungs, place_rungs, rank_settings


def result(
    setting: int, seed: int, accuracy: float, *, loss: float = 1.0, state="finished", num_seeds: int = 2
) -> MemberResult:
    return MemberResult(
        member=setting * num_seeds + seed,
        setting=setting,
        values={"optim.lr": setting},
        seed=seed,
        state=state,
        accuracy=accuracy,
        macro_f1=1 - accuracy,
        loss=loss,
    )


def order(results: list[MemberResult], metric="accuracy") -> list[int]:
    return [each.setting for each in rank_settings(results, 2, metric)]


def test_settings_rank_by_the_mean_over_their_seeds() -> None:
    results = [result(0, 0, 0.9), result(0, 1, 0.5), result(1, 0, 0.8), result(1, 1, 0.8)]
    assert order(results) == [1, 0]
    assert order(results, "macro_f1") == [0, 1]
    assert rank_settings(results, 2, "accuracy")[1].deviation("accuracy") == pytest.approx(0.4 / math.sqrt(2))


def test_ties_go_to_the_lower_loss_and_then_to_the_first() -> None:
    assert order([result(0, 0, 0.5, loss=2.0), result(1, 0, 0.5, loss=1.0), result(2, 0, 0.5, loss=1.0)]) == [1, 2, 0]
    assert order([result(0, 0, 0.9, loss=2.0), result(1, 0, 0.5, loss=1.0)], "loss") == [1, 0]


def test_halved_and_diverged_settings_come_last() -> None:
    results = [
        result(0, 0, 0.99, state="diverged"),
        result(0, 1, 0.99),
        result(1, 0, 0.98, state="halved"),
        result(2, 0, 0.1),
        result(3, 0, math.nan, loss=math.nan, state="diverged"),
        result(4, 0, 0.99, loss=math.nan),
    ]
    standings = rank_settings(results, 2, "accuracy")
    assert [each.setting for each in standings] == [2, 4, 1, 0, 3]
    assert [each.state for each in standings] == ["1 of 2", "1 of 2", "halved", "diverged", "diverged"]


@given(st.integers(1, 40), st.integers(2, 5))
def test_halving_ends_with_one_setting(num_settings: int, factor: int) -> None:
    left = {*range(num_settings)}
    for _ in range(count_rungs(num_settings, factor)):
        results = [result(setting, seed, setting / 100) for setting in left for seed in (0, 1)]
        before, left = left, choose_survivors(results, 2, "accuracy", factor=factor)
        assert len(left) == max(1, -(-len(before) // factor))
        assert left == {*sorted(before)[-len(left) :]}, "the best survive"
    assert left == {num_settings - 1}


def test_diverged_settings_never_survive() -> None:
    results = [result(0, 0, 0.5), *(result(setting, 0, math.nan, loss=math.nan, state="diverged") for setting in (1, 2))]
    assert choose_survivors(results, 1, "accuracy", factor=2) == {0}
    assert choose_survivors(results[1:], 1, "accuracy", factor=2) == set()


def test_rungs_are_evaluations_of_their_own_before_the_end() -> None:
    assert place_rungs(3, 2, [10, 20, 30, 40, 80]) == [10, 20, 40]
    assert place_rungs(2, 3, [9, 18, 27]) == [9, 18]
    assert place_rungs(2, 3, [45, 90]) == [45]
    assert place_rungs(2, 3, [90]) == []
