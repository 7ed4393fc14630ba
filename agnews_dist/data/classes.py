"""The classes of a corpus: from ClassLabel types, text, integers or booleans, or as set; labels to class indices."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agnews_dist.data.formats.streams import read_lines
from agnews_dist.data.local_files import exists
from agnews_dist.data.rows import A_DECIMAL, MAX_CLASSES, UNREADABLE, Ints, LabelValue, RawRows, list_first, quote_value
from agnews_dist.data.synthetic import CLASS_NAMES
from agnews_dist.errors import DataError, count_noun, did_you_mean, quote
from agnews_dist.events import DataFinding

AG_NEWS = ("fancyzhx/ag_news", "ag_news")
"""Hub ids of AG News."""
_MISSING = frozenset(("nan", "null", "na", "n/a", "#n/a", "<na>", "?"))
"""Texts by which programs mark a missing value."""
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Classes:
    """Names of the classes in index order, and the labels of every split as indices."""

    names: tuple[str, ...]
    labels: Mapping[str, Ints]
    """Split -> int64 indices (N,), all -1 in a test split without labels."""
    findings: tuple[DataFinding, ...] = ()


def read_class_names(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of `data.class_names`: a list, or one name of a file with a name per line or a JSON list.

    Raises:
        DataError: the file cannot be read; a name is empty, unreadable or there twice; fewer than two.
    """
    if given is None:
        return None
    names, where = list(given), "data.class_names"
    if len(names) == 1:
        path = Path(names[0]).expanduser()
        where = f"data.class_names {names[0]!r}"
        if not exists(path):
            raise DataError(
                f"{where}: a list has two names or more, and no such file exists. Write a,b,... or correct the path."
            )
        text = "".join(read_lines(path, where)).rstrip()
        try:
            names = json.loads(text) if path.suffix.lower() == ".json" else re.split(r"\r\n?|\n", text) if text else []
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON ({error}): it must be a list of names. Correct it.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: it must be a list of texts. Write one name per line.")
    names = [name.strip() for name in names]
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name or UNREADABLE.search(name):
            raise DataError(f"{where}: name {i + 1} is {name!r}: a class needs a readable name. Correct or remove it.")
        if first.setdefault(name, i) < i:
            raise DataError(
                f"{where}: {quote(name)} is there twice, as name {first[name] + 1} and {i + 1}: names must be "
                "unique. Remove one."
            )
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{where}: it has {len(names)} names, and 2 to {MAX_CLASSES:,} are possible. Name every class.")
    return tuple(names)


def decide_classes(
    raw: Mapping[str, RawRows],
    given: tuple[str, ...] | None = None,
    *,
    source: str,
    is_model: bool = False,
    needs_labels: bool = True,
) -> Classes:
    """Decide the classes and return every label as an index.

    `given`: names that are set; with `is_model` those of a saved model. If these are only numbers, the data's own names count.
    `needs_labels` False: any split may be without labels, not only test.

    Raises:
        DataError: labels are missing, of different kinds or unknown; fewer than two classes.
    """
    labelled = {
        name: rows for name, rows in raw.items() if _is_labelled(name, rows, needs_labels=needs_labels and name != "test")
    }
    kinds = _kinds_of(labelled)
    findings: list[DataFinding] = []
    names = given
    if given is not None and is_model and _are_numbers(given) and kinds - {"integer"}:
        names = None
    if names is None:
        names, findings = _names_of_data(labelled, kinds, source)
        if is_model and given is not None:
            names = _names_for_model(names, given, source)
    if len(names) < 2:
        raise DataError(
            f"{source} has one class only, {names[0]!r}: a classifier needs two or more. Set --data.label_column, or name all "
            "classes with --data.class_names."
            if names
            else f"{source} has no labels: the classes are unknown. Set --data.label_column, or --data.class_names."
        )
    labels = {
        name: _index_labels(rows, names) if name in labelled else np.full(len(rows.texts), -1, np.int64)
        for name, rows in raw.items()
    }
    if given is not None and names == given:
        findings += _check_count(labelled, names)
    return Classes(names, labels, tuple(findings))


def _is_labelled(name: str, rows: RawRows, *, needs_labels: bool) -> bool:
    """Return whether a split has labels. One that needs none may have -1 in every row, as the test splits of GLUE.

    Raises:
        DataError: labels are missing in some rows, or in a split that needs them.
    """
    missing_N = rows.code_N < 0
    if rows.class_names is not None and -1 in rows.values:
        missing_N |= rows.code_N == rows.values.index(-1)
    if all(value in (-1, "-1") for value in rows.values):
        missing_N[:] = True
    if not needs_labels and missing_N.all():
        return False
    if missing_N.any():
        bad = np.flatnonzero(missing_N).tolist()
        rest = "Fill in or remove these rows"
        if missing_N.all():
            rest = f"Set --data.label_column, or leave the split out with --data.splits.{name} none"
        listing = list_first(bad, rows.origin.name)
        raise DataError(
            f"label is missing in {count_noun(len(bad), 'row')} of {name} ({listing}): every row needs one. {rest}."
        )
    return True


def _kind_of(value: LabelValue) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or _INTEGER.fullmatch(value):
        return "integer"
    return "text"


def _kinds_of(labelled: Mapping[str, RawRows]) -> set[str]:
    """Return the kinds of labels; those of ClassLabel types are text, as they have names."""
    return {"text" if rows.class_names else _kind_of(value) for rows in labelled.values() for value in rows.values}


def _names_of_data(labelled: Mapping[str, RawRows], kinds: set[str], source: str) -> tuple[tuple[str, ...], list[DataFinding]]:
    """Return the names that the data gives its classes, and what is to be said about them."""
    found = {name: rows.class_names for name, rows in labelled.items() if rows.class_names is not None}
    largest = max(found.values(), key=len, default=())
    if any(not set(names) <= set(largest) for names in found.values()):
        listing = "; ".join(f"{name}: {list_first(names, str)}" for name, names in found.items())
        raise DataError(
            f"the splits have different classes ({listing}): labels would differ in meaning. Write all splits with the same "
            "class names, or set --data.class_names."
        )
    if found:
        for name, count in (each for names in found.values() for each in Counter(names).items()):
            if count > 1 or not name.strip() or UNREADABLE.search(name):
                raise DataError(
                    f"{source} has the class name {name!r}: a class needs a readable name of its own. Set --data.class_names."
                )
        # The order is that of the first split: a label without a name is a number there.
        return tuple(dict.fromkeys((*next(iter(found.values())), *largest))), []
    if len(kinds) > 1:
        examples = {_kind_of(value): (rows, code) for rows in labelled.values() for code, value in enumerate(rows.values)}
        listing = ", ".join(f"{rows.first_of(code)}: {quote_value(rows.values[code])}" for rows, code in examples.values())
        raise DataError(
            f"labels are of different kinds ({listing}): they could be numbers or names. Write all in one way, or set "
            "--data.class_names."
        )
    values = {value for rows in labelled.values() for value in rows.values}
    if kinds == {"boolean"}:
        return tuple(map(str, sorted(values))), []
    if kinds == {"integer"}:
        return _names_of_integers(labelled, sorted({int(value) for value in values}), source)
    names = sorted(map(str, values))
    missing = [name for name in names if name.lower() in _MISSING]
    decimals = [name for name in names if _DECIMAL.fullmatch(name)]
    if decimals and all(_DECIMAL.fullmatch(name) or _INTEGER.fullmatch(name) or name in missing for name in names):
        rows = next(rows for rows in labelled.values() if decimals[0] in rows.values)
        where = rows.first_of(rows.values.index(decimals[0]))
        raise DataError(
            f"label {decimals[0]!r} in {where} is {A_DECIMAL}: a label is one text, integer or boolean. Write the "
            "labels so, set --data.label_column, or name the classes with --data.class_names."
        )
    by_fold: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold().replace("\u200b", "").replace("\ufeff", "")
        by_fold.setdefault(" ".join(plain.split()), []).append(name)
    alike = [" and ".join(map(repr, group)) for group in by_fold.values() if len(group) > 1]
    findings: list[DataFinding] = []
    if alike:
        findings.append(
            DataFinding(
                f"{count_noun(len(alike), 'pair')} of classes with names that differ only in case or white space",
                list_first(alike, str),
                "they are different classes",
                "Write the labels alike, if they are one class",
            )
        )
    if missing:
        findings.append(
            DataFinding(
                f"{len(missing)} of {len(names)} classes with a name that often marks a missing label",
                list_first(missing, repr),
                "rows without a label would be a class",
                "Remove these rows, unless it is a class",
            )
        )
    return tuple(names), findings


def _names_of_integers(
    labelled: Mapping[str, RawRows], numbers: list[int], source: str
) -> tuple[tuple[str, ...], list[DataFinding]]:
    is_original = all(rows.is_original for rows in labelled.values())
    if (is_original and numbers == [1, 2, 3, 4]) or (source in AG_NEWS and set(numbers) <= {0, 1, 2, 3}):
        return CLASS_NAMES, []
    names = tuple(map(_unnamed, numbers))
    # Names in data.class_names count from 0.
    counts_from_0 = numbers == list(range(len(numbers)))
    findings = [
        DataFinding(
            f"{len(names)} classes without names",
            list_first(names, str),
            "the labels are integers",
            "Name the classes with --data.class_names"
            if counts_from_0
            else "To name them, write names in place of the numbers",
        )
    ]
    if numbers[:1] == [1] and numbers == list(range(1, len(numbers) + 1)):
        findings.append(
            DataFinding(
                f"labels seem to count from 1 to {len(numbers)}",
                "",
                "class LABEL_1 has index 0",
                "Nothing is lost; with --data.class_names, number them from 0",
            )
        )
    return names, findings


def _check_count(labelled: Mapping[str, RawRows], names: tuple[str, ...]) -> Iterator[DataFinding]:
    """Yield a finding if labels are numbers of the classes `names`, and probably count from 1."""
    if any(rows.is_original or rows.class_names is not None for rows in labelled.values()) or _are_numbers(names):
        return
    values = {value for rows in labelled.values() for value in rows.values}
    numbers = [int(value) for value in values if _kind_of(value) == "integer"]
    if (
        len(numbers) == len(values)
        and min(numbers, default=0) > 0
        and not {*map(str, numbers), *map(_unnamed, numbers)} & {*names}
    ):
        yield DataFinding(
            f"labels are numbers from {min(numbers)} to {max(numbers)}, without 0",
            "",
            f"they count from 0, so {min(numbers)} is {names[min(numbers)]!r}",
            "Correct them if they count from 1",
        )


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether a model's classes have no names but Hugging Face's default ones."""
    return tuple(names) == tuple(map(_unnamed, range(len(names))))


def _unnamed(number: int) -> str:
    """Return Hugging Face's name of a class without one."""
    return f"LABEL_{number}"


def _names_for_model(of_data: tuple[str, ...], of_model: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Return the data's names for a model whose classes have none."""
    if len(of_data) != len(of_model):
        raise DataError(
            f"{source} has {len(of_data)} classes ({list_first(of_data, str)}), the model {len(of_model)} without "
            "names: labels would not match. Name the model's classes, in its order, with --data.class_names."
        )
    return of_data


def _index_labels(rows: RawRows, names: tuple[str, ...]) -> Ints:
    """Return the labels as indices into `names`, int64 (N,)."""
    index_of = {name: i for i, name in enumerate(names)}
    indices = [_index_of(value, rows, index_of) for value in rows.values]
    table = np.array([-1 if index is None else index for index in indices], dtype=np.int64)
    labels_N = table[rows.code_N]
    bad = np.flatnonzero(labels_N < 0).tolist()
    if bad:
        wrong = rows.values[rows.code_N[bad[0]]]
        nearest = did_you_mean(wrong, names) if isinstance(wrong, str) else ""
        listing = list_first(bad, lambda i: f"{rows.origin.name(i)}: {quote_value(_shown(rows, i))}")
        from_1 = _counts_from_1(rows, len(names))
        counts, remedy = ("; they seem to count from 1", "Number them from 0") if from_1 else ("", "Correct these rows")
        raise DataError(
            f"label is not a class in {count_noun(len(bad), 'row')} ({listing}): classes are {list_first(names, str)}, or 0 to "
            f"{len(names) - 1}{counts}.{nearest} {remedy}, or set --data.class_names or --data.label_column."
        )
    return labels_N


def _index_of(value: LabelValue, rows: RawRows, index_of: Mapping[str, int]) -> int | None:
    """Return the index of a label's class: by its name, else by its number."""
    if rows.class_names is not None and isinstance(value, int):
        return index_of.get(rows.class_names[value]) if 0 <= value < len(rows.class_names) else None
    text = str(value)
    if isinstance(value, bool) and text not in index_of:
        text = text.lower()
    if text in index_of:
        return index_of[text]
    if _kind_of(value) != "integer":
        return None
    if f"LABEL_{int(value)}" in index_of:
        return index_of[f"LABEL_{int(value)}"]
    number = int(value) - (rows.is_original and tuple(index_of) == CLASS_NAMES)
    return number if 0 <= number < len(index_of) and "LABEL_" not in next(iter(index_of)) else None


def _shown(rows: RawRows, i: int) -> object:
    value = rows.values[rows.code_N[i]]
    names = rows.class_names
    return names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value


def _counts_from_1(rows: RawRows, num_classes: int) -> bool:
    numbers = {int(value) for value in rows.values if _kind_of(value) == "integer"}
    return bool(numbers) and min(numbers) == 1 and max(numbers) == num_classes
