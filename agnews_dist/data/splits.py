"""Choosing rows: a held-out validation part and limits, both stratified by label and a pure function of the seed."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from agnews_dist.data.rows import Ints, Split
from agnews_dist.errors import DataError

# Different streams of one seed, so that a limit does not choose along the lines of the held-out part.
_STREAMS = {"hold out": 0, "train": 1, "validation": 2, "test": 3}


def choose(labels_N: Ints, num_rows: int, *, seed: int, stream: int) -> Ints:
    """`num_rows` (or all, if fewer) row numbers in ascending order, the classes in their proportions in `labels_N`.

    Random bits come straight from the bit generator, whose stream numpy guarantees, unlike `Generator.choice`.
    """
    num_all = len(labels_N)
    if num_rows >= num_all:
        return np.arange(num_all, dtype=np.int64)
    classes, counts = np.unique(labels_N, return_counts=True)
    # Largest remainder, in integers: every class gets its share rounded down, the rest goes to the largest fractions.
    quotas, remainders = counts * num_rows // num_all, counts * num_rows % num_all
    for place in np.argsort(-remainders, kind="stable")[: num_rows - int(quotas.sum())]:
        quotas[place] += 1
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(num_all), kind="stable")
    chosen = [order[labels_N[order] == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def hold_out_validation(train: Split, *, fraction: float, seed: int) -> tuple[Split, Split]:
    """(train, validation): `fraction` of the rows, at least one and never all, held out.

    Only rows whose text occurs once are held out: a twin left behind in train would be a leak.

    Raises:
        DataError: fewer than two rows, or no text that occurs once.
    """
    if len(train) < 2:
        raise DataError(
            f"train has {len(train)} row ({train.origin.name(0)}): one row cannot be both trained on and held out for "
            "validation. Add rows, or give a directory with train and validation files."
        )
    count_of = Counter(train.texts)
    unique = np.array([i for i, text in enumerate(train.texts) if count_of[text] == 1], dtype=np.int64)
    if not len(unique):
        raise DataError(
            f"no text of train ({train.origin.name(0)} and {len(train) - 1} more) occurs only once: a held-out part would "
            "repeat training texts. Remove the duplicates, or give a directory with train and validation files."
        )
    num_held_out = min(max(1, round(fraction * len(train))), len(train) - 1)
    held_out = unique[choose(train.labels[unique], num_held_out, seed=seed, stream=_STREAMS["hold out"])]
    kept = np.setdiff1d(np.arange(len(train), dtype=np.int64), held_out, assume_unique=True)
    return train.take(kept), train.take(held_out, "validation")


def limit(split: Split, limits: Mapping[str, int | None], *, seed: int) -> Split:
    """`split` with at most `limits[split.name]` rows, in their old order."""
    most = limits.get(split.name)
    if most is None or most >= len(split):
        return split
    return split.take(choose(split.labels, most, seed=seed, stream=_STREAMS[split.name]))
