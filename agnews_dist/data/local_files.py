"""Splits of a local source: a file, a directory in the layout of hub data sets, parts of Spark or Dask, `save_to_disk`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agnews_dist.data.dataset_card import patterns_by_split, read_card_classes, read_configs
from agnews_dist.data.formats.arrow_file import ArrowTable
from agnews_dist.data.formats.registry import PART_SUFFIX, SUFFIXES, format_of, is_data_file, open_table
from agnews_dist.data.formats.streams import COMPRESSIONS, is_hidden, open_bytes, split_suffix
from agnews_dist.data.formats.table import Table
from agnews_dist.data.rows import list_first
from agnews_dist.errors import DataError, did_you_mean

SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}
"""Names of a split in files, folders and on the hub: `train-00000-of-00001.parquet`, `dev.csv`, `train/0000.parquet`."""
CARD = "README.md"
"""Name of the card of a data set."""
NO_SPLIT = "none"
"""Value of `data.splits.<name>` that leaves a split out."""
_PART = re.compile(r"(^|[-_.])part[-_.]?\d+|^\d+\.part$|^data-\d+-of-\d+", re.IGNORECASE)
"""Names of the parts that Spark, Dask and `datasets` write."""
_SHARD = re.compile(r"(.*?)-(\d{1,6})-of-(\d{1,6})(\..*)?")
"""One of several files of a split: `train-00000-of-00002.parquet`."""


@dataclass(frozen=True)
class SplitSettings:
    """The part of a source that is read, and the names of its splits."""

    subset: str | None = None
    names: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    """Split -> name in the source, or `none`; absent or None: found by the usual names."""
    unnamed: str = "train"
    """The split that data without any of these names is."""

    def is_left_out(self, split: str) -> bool:
        """Return whether the split is not to be read."""
        return self.names.get(split) == NO_SPLIT

    def find(self, split: str, available: Sequence[str], source: str) -> str | None:
        """Return which of the names `available` is the split; None: none of them, or it is left out.

        Raises:
            DataError: the name that is set is not available.
        """
        if self.is_left_out(split):
            return None
        name = self.names.get(split)
        if name is None:
            taken = set(self.names.values())
            return next((word for word in SPLIT_WORDS[split] if word in available and word not in taken), None)
        if name not in available:
            raise DataError(
                f"data.splits.{split} {name!r}: {source} has only the splits {', '.join(available)}."
                f"{did_you_mean(name, available)} Set it to one of these, or to none."
            )
        return name


def exists(path: Path) -> bool:
    """Return whether the path exists.

    Raises:
        DataError: this user may not look.
    """
    try:
        return path.exists()
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the permissions of its directories.") from error
    except OSError:  # a name that no file can have
        return False


def is_local_path(source: str) -> bool:
    """Return whether `source` can only be a path: a hub id is `name` or `owner/name`, without a data suffix."""
    suffixes = (*SUFFIXES, *COMPRESSIONS, ".txt", ".xlsx")
    is_path = source.startswith((".", "/", "~")) or source.endswith("/") or source.lower().endswith(suffixes)
    return is_path or "\\" in source or source.count("/") > 1


def open_local(path: Path, settings: SplitSettings) -> dict[str, list[Table]]:
    """Open the tables of every split of a directory, or a single file as one split.

    Raises:
        DataError: no data file exists, a file cannot be read, or files of a split do not fit together.
    """
    _check_names(settings)
    if not path.is_dir():
        return _open_file(path, settings)
    try:
        return _open_directory(path, settings)
    except OSError as error:
        where = error.filename or path
        raise DataError(f"{where} cannot be read: {error.strerror or error}. Check the path and its permissions.") from error


def _check_names(settings: SplitSettings) -> None:
    given = {split: name for split, name in settings.names.items() if name not in (None, NO_SPLIT)}
    for split, name in given.items():
        other = next(other for other, its_name in given.items() if its_name == name)
        if other != split:
            raise DataError(
                f"data.splits.{split} {name!r}: data.splits.{other} has the same name, so both would have the same rows. "
                f"Set one to another name, or to {NO_SPLIT}."
            )


def _open_file(path: Path, settings: SplitSettings) -> dict[str, list[Table]]:
    """Open a single file as the split whose setting names it, or else as the unnamed one."""
    if settings.subset is not None:
        raise DataError(f"data.subset {settings.subset!r}: {path} is a file, which has none. Leave data.subset out.")
    splits = [split for split, name in settings.names.items() if name in (path.name, path.stem)] or [settings.unnamed]
    wrong = [split for split, name in settings.names.items() if name not in (None, NO_SPLIT) and split not in splits]
    if wrong:
        raise DataError(
            f"data.splits.{wrong[0]} {settings.names[wrong[0]]!r}: {path} is one file and one split. Put the files into a "
            "directory, and name that."
        )
    if not path.is_file():
        raise DataError(f"{path} is not a regular file: it is read several times. Write its content to a file.")
    return {splits[0]: [open_table(path, path.name)]}


def _open_directory(path: Path, settings: SplitSettings) -> dict[str, list[Table]]:
    if is_saved(path, settings):
        return _open_saved(path / (settings.subset or "."), settings)
    splits = find_files_by_split(path, settings)
    found: dict[str, list[Table]] = {}
    for name, files in splits.items():
        full = [file for file in files if not _is_empty_part(file)] if len(files) > 1 else files
        found[name] = [open_table(file, _name_in(file, path)) for file in full or files[:1]]
    classes = read_card_classes(path / CARD, settings.subset)
    for table in (table for tables in found.values() for table in tables):
        table.card_classes = classes
    return found


def is_saved(path: Path, settings: SplitSettings) -> bool:
    """Return whether `datasets.save_to_disk` wrote the directory, or the subset's folder in it."""
    saved = path / (settings.subset or ".")
    return (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file()


def _name_in(file: Path, directory: Path) -> str:
    return str(file.relative_to(directory)) if file.is_relative_to(directory) else str(file)


def _is_empty_part(file: Path) -> bool:
    """Return whether a text file is one of those that Spark and Dask write for partitions without rows."""
    if not (_PART.search(file.name) or split_suffix(file)[0] == PART_SUFFIX) or split_suffix(file)[0] in (".parquet", ".arrow"):
        return False
    with open_bytes(file, file.name) as content:
        return not content.read(1)


def _open_saved(path: Path, settings: SplitSettings) -> dict[str, list[Table]]:
    """Open a directory that `datasets.save_to_disk` wrote. That library would refuse columns that are not needed."""
    try:
        if not (path / "dataset_dict.json").is_file():
            return {settings.unnamed: _open_saved_split(path, path)}
        names = list(map(str, json.loads((path / "dataset_dict.json").read_bytes())["splits"]))
        chosen = {split: settings.find(split, names, str(path)) for split in SPLIT_WORDS}
        if not any(chosen.values()):
            raise DataError(
                f"{path} has the splits {', '.join(names)}: none is train, validation or test. Set --data.splits.train."
            )
        return {split: _open_saved_split(path / name, path) for split, name in chosen.items() if name is not None}
    except (ValueError, LookupError, TypeError, FileNotFoundError) as error:
        raise DataError(
            f"{path} was written by save_to_disk of the datasets library and cannot be read: {type(error).__name__} "
            f"{error}. Copy it again, or use to_parquet."
        ) from error


def _open_saved_split(folder: Path, path: Path) -> list[Table]:
    state = json.loads((folder / "state.json").read_bytes())
    features = json.loads((folder / "dataset_info.json").read_bytes())["features"]
    if state.get("_indices_data_files"):  # versions before 2
        raise ValueError("its rows are chosen by a second file")
    files = [folder / each["filename"] for each in state["_data_files"]]
    if not files:
        raise DataError(f"{folder} has no rows: at least one is needed. Write some, or leave the split out with --data.splits.")
    return [ArrowTable(file, _name_in(file, path), features) for file in files]


def find_files_by_split(directory: Path, settings: SplitSettings) -> dict[str, list[Path]]:
    """Find the data files of a directory by split, in the order of their names; numbers in names count as numbers.

    Raises:
        DataError: there is none, the subset is unknown, or a split has files of several formats.
    """
    found = _files_of_card(directory, settings) or _files_of_layout(_enter_subset(directory, settings.subset), settings)
    splits = {name: files for name, files in found.items() if files and not settings.is_left_out(name)}
    for name in (name for name, word in settings.names.items() if word not in (None, NO_SPLIT) and name not in splits):
        raise DataError(
            f"data.splits.{name} {settings.names[name]!r}: no file or folder of {directory} has that name (found: "
            f"{_list_files(directory)}). Correct it, or set it to none."
        )
    if not splits:
        has_folders = settings.subset is None and bool(_list_folders(directory))
        raise DataError(
            f"{directory} has no data file of a split (found: {_list_files(directory)}): one is needed. Name files train, "
            f"validation and test with one of {', '.join(SUFFIXES)}, set --data.splits.train, or name a single file."
            + " Choose a folder with --data.subset."
            * has_folders
        )
    for name, files in splits.items():
        _check_complete(name, files)
        if len({format_of(file) for file in files if file.stat().st_size}) > 1:
            raise DataError(
                f"split {name!r} of {directory} has files of several formats ({list_first(files, lambda file: file.name)}): "
                "probably the same rows twice. Leave only one format there."
            )
    return splits


def _check_complete(split: str, files: Sequence[Path]) -> None:
    """Check that no shard is missing, and that no file is there twice.

    Raises:
        DataError: `train-00001-of-00002.parquet` is missing, or `train.csv` and `train.csv.gz` are both there.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            found.setdefault((str(file.with_name(match[1])), int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in found.items():
        if len(numbers) != count:
            missing = next(number for number in range(count) if number not in numbers) if len(numbers) < count else max(numbers)
            raise DataError(
                f"split {split!r} has {len(numbers)} of {count} files {Path(stem).name}-*-of-{count:05}: number {missing} is "
                "missing, and rows would be lost. Copy or download it again."
            )
    shards = {Path(stem).name for stem, _ in found}
    plain: dict[str, Path] = {}
    for file in files:
        if file.name.partition(".")[0] in shards:
            raise DataError(f"split {split!r} has {file.name} and its parts: probably the same rows twice. Remove one of them.")
        whole = f"{file.parent}/{file.name.removesuffix(file.suffix) if split_suffix(file)[1] else file.name}"
        if whole in plain:
            raise DataError(
                f"split {split!r} has {plain[whole].name} and {file.name}: probably the same rows twice. Remove one of them."
            )
        plain[whole] = file


def _list_files(directory: Path) -> str:
    return list_first([file.name for file in sorted(directory.iterdir())], str) or "nothing"


def _list_folders(directory: Path) -> list[str]:
    return [entry.name for entry in sorted(directory.iterdir()) if entry.is_dir() and not is_hidden(Path(entry.name))]


def _sort_key(path: Path) -> list[tuple[int, int | str]]:
    """Return a key that sorts `part.10` behind `part.9`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]


def _data_files(folder: Path, *, is_deep: bool = False) -> list[Path]:
    """Return the data files of a folder, and of folders with the suffix of a format; `is_deep`: of all its folders."""
    found: list[Path] = []
    for entry in sorted((entry for entry in folder.iterdir() if not is_hidden(Path(entry.name))), key=_sort_key):
        if entry.is_dir() and (is_deep or split_suffix(entry)[0] in SUFFIXES):
            if folder.resolve().is_relative_to(entry.resolve()):
                raise DataError(f"{entry} is a link to a folder above it: its rows would be read again. Remove it.")
            found += _data_files(entry, is_deep=is_deep)
        elif is_data_file(entry) and not entry.is_dir():
            if not entry.is_file():
                kind = "a link to a file that does not exist" if entry.is_symlink() else "not a regular file"
                raise DataError(f"{entry} is {kind}: its rows would be left out. Correct or remove it.")
            found.append(entry)
    return found


def _files_of_layout(directory: Path, settings: SplitSettings) -> dict[str, list[Path]]:
    """Find files by the names of splits in `directory` and in folders of these names, or else in its `data/`."""
    words = [word for names in SPLIT_WORDS.values() for word in names]
    words += [word for word in settings.names.values() if word not in (None, NO_SPLIT)]
    for parent in (directory, directory / "data"):
        folders = [
            parent,
            *(folder for word in dict.fromkeys(words) if (folder := parent / word).is_dir() and folder != parent),
        ]
        files = [file for folder in folders if folder.is_dir() for file in _data_files(folder, is_deep=folder != parent)]
        if not files:
            continue
        found = {name: [file for file in files if _split_of(file, directory, settings) == name] for name in SPLIT_WORDS}
        if any(found.values()):
            return found
        are_parts = all(_PART.search(file.name) or split_suffix(file)[0] == PART_SUFFIX for file in files)
        if are_parts or (len(files) == 1 and settings.names.get("train") is None):
            return {settings.unnamed: files}
    return {}


def _split_of(file: Path, directory: Path, settings: SplitSettings) -> str | None:
    """Return the split that the file's name, or that of a folder above it, names; the nearest name counts."""
    relative = file.relative_to(directory)
    given = {name: split for split, name in settings.names.items() if name not in (None, NO_SPLIT)}
    for part in reversed(relative.parts):
        words = re.split(r"[^a-z]+", Path(part).stem.lower())
        stem = part.partition(".")[0]
        for name, split in given.items():
            if name in (part, stem, str(relative)) or name.lower() in re.split(r"[^a-z0-9]+", stem.lower()):
                return split
        for split, names in SPLIT_WORDS.items():
            if settings.names.get(split) is None and any(name in words and name not in given for name in names):
                return split
    return None


def _enter_subset(directory: Path, subset: str | None) -> Path:
    """Return the folder of a subset."""
    if subset is None:
        return directory
    folder = (
        None
        if ".." in Path(subset).parts
        else next((folder for folder in (directory / subset, directory / "data" / subset) if folder.is_dir()), None)
    )
    if folder is None:
        folders = _list_folders(directory)
        raise DataError(
            f"data.subset {subset!r}: {directory} has no folder of that name, and its README.md does not name it (folders: "
            f"{list_first(folders, str) or 'none'}).{did_you_mean(subset, folders)} Correct it, or leave it out."
        )
    return folder


def _files_of_card(directory: Path, settings: SplitSettings) -> dict[str, list[Path]]:
    """Find files by the `configs` in the front matter of README.md, as the hub does; empty without them.

    Raises:
        DataError: there are several subsets and none is chosen, or a pattern matches no file.
    """
    configs = read_configs(directory / "README.md")
    if not configs or (
        settings.subset is not None and settings.subset not in configs and (directory / settings.subset).is_dir()
    ):
        return {}
    default = [name for name, config in configs.items() if config.get("default")] or [
        name for name in configs if name == "default"
    ]
    subset = settings.subset or next(iter(configs if len(configs) == 1 else default), None)
    if subset not in configs:
        wrong = f"data.subset {settings.subset!r}: it is unknown" if settings.subset else "data.subset is not set"
        raise DataError(f"{wrong}: {directory} has the subsets {list_first(list(configs), str)}. Set --data.subset to one.")
    folder = directory / str(configs[subset].get("data_dir") or ".")
    if configs[subset].get("data_files") is None:
        return _files_of_layout(folder, settings) if folder.is_dir() else {}
    patterns = patterns_by_split(configs[subset]["data_files"], directory / "README.md")
    found: dict[str, list[Path]] = {}
    for split in SPLIT_WORDS:
        name = settings.find(split, list(patterns), f"subset {subset} of {directory}")
        if name is not None:
            files = {each: _match_pattern(folder, each) for each in patterns[name]}
            for wrong in (each for each in files if not files[each]):
                raise DataError(f"{directory}/README.md names {wrong} for {name}: no such data file. Correct it.")
            found[split] = sorted({file for matched in files.values() for file in matched}, key=_sort_key)
    if not found:
        raise DataError(
            f"{directory}/README.md has the splits {list_first(list(patterns), str)}: none is train, validation or test. "
            "Set --data.splits.train to one of them."
        )
    return found


def _match_pattern(folder: Path, pattern: str) -> list[Path]:
    """Return the data files that a pattern of a card names; a folder means all of its files."""
    try:
        entries = list(folder.glob(pattern))
    except (ValueError, NotImplementedError):  # an empty pattern; an absolute one
        raise DataError(
            f"{folder}/README.md names the files {pattern!r}: only patterns of files below its directory are read. Correct it."
        ) from None
    files = [file for entry in entries for file in (_data_files(entry) if entry.is_dir() else [entry])]
    return [file for file in files if is_data_file(file) and not is_hidden(Path(file.name))]
