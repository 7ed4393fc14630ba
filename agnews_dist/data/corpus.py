"""The corpus of a source: checked splits of the hub, local files or synthetic text, with held-out validation and limits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from agnews_dist.data.classes import Classes, decide_classes, read_class_names
from agnews_dist.data.columns import Columns, ColumnSettings
from agnews_dist.data.exclusion import exclude_rows, read_exclusion
from agnews_dist.data.hub import open_hub
from agnews_dist.data.local_files import SplitSettings, exists, is_local_path, open_local
from agnews_dist.data.quality import hash_texts, normalise
from agnews_dist.data.rows import Corpus, Ints, Origin, RawRows, Split, hash_corpus, list_first, read_rows
from agnews_dist.data.synthetic import CLASS_NAMES, SPLITS, generate
from agnews_dist.data.texts import Texts
from agnews_dist.errors import DataError

SYNTHETIC = "synthetic"
"""Source that needs neither file nor network (synthetic.py)."""
IN_MEMORY = "in_memory"
"""Name of a source whose rows were given in Python (given_rows.py). They are not on disk."""
SYNTHETIC_ROWS = {"train": 4_000, "validation": 500, "test": 500}
_STREAMS = {"hold out": 0, "train": 1, "validation": 2, "test": 3}
"""Random streams of one seed, so that the choices are independent."""


ReadRows = Callable[[], Mapping[str, RawRows]]
"""Reader of the rows of some splits."""


@dataclass(frozen=True)
class Source:
    """The name of a data set with the settings of reading it."""

    name: str
    """'synthetic', an existing directory or file, or else a hub id."""
    revision: str | None = None
    """Commit or tag of a data set on the hub."""
    splits: SplitSettings = field(default_factory=SplitSettings)
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    class_names: Sequence[str] | None = None
    """Names of the classes in index order, or one name of a file with them; None: from the data."""
    cache_dir: Path | None = None
    """Place of texts that do not fit in memory."""
    exclude: Path | None = None
    """File that names training rows to leave out (exclusion.py)."""
    read_given: ReadRows | None = None
    """Reader of rows that were given in Python; the name is IN_MEMORY then."""


def load_corpus(
    source: Source,
    *,
    validation_fraction: float,
    limits: Mapping[str, int | None],
    seed: int,
    hold_out: bool = True,
    model_classes: tuple[str, ...] | None = None,
) -> Corpus:
    """Load the splits of a source.

    Args:
        source: what to read.
        validation_fraction: part of train that becomes validation, if the source has no validation split.
        limits: maximum of rows per split name; None: no maximum.
        seed: decides the synthetic text, the held-out rows and the rows within the limits. Choices keep the class proportions.
        hold_out: require train, and hold out validation. False: take the splits as they are.
        model_classes: classes of a saved model, which labels are to mean; None: the classes are those of the data. With them,
            and without `hold_out`, every split may be without labels, not only test.

    Raises:
        DataError: the source cannot be read, or its rows are wrong; names file and row.
    """
    given = read_class_names(source.class_names) or model_classes
    needs_labels = hold_out or model_classes is None
    # A label column that is set must be there, except in the test split of a training.
    raw = _read(source, seed, needs_label=needs_labels or source.columns.label is not None)
    if hold_out and "train" not in raw:
        raise DataError(
            f"{source.name} has no train split (only {', '.join(raw)}): training needs one. Add a file whose name begins with "
            "train, or set --data.splits.train."
        )
    is_model = source.class_names is None and model_classes is not None
    classes = decide_classes(raw, given, source=source.name, is_model=is_model, needs_labels=needs_labels)
    splits = {name: Split(name, rows.texts, classes.labels[name], rows.origin) for name, rows in raw.items()}
    if hold_out and "validation" not in splits:
        train, validation = hold_out_validation(splits["train"], fraction=validation_fraction, seed=seed)
        splits = {**splits, "train": train, "validation": validation}
    splits = {name: limit_rows(splits[name], limits, seed=seed) for name in SPLITS if name in splits}
    excluded, notes = None, tuple[str, ...]()
    if source.exclude is not None and "train" in splits:
        # Last: held-out rows and limits are the same with and without it.
        origins = {name: rows.origin for name, rows in raw.items()}
        splits, excluded, notes = exclude_rows(splits, origins, read_exclusion(source.exclude), source.name)
    facts, findings = _describe(raw, classes, splits), classes.findings
    if excluded is not None:
        facts["left out"] = excluded
    if is_model and classes.names != given:
        facts["classes"] += "; the model names none, and its LABEL_0 is taken for the first, and so on"
    facts |= {name: "without labels: it is predicted, not scored" for name, split in splits.items() if (split.labels < 0).all()}
    return Corpus(splits, classes.names, hash_corpus(splits, classes.names), facts, findings, notes)


def _describe(raw: Mapping[str, RawRows], classes: Classes, splits: Mapping[str, Split]) -> dict[str, str]:
    """Return the facts for the header: files, columns, classes, and how files were read."""
    files = {name: list_first(of.origin.files, str) if name in raw else "held out of train" for name, of in splits.items()}
    columns = dict.fromkeys(str(rows.columns) for rows in raw.values())
    facts = {
        "splits": "; ".join(f"{name}: {listing}" for name, listing in files.items()),
        "columns": "; ".join(columns),
        "classes": f"{len(classes.names):,}: {list_first(classes.names, str)}",
    }
    if notes := dict.fromkeys(note for rows in raw.values() for note in rows.notes):
        facts["read as"] = "; ".join(notes)
    return facts


def check_source(source: str) -> None:
    """Check the source before anything is loaded, so that a wrong path does not wait for a model from the hub.

    Raises:
        DataError: `source` reads like a path that does not exist.
    """
    if not source.strip():
        raise DataError(
            "data.source is empty: it must name the data. Set it to a path, a hub id such as fancyzhx/ag_news or synthetic."
        )
    if source == IN_MEMORY:
        raise DataError(
            f"data.source {IN_MEMORY}: the rows were given in Python and were not kept. Give them to fit again, or set "
            "--data.source to a file of them."
        )
    if source != SYNTHETIC and is_local_path(source) and not exists(Path(source)):
        raise DataError(
            f"data.source {source!r} does not exist: no such path from {Path.cwd()}. Correct it, or set --data.source to a hub "
            "id such as fancyzhx/ag_news, or to 'synthetic'."
        )


def is_hub_id(source: str) -> bool:
    """Return whether the source is a data set on the hub.

    Raises:
        DataError: `source` reads like a path that does not exist.
    """
    check_source(source)
    return source != SYNTHETIC and not exists(Path(source))


def _read(source: Source, seed: int, *, needs_label: bool) -> dict[str, RawRows]:
    """Read the rows of every split that is not left out; `needs_label`: all but test must have a label column."""
    if source.read_given is not None:
        given = source.read_given()
        return {name: given[name] for name in SPLITS if name in given}
    wanted = [name for name in SPLITS if not source.splits.is_left_out(name)]
    if source.name == SYNTHETIC:
        return {name: _generate(name, seed) for name in wanted}
    if is_hub_id(source.name):
        tables = open_hub(source.name, source.revision, source.splits)
    else:
        tables = open_local(Path(source.name), source.splits)
    return {
        name: read_rows(
            name, tables[name], source.columns, needs_label=needs_label and name != "test", directory=source.cache_dir
        )
        for name in wanted
        if name in tables
    }


def _generate(name: str, seed: int) -> RawRows:
    """Generate a split of synthetic text."""
    rows = generate(SYNTHETIC_ROWS[name], seed, name)
    labels_N = np.array([label for _, label in rows], dtype=np.int32)
    texts, origin = Texts.of([text for text, _ in rows]), Origin.of_file(f"{SYNTHETIC} {name}", len(rows))
    return RawRows(texts, tuple(range(len(CLASS_NAMES))), labels_N, origin, Columns(("text",), "label"), CLASS_NAMES)


def choose_rows(labels_N: Ints, num_rows: int, *, seed: int, stream: int, keep: int = 0) -> Ints:
    """Choose up to `num_rows` row numbers, ascending, with the class proportions of `labels_N`.

    At least `keep` rows of every class are not chosen.

    Random bits come from the bit generator: numpy guarantees its stream across versions, but not `Generator.choice`.
    """
    num_all = len(labels_N)
    if num_rows >= num_all and not keep:
        return np.arange(num_all, dtype=np.int64)
    _, counts = np.unique(labels_N, return_counts=True)
    # Largest remainder in integers: quotas are rounded down, and the largest fractions get one more row.
    quotas, remainders = counts * num_rows // num_all, counts * num_rows % num_all
    for index in np.argsort(-remainders, kind="stable")[: num_rows - int(quotas.sum())]:
        quotas[index] += 1
    quotas = np.minimum(quotas, counts - keep)
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(num_all), kind="stable")
    # By class, and within a class in random order: row k of a class is chosen if k is below its quota.
    order = order[np.argsort(labels_N[order], kind="stable")]
    rank_N = np.arange(num_all) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[rank_N < np.repeat(quotas, counts)]).astype(np.int64)


def hold_out_validation(train: Split, *, fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out `fraction` of the rows, at least one and never all; returns (train, validation).

    Only rows whose text occurs once, also but for case, punctuation and white space, are held out: a duplicate in train would
    leak into validation. Every class keeps a row in train.

    Raises:
        DataError: there are fewer than two rows, or no row can be held out.
    """
    if len(train) < 2:
        raise DataError(
            f"train has {len(train)} row ({train.origin.name(0)}): training and validation need one each. Add "
            "rows, or give a directory with train and validation files."
        )
    _, group_N, count_G = np.unique(hash_texts(train.texts, normalise), return_inverse=True, return_counts=True)
    unique = np.flatnonzero(count_G[group_N] == 1)
    if not len(unique):
        raise DataError(
            f"no text of train ({train.origin.name(0)} and {len(train) - 1} more) occurs only once: validation would repeat "
            "training texts. Remove the duplicates, or add a validation file."
        )
    counts_C = np.bincount(train.labels)
    unique = unique[counts_C[train.labels[unique]] > 1]
    if not len(unique):
        raise DataError(
            f"no class of train ({train.origin.name(0)} and {len(train) - 1} more) has two rows with different "
            "texts: a held-out row would leave its class without any. Add rows, or a validation file."
        )
    num_held_out = min(max(1, round(fraction * len(train))), len(train) - 1)
    # A class whose other rows are all duplicates keeps them; only a class of unique rows must keep one.
    are_all_unique = np.bincount(train.labels[unique], minlength=len(counts_C)) == counts_C
    keep = int(are_all_unique.any())
    held_out = unique[choose_rows(train.labels[unique], num_held_out, seed=seed, stream=_STREAMS["hold out"], keep=keep)]
    kept = np.setdiff1d(np.arange(len(train), dtype=np.int64), held_out, assume_unique=True)
    return train.take(kept), train.take(held_out, "validation")


def limit_rows(split: Split, limits: Mapping[str, int | None], *, seed: int) -> Split:
    """Keep at most `limits[split.name]` rows, in their order."""
    most = limits.get(split.name)
    if most is None or most >= len(split):
        return split
    return split.take(choose_rows(split.labels, most, seed=seed, stream=_STREAMS[split.name]))
