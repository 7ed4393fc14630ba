"""From a source's name to checked rows: hub, local files or synthetic text, with a validation part and limits applied."""

from collections.abc import Mapping
from pathlib import Path

from agnews_dist.data.checks import check_corpus, checked_split, fingerprint
from agnews_dist.data.hub import read_hub
from agnews_dist.data.local_files import looks_local, read_local
from agnews_dist.data.rows import Corpus, Origin, RawRows, Split
from agnews_dist.data.splits import hold_out_validation, limit
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
