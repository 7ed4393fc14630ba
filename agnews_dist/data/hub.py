"""Rows of a data set on the Hugging Face hub, or of its copy in the local cache (HF_HOME)."""

from agnews_dist.data.formats import read_class_names
from agnews_dist.data.hugging_face import silence_datasets, translate_errors
from agnews_dist.data.local_files import SPLIT_WORDS
from agnews_dist.data.rows import Origin, RawRows, check_columns
from agnews_dist.errors import DataError


def read_hub(source: str, revision: str | None) -> dict[str, RawRows]:
    """Read the splits of the data set `source` (`name` or `owner/name`).

    Processes that load at once share the cache of `datasets`, which has its own file locks.

    Raises:
        DataError: the data set does not exist, cannot be reached, or lacks a split or a column.
    """
    import datasets

    def make_error(reason: str) -> DataError:
        return DataError(
            f"data set {source!r} cannot be loaded from the hub: {reason}. Check the id, --data.revision and the network. "
            "Offline, set --data.source to a local directory or file, or run 'python -m agnews_dist prepare' on a machine "
            "with a network and copy its cache (HF_HOME)."
        )

    # Logs stay visible: a warning says when the hub is offline and a cached version is used.
    with silence_datasets(logs=False), translate_errors(make_error):
        loaded = datasets.load_dataset(source, revision=revision)
    splits: dict[str, RawRows] = {}
    for name, words in SPLIT_WORDS.items():
        word = next((word for word in words if word in loaded), None)
        if word is not None:
            rows = loaded[word]
            label = f"{source} split {word}"
            check_columns(label, rows.column_names)
            texts, labels = list(rows["text"]), list(rows["label"])
            splits[name] = RawRows(texts, labels, Origin.of_file(label, len(texts)), read_class_names(rows.features))
    if not splits:
        raise DataError(
            f"data set {source!r} has the splits {', '.join(map(str, loaded))}: none is train, validation or test. "
            "Choose another data set, or save the split you want as a local file."
        )
    return splits
