"""The front matter of a data set's README.md: its subsets, the patterns of their files, and names of classes."""

import re
from pathlib import Path
from typing import Any, cast

import yaml

from agnews_dist.errors import DataError


def read_configs(card: Path) -> dict[str, dict[str, Any]]:
    """Return subset -> its entry under `configs` in the front matter of a data set's card.

    Raises:
        DataError: the front matter has them and is not valid YAML.
    """
    matter = _read_matter(card)
    try:
        front = yaml.safe_load(matter)
    except (yaml.YAMLError, ValueError) as error:
        if re.search(r"^configs:", matter, re.MULTILINE):
            reason = str(error).split("\n")[0]
            raise DataError(
                f"{card} begins with YAML that cannot be read ({reason}): it names the files. Correct it."
            ) from error
        return {}
    configs: Any = front.get("configs") if isinstance(front, dict) else None
    entries = (
        [cast("dict[str, Any]", config) for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    )
    return {str(each.get("config_name", "default")): each for each in entries if each.get("data_files") or each.get("data_dir")}


def read_card_classes(card: Path, subset: str | None) -> dict[str, tuple[str, ...]]:
    """Return column -> names of its classes, from `dataset_info` in the front matter; empty where that says nothing."""
    try:
        infos: Any = yaml.safe_load(_read_matter(card))["dataset_info"]
        infos = cast("list[Any]", infos if isinstance(infos, list) else [infos])
        wanted = [info for info in infos if len(infos) == 1 or info.get("config_name") == (subset or "default")]
        types = {str(each["name"]): each["dtype"] for info in wanted for each in info["features"]}
        found = {column: dtype["class_label"]["names"] for column, dtype in types.items() if isinstance(dtype, dict)}
        # Either a list, or number -> name.
        numbered = {column: dict(enumerate(names)) if isinstance(names, list) else names for column, names in found.items()}
        by_number = {column: {int(number): str(name) for number, name in each.items()} for column, each in numbered.items()}
        return {column: tuple(names[i] for i in range(len(names))) for column, names in by_number.items()}
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _read_matter(card: Path) -> str:
    """Return the YAML between the marks at the beginning; empty without them."""
    try:
        text = card.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return ""
    return text[4:].partition("\n---")[0] if text.startswith("---\n") else ""


def patterns_by_split(data_files: Any, card: Path) -> dict[str, list[str]]:
    """Return split -> glob patterns; a plain list is all train, as on the hub.

    Raises:
        DataError: an entry has no split or no path.
    """
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in cast("dict[str, Any]", data_files).items()]
    entries: list[Any] = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths = [paths] if isinstance(paths, str) else paths
        if not split or not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise DataError(f"{card} has the entry {str(entry)[:60]!r} in data_files: it needs split and path. Correct it.")
        found.setdefault(str(split), []).extend(paths)
    return found
