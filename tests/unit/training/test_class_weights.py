"""Class weights: scikit-learn's formula, a list as it is, and a list of another length refused with both numbers."""

import numpy as np
import pytest

from agnews_dist.errors import ConfigError
from agnews_dist.training.class_weights import check_class_weights, compute_class_weights

LABELS_N = np.array([2, 0, 0, 0, 0, 0, 2, 3])


def test_balanced_weights_are_those_of_scikit_learn():
    found_C = compute_class_weights("balanced", LABELS_N, num_classes=4)
    assert found_C is not None
    assert found_C.tolist() == [8 / (4 * 5), 1.0, 8 / (4 * 2), 8 / 4], "a class without rows has weight 1"
    assert found_C[LABELS_N].sum() == pytest.approx(8 * 3 / 4), "every class with rows has the same total"


def test_list_is_taken_as_it_is_and_none_means_equal_weights():
    found_C = compute_class_weights((0.1, 2.0, 3.0, 4.0), LABELS_N, num_classes=4)
    assert found_C is not None
    assert (found_C.tolist(), found_C.dtype) == ([0.1, 2.0, 3.0, 4.0], np.float64)
    assert compute_class_weights("none", LABELS_N, num_classes=4) is None


@pytest.mark.parametrize("requested", ["none", "balanced", (1.0, 2.0)])
def test_one_weight_per_class_is_accepted(requested):
    check_class_weights(requested, ("bad", "good"))


@pytest.mark.parametrize(
    ("num_weights", "names", "message"),
    [
        (3, ("bad", "good"), "1, 1, 1: it has 3 weights for 2 classes. Give one per class, in the order bad, good; "
         "or balanced."),
        (1, ("bad", "good"), "1: it has 1 weight for 2 classes. Give one per class, in the order bad, good; or balanced."),
        (10_000, tuple("abcdefghij"), "1, 1, 1, 1, 1 and 9,995 more: it has 10,000 weights for 10 classes. Give one per class, "
         "in the order a, b, c, d, e and 5 more; or balanced."),
    ],
)  # fmt: skip
def test_another_number_of_weights_is_refused_with_both_numbers(num_weights, names, message):
    with pytest.raises(ConfigError) as raised:
        check_class_weights((1.0,) * num_weights, names)
    assert str(raised.value) == f"optim.class_weights {message}"
    assert raised.value.exit_code == 2
