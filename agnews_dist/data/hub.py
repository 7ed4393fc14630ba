"""Rows of a data set on the Hugging Face hub, or of its copy in the local cache (HF_HOME)."""

from agnews_dist.data.formats import class_names_of
from agnews_dist.data.local_files import SPLIT_WORDS
from agnews_dist.data.rows import Origin, RawRows, check_columns
from agnews_dist.errors import DataError


def read_hub(source: str, revision: str | None) -> dict[str, RawRows]:
    """The splits of the data set `source` (`name` or `owner/name`).

    Processes that load at once share the cache of `datasets`, which has file locks of its own.

    Raises:
        DataError: it is not there, cannot be reached, or lacks a column.
    """
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source, revision=revision)
    except MemoryError:
        raise
    except Exception as error:  # from ConnectionError (offline) to ValueError (several configurations)
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0].rstrip('.:') if lines else 'no details'}"
        raise DataError(
            f"data set {source!r} cannot be loaded from the hub ({reason}): there are no rows to work on. Check the id, "
            "--data.revision and the network; without a network set --data.source to a local directory or file (parquet, csv, "
            "jsonl), or run 'python -m agnews_dist prepare' on a machine that has one and bring its cache (HF_HOME) here."
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    splits: dict[str, RawRows] = {}
    for name, words in SPLIT_WORDS.items():
        for word in words:
            if word not in loaded or name in splits:
                continue
            rows = loaded[word]
            place = f"{source} split {word}"
            check_columns(place, rows.column_names)
            texts, labels = list(rows["text"]), list(rows["label"])
            splits[name] = RawRows(texts, labels, Origin.of_file(place, len(texts)), class_names_of(rows.features))
    if not splits:
        raise DataError(
            f"data set {source!r} has the splits {', '.join(map(str, loaded))}, but neither train, validation nor test: it is "
            "unclear what to train on. Choose another data set, or save the split you want as a local file."
        )
    return splits
