"""Every field of `Config` as a setting: dotted key, type, default and text; and how a value is read and written.

One rule for YAML and command line: the field's type decides what a text means (`1e-4` is a number for `optim.lr` and a
name for `run.name`), jsonargparse does the reading. `null` and `~` are null in both; quoted YAML stays text.
"""

import difflib
import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from agnews_dist.config.schema import Config
from agnews_dist.errors import did_you_mean

TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    section: str
    name: str
    type: Any
    default: Any
    text: str
    """The docstring under the field, on one line."""


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it."""

    name: str
    """Dotted key, or the name of a story's own option."""
    text: str
    place: str
    """How a message names it: `--optim.lr fast`, or `optim.lr fast (my.yaml, line 3)`."""
    kind: Literal["plain", "quoted", "null", "collection"] = "plain"
    """The YAML syntax it stood in."""


@dataclass
class Problems:
    """Everything found wrong, in the order it was found."""

    lines: list[str] = field(default_factory=list[str])
    value_lost: bool = False
    """Something the user wanted to set could not be read, so the other values do not show what was meant."""

    def add(self, line: str, *, value_lost: bool = True) -> None:
        """Note one line; `value_lost=False` when all that is meant to be set is still known."""
        self.lines.append(line)
        self.value_lost = self.value_lost or value_lost


class WrongTypeError(Exception):
    """A text that its setting's type does not admit; says what the type admits."""


@functools.cache
def all_sections() -> Mapping[str, tuple[Any, str]]:
    """Section name -> (dataclass, text)."""
    hints = get_type_hints(Config)
    return {f.name: (hints[f.name], one_line(hints[f.name].__doc__)) for f in fields(Config)}


@functools.cache
def all_settings() -> Mapping[str, Setting]:
    """Dotted key -> setting, in the order of config.py."""
    from docstring_parser import parse_from_object

    found: dict[str, Setting] = {}
    for section, (cls, _) in all_sections().items():
        texts = {param.arg_name: one_line(param.description) for param in parse_from_object(cls).params}
        hints = get_type_hints(cls)
        for f in fields(cls):
            found[f"{section}.{f.name}"] = Setting(section, f.name, hints[f.name], f.default, texts.get(f.name, ""))
    return found


def one_line(text: str | None) -> str:
    """The text without its line breaks and indents."""
    return " ".join((text or "").split())


def parse_value(type_: Any, given: Given) -> Any:
    """The value that the text means for this type.

    Raises:
        WrongTypeError: the type does not admit it.
    """
    union = get_origin(type_) in (Union, types.UnionType)
    admitted = get_args(type_) if union else (type_,)
    if given.kind == "null":
        if type(None) in admitted:
            return None
    elif given.kind != "collection":
        if str in admitted:
            return given.text
        value = _read(type_, given.text)
        if value is not None and (given.kind == "plain" or isinstance(value, str)):
            return value
    choices = [str(choice) for member in admitted for choice in get_args(member)]
    expected = " or ".join([TYPE_NAMES[member] for member in admitted if member in TYPE_NAMES] + choices)
    remedy = " Remove the quotes." if given.kind == "quoted" and _read(type_, given.text) is not None else ""
    raise WrongTypeError(f"it takes {expected}.{remedy}{did_you_mean(given.text, choices)}")


@functools.cache
def _reader(type_: Any) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=type_)
    return parser


def _read(type_: Any, text: str) -> Any:
    """The library's reading of the text; None when it refuses."""
    from argparse import ArgumentError

    try:
        return _reader(type_).parse_args([f"--value={text}"]).value
    except ArgumentError:
        return None


def write_value(value: object) -> str:
    """The value as one line of YAML that `parse_value` reads back."""
    import yaml

    style = '"' if isinstance(value, str) and not value.isprintable() else None
    return yaml.safe_dump(value, default_style=style, allow_unicode=True, width=float("inf")).split("\n")[0]


def unknown_name(name: str, place: str, valid: Iterable[str]) -> str:
    """The message for a name that nothing reads, with the nearest valid ones: `--lr` belongs to `--optim.lr`."""
    names = list(valid)
    by_last_part: dict[str, list[str]] = {}
    for candidate in names:
        by_last_part.setdefault(_last_part(candidate), []).append(candidate)
    near = by_last_part.get(_last_part(name), [])
    if not near and "." in name:
        near = difflib.get_close_matches(name, names, n=1)
    elif not near:
        near = [
            v for part in difflib.get_close_matches(_last_part(name), by_last_part, n=1) for v in by_last_part[part]
        ]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"{place}: nothing reads it, so it would change nothing.{hint} Correct or remove it; --help lists all settings."
    )


def _last_part(name: str) -> str:
    return name.lstrip("-").replace("-", "_").rsplit(".", 1)[-1]
