"""Weights of the classes in the loss, from `optim.class_weights` and the training labels. Needs numpy only."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.rows import list_first
from agnews_dist.errors import ConfigError, count_noun

Requested = Literal["none", "balanced"] | tuple[float, ...]
"""The setting: none, balanced, or one weight per class."""


def check_class_weights(requested: Requested, class_names: Sequence[str]) -> None:
    """Check that a list has one weight per class.

    Raises:
        ConfigError: it has more or fewer.
    """
    if isinstance(requested, tuple) and len(requested) != len(class_names):
        raise ConfigError(
            f"optim.class_weights {list_first(requested, '{:g}'.format)}: it has {count_noun(len(requested), 'weight')} for "
            f"{len(class_names):,} classes. Give one per class, in the order {list_first(class_names, str)}; or balanced."
        )


def compute_class_weights(requested: Requested, labels_N: NDArray[np.int64], *, num_classes: int) -> NDArray[np.float64] | None:
    """Return the weight of each class, shape (C,); None: all count the same.

    Balanced weights are scikit-learn's: examples / (classes x examples of the class). A class without examples gets 1.

    >>> compute_class_weights("balanced", np.array([0, 0, 0, 1]), num_classes=2).tolist()
    [0.6666666666666666, 2.0]
    """
    if requested == "none":
        return None
    if requested != "balanced":
        return np.array(requested, np.float64)
    counts_C = np.bincount(labels_N, minlength=num_classes)
    return np.where(counts_C > 0, len(labels_N) / (num_classes * np.maximum(counts_C, 1)), 1.0)
