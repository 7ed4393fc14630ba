"""From a source's name to checked rows: hub, local files or synthetic text, with a validation part and limits applied."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from agnews_dist.data.hub import read_hub
from agnews_dist.data.local_files import looks_local, read_local
from agnews_dist.data.rows import Corpus, Ints, Origin, RawRows, Split, check_corpus, checked_split, fingerprint
from agnews_dist.data.synthetic import CLASS_NAMES, SPLITS, generate
from agnews_dist.errors import DataError

__all__ = ["SYNTHETIC", "Corpus", "Split", "check_corpus", "check_source", "load_corpus"]

SYNTHETIC = "synthetic"
"""The source that needs neither a file nor a network (synthetic.py)."""
SYNTHETIC_ROWS = {"train": 4_000, "validation": 500, "test": 500}


def load_corpus(
    source: str,
    *,
    revision: str | None,
    validation_fraction: float,
    limits: Mapping[str, int | None],
    seed: int,
    hold_out: bool = True,
) -> Corpus:
    """The rows of `source`: 'synthetic', an existing directory or file, or else a hub id.

    In comes where the text is; out come the splits train, validation and test as far as there are such. With `hold_out`,
    train must be there, and gives `validation_fraction` of its rows where the source has no validation split. `limits` keeps
    at most so many rows per split name. Both choices are stratified and depend on `seed` and the rows alone.

    Raises:
        DataError: the source cannot be read, or its rows are not what they should be; names file and row.
    """
    raw = _read(source, revision, seed)
    class_names = _class_names(raw)
    splits = {name: checked_split(name, rows, class_names) for name, rows in raw.items()}
    if hold_out:
        if "train" not in splits:
            raise DataError(
                f"{source} has no train split (only {', '.join(splits)}): there is nothing to train on. Add a file whose name "
                "begins with train."
            )
        if "validation" not in splits:
            train, validation = hold_out_validation(splits["train"], fraction=validation_fraction, seed=seed)
            splits = {**splits, "train": train, "validation": validation}
    splits = {name: limit(splits[name], limits, seed=seed) for name in SPLITS if name in splits}
    return Corpus(splits, class_names, fingerprint(splits, class_names))


def check_source(source: str) -> None:
    """All that can be said of it before anything is loaded: a wrong path shall not wait for a model from the hub.

    Raises:
        DataError: it reads like a path, and nothing is there.
    """
    if source != SYNTHETIC and not Path(source).expanduser().exists() and looks_local(source):
        raise DataError(
            f"data.source {source!r} does not exist: there are no rows to work on. Check the path (the working directory is "
            f"{Path.cwd()}), or set --data.source to a hub id such as fancyzhx/ag_news, or to 'synthetic'."
        )


def _read(source: str, revision: str | None, seed: int) -> dict[str, RawRows]:
    if source == SYNTHETIC:
        return {name: _synthetic(name, num_rows, seed) for name, num_rows in SYNTHETIC_ROWS.items()}
    check_source(source)
    path = Path(source).expanduser()
    return read_local(path) if path.exists() else read_hub(source, revision)


def _synthetic(split: str, num_rows: int, seed: int) -> RawRows:
    rows = generate(num_rows, seed, split)
    origin = Origin.of_file(f"{SYNTHETIC} {split}", num_rows)
    return RawRows([text for text, _ in rows], [label for _, label in rows], origin, CLASS_NAMES)


def _class_names(raw: Mapping[str, RawRows]) -> tuple[str, ...]:
    """From the first split whose ClassLabel feature tells; else AG News'."""
    told = {name: rows.class_names for name, rows in raw.items() if rows.class_names is not None}
    if len(set(told.values())) > 1:
        listing = "; ".join(f"{name}: {', '.join(names)}" for name, names in told.items())
        raise DataError(
            f"the splits have different classes ({listing}): a label would change its meaning between them. Write all splits "
            "with the same class names."
        )
    return next(iter(told.values()), CLASS_NAMES)


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
