"""Tables of a data set on the Hugging Face hub, read from its copy in the local cache (see hub_files.py)."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from agnews_dist.data.formats.arrow_file import ArrowTable
from agnews_dist.data.formats.table import Table
from agnews_dist.data.hub_cache import Repository, cache_directory, find_built, find_directory
from agnews_dist.data.hub_files import Request
from agnews_dist.data.local_files import CARD, NO_SPLIT, SPLIT_WORDS, SplitSettings, find_files_by_split, is_saved, open_local
from agnews_dist.errors import DataError

_BUILT_FILE = "dataset_info.json"


def request_data(source: str, revision: str | None, settings: SplitSettings) -> Request:
    """Return the request for the files of a data set on the hub."""
    repository = Repository("dataset", source, revision)
    # A split that is left out is fetched too: a later run from the same cache may want it.
    names = {split: name for split, name in settings.names.items() if name != NO_SPLIT}
    choose = partial(_choose_files, settings=replace(settings, names=names))
    return Request(repository, choose, read_first=(CARD,), find_built=partial(find_built, repository, settings.subset))


def open_hub(source: str, revision: str | None, settings: SplitSettings) -> dict[str, list[Table]]:
    """Open the splits of the data set `source` (`name` or `owner/name`), whose files are in the cache.

    Raises:
        DataError: they are not, or they are damaged; the data set has several subsets, or lacks a split.
    """
    repository = Repository("dataset", source, revision)
    directory = find_directory(repository) or find_built(repository, settings.subset)
    if directory is None:
        raise DataError(
            f"data.source {source!r}: it is neither a path nor in {cache_directory()}. Run 'python -m agnews_dist prepare' "
            "with a network, or set --data.source to a path."
        )
    try:
        is_copy = directory.is_relative_to(cache_directory())
        return open_local(directory, settings) if is_copy else _open_built(directory, source, settings)
    except DataError as error:
        raise DataError(str(error).replace(str(directory), source)) from error


def _choose_files(directory: Path, settings: SplitSettings) -> Sequence[str]:
    """Return the files of a data set that hold its splits, and its card."""
    if is_saved(directory, settings):
        found = [path for path in (directory / (settings.subset or ".")).rglob("*") if path.is_file()]
    else:
        try:
            found = [file for files in find_files_by_split(directory, settings).values() for file in files]
        except OSError as error:  # a dangling link
            raise DataError(
                f"{error.filename} cannot be read: {error.strerror or error}. Remove {directory}, and run prepare again."
            ) from error
    card = [CARD] if (directory / CARD).is_file() else []
    return [*card, *(path.relative_to(directory).as_posix() for path in found)]


def _open_built(directory: Path, source: str, settings: SplitSettings) -> dict[str, list[Table]]:
    """Open what the `datasets` library has built in its own cache: arrow streams, one or more per split."""
    try:
        info = json.loads((directory / _BUILT_FILE).read_bytes())
        sizes = {str(name): len(split.get("shard_lengths") or [0]) for name, split in info["splits"].items()}
        features = info["features"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{directory / _BUILT_FILE} cannot be read: {type(error).__name__} {error}. Remove its folder, and run prepare."
        ) from error
    chosen = {split: settings.find(split, list(sizes), source) for split in SPLIT_WORDS}
    if not any(chosen.values()):
        raise DataError(
            f"data set {source!r} has the splits {', '.join(sizes)}: none is train, validation or test. "
            "Set --data.splits.train to one of them."
        )
    found: dict[str, list[Table]] = {}
    for split, name in ((split, name) for split, name in chosen.items() if name is not None):
        files = sorted(directory.glob(f"*-{name}.arrow")) or sorted(directory.glob(f"*-{name}-*-of-*.arrow"))
        if len(files) != sizes[name]:
            raise DataError(
                f"{directory}: it has {len(files)} of {sizes[name]} files of split {name!r}. Remove it, and run prepare again."
            )
        found[split] = [ArrowTable(file, f"{source} split {name}", features) for file in files]
    return found
