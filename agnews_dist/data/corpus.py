"""The corpus of a source: checked splits of the hub, local files or synthetic text, with held-out validation and limits."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from agnews_dist.data.hub import read_hub
from agnews_dist.data.local_files import is_local_path, read_local
from agnews_dist.data.rows import Corpus, Ints, Origin, RawRows, Split, check_split, hash_corpus
from agnews_dist.data.synthetic import CLASS_NAMES, SPLITS, generate
from agnews_dist.errors import DataError

SYNTHETIC = "synthetic"
"""Source that needs neither file nor network (synthetic.py)."""
SYNTHETIC_ROWS = {"train": 4_000, "validation": 500, "test": 500}
_STREAMS = {"hold out": 0, "train": 1, "validation": 2, "test": 3}
"""Random streams of one seed, so that the choices are independent."""


def load_corpus(
    source: str,
    *,
    revision: str | None,
    validation_fraction: float,
    limits: Mapping[str, int | None],
    seed: int,
    hold_out: bool = True,
) -> Corpus:
    """Load the splits of `source`: 'synthetic', an existing directory or file, or else a hub id.

    Args:
        revision: of a data set on the hub.
        validation_fraction: part of train that becomes validation, if the source has no validation split.
        limits: maximum of rows per split name; None: no maximum.
        seed: decides the synthetic text, the held-out rows and the rows within the limits. Choices keep the class proportions.
        hold_out: require train, and hold out validation. False: take the splits as they are.

    Raises:
        DataError: the source cannot be read, or its rows are wrong; names file and row.
    """
    raw = _read(source, revision, seed)
    class_names = _class_names(raw)
    splits = {name: check_split(name, rows, class_names) for name, rows in raw.items()}
    if hold_out:
        if "train" not in splits:
            raise DataError(
                f"{source} has no train split (only {', '.join(splits)}): training needs one. Add a file whose name begins "
                "with train."
            )
        if "validation" not in splits:
            train, validation = hold_out_validation(splits["train"], fraction=validation_fraction, seed=seed)
            splits = {**splits, "train": train, "validation": validation}
    splits = {name: limit_rows(splits[name], limits, seed=seed) for name in SPLITS if name in splits}
    return Corpus(splits, class_names, hash_corpus(splits, class_names))


def check_source(source: str) -> None:
    """Check the source before anything is loaded, so that a wrong path does not wait for a model from the hub.

    Raises:
        DataError: `source` reads like a path that does not exist.
    """
    if source != SYNTHETIC and not Path(source).exists() and is_local_path(source):
        raise DataError(
            f"data.source {source!r} does not exist: no such path from {Path.cwd()}. Correct it, or set --data.source to a hub "
            "id such as fancyzhx/ag_news, or to 'synthetic'."
        )


def _read(source: str, revision: str | None, seed: int) -> dict[str, RawRows]:
    if source == SYNTHETIC:
        raw: dict[str, RawRows] = {}
        for name, num_rows in SYNTHETIC_ROWS.items():
            texts, labels = zip(*generate(num_rows, seed, name), strict=True)
            raw[name] = RawRows(texts, labels, Origin.of_file(f"{SYNTHETIC} {name}", num_rows), CLASS_NAMES)
        return raw
    check_source(source)
    path = Path(source)
    return read_local(path) if path.exists() else read_hub(source, revision)


def _class_names(raw: Mapping[str, RawRows]) -> tuple[str, ...]:
    """Return the class names of the ClassLabel features, or those of AG News if there are none."""
    found = {name: rows.class_names for name, rows in raw.items() if rows.class_names is not None}
    if len(set(found.values())) > 1:
        listing = "; ".join(f"{name}: {', '.join(names)}" for name, names in found.items())
        raise DataError(
            f"the splits have different classes ({listing}): labels would differ in meaning. Write all splits with "
            "the same class names."
        )
    return next(iter(found.values()), CLASS_NAMES)


def choose_rows(labels_N: Ints, num_rows: int, *, seed: int, stream: int) -> Ints:
    """Choose up to `num_rows` row numbers, ascending, with the class proportions of `labels_N`.

    Random bits come from the bit generator: numpy guarantees its stream across versions, but not `Generator.choice`.
    """
    num_all = len(labels_N)
    if num_rows >= num_all:
        return np.arange(num_all, dtype=np.int64)
    classes, counts = np.unique(labels_N, return_counts=True)
    # Largest remainder in integers: quotas are rounded down, and the largest fractions get one more row.
    quotas, remainders = counts * num_rows // num_all, counts * num_rows % num_all
    for index in np.argsort(-remainders, kind="stable")[: num_rows - int(quotas.sum())]:
        quotas[index] += 1
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(num_all), kind="stable")
    chosen = [order[labels_N[order] == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def hold_out_validation(train: Split, *, fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out `fraction` of the rows, at least one and never all; returns (train, validation).

    Only rows whose text occurs once are held out, or a duplicate in train would leak into validation.

    Raises:
        DataError: there are fewer than two rows, or no text occurs only once.
    """
    if len(train) < 2:
        raise DataError(
            f"train has {len(train)} row ({train.origin.name(0)}): training and validation need one each. Add "
            "rows, or give a directory with train and validation files."
        )
    count_of = Counter(train.texts)
    unique = np.array([i for i, text in enumerate(train.texts) if count_of[text] == 1], dtype=np.int64)
    if not len(unique):
        raise DataError(
            f"no text of train ({train.origin.name(0)} and {len(train) - 1} more) occurs only once: validation would repeat "
            "training texts. Remove the duplicates, or add a validation file."
        )
    num_held_out = min(max(1, round(fraction * len(train))), len(train) - 1)
    held_out = unique[choose_rows(train.labels[unique], num_held_out, seed=seed, stream=_STREAMS["hold out"])]
    kept = np.setdiff1d(np.arange(len(train), dtype=np.int64), held_out, assume_unique=True)
    return train.take(kept), train.take(held_out, "validation")


def limit_rows(split: Split, limits: Mapping[str, int | None], *, seed: int) -> Split:
    """Keep at most `limits[split.name]` rows, in their order."""
    most = limits.get(split.name)
    if most is None or most >= len(split):
        return split
    return split.take(choose_rows(split.labels, most, seed=seed, stream=_STREAMS[split.name]))
