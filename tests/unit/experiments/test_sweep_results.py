"""Scores of a sweep over its seeds."""

import pytest
from scipy.stats import binomtest, t

from agnews_dist.experiments.sweep_results import spread


def test_interval_over_seeds_is_students() -> None:
    found = spread([0.90, 0.91, 0.92], "accuracy", 200)
    assert found["interval"] == pytest.approx(t.interval(0.95, 2, loc=0.91, scale=0.01 / 3**0.5))
    assert found["interval_over"] == "seeds"


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_interval_of_equal_seeds_is_wilsons_over_the_rows(num_seeds: int) -> None:
    found = spread([0.9] * num_seeds, "accuracy", 200)
    wilson = binomtest(180, 200).proportion_ci(0.95, method="wilson")
    assert found["interval"] == pytest.approx((wilson.low, wilson.high))
    assert found["interval_over"] == "rows"
    # A loss is not a share of the rows.
    assert spread([0.4] * num_seeds, "loss", 200)["interval"] is None
