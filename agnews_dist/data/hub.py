"""Tables of a data set on the Hugging Face hub, or of its copy in the local cache (HF_HOME)."""

from agnews_dist.data.formats.arrow_file import DatasetTable
from agnews_dist.data.formats.table import Table
from agnews_dist.data.hugging_face import silence_datasets, translate_errors
from agnews_dist.data.local_files import SPLIT_WORDS, SplitSettings
from agnews_dist.errors import DataError


def open_hub(source: str, revision: str | None, settings: SplitSettings) -> dict[str, list[Table]]:
    """Open the splits of the data set `source` (`name` or `owner/name`).

    Processes that load at once share the cache of `datasets`, which has its own file locks.

    Raises:
        DataError: the data set does not exist, cannot be reached, has several subsets, or lacks a split.
    """
    import datasets

    def make_error(reason: str) -> DataError:
        if "Config name is missing" in reason or "BuilderConfig" in reason:
            return DataError(f"data set {source!r} needs another subset: {reason}. Set --data.subset to one of them.")
        return DataError(
            f"data set {source!r} cannot be loaded from the hub: {reason}. Check the id, --data.revision and the network. "
            "Offline, set --data.source to a local directory or file, or run 'python -m agnews_dist prepare' on a machine "
            "with a network and copy its cache (HF_HOME)."
        )

    # Logs stay visible: a warning says when the hub is offline and a cached version is used.
    with silence_datasets(logs=False), translate_errors(make_error):
        loaded = datasets.load_dataset(source, name=settings.subset, revision=revision)
    names = [str(name) for name in loaded]
    chosen = {split: settings.find(split, names, source) for split in SPLIT_WORDS}
    found = {name: word for name, word in chosen.items() if word is not None}
    if not found:
        raise DataError(
            f"data set {source!r} has the splits {', '.join(names)}: none is train, validation or test. "
            "Set --data.splits.train to one of them, or choose another data set."
        )
    return {split: [DatasetTable(loaded[word], f"{source} split {word}")] for split, word in found.items()}
