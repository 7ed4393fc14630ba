"""Fields of `Config` as settings: dotted key, type, default and help; reading and writing of their values.

One rule for YAML and command line: the field's type decides what a text means, so `1e-4` is a number for `optim.lr` and a name
for `run.name`. jsonargparse does the reading. `null` and `~` are null in both; quoted YAML stays text.
"""

import difflib
import functools
import types
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from agnews_dist.config.schema import Config
from agnews_dist.errors import did_you_mean

TYPE_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    section: str
    name: str
    type: Any
    default: Any
    help: str
    """The docstring under the field, on one line."""


@dataclass(frozen=True)
class RawValue:
    """A value as the user wrote it."""

    name: str
    """Dotted key, or the name of an option of the command."""
    text: str
    source: str
    """Name in messages: `--optim.lr fast`, or `optim.lr fast (my.yaml, line 3)`."""
    syntax: Literal["plain", "quoted", "null", "collection"] = "plain"


@dataclass
class Problems:
    """Messages about wrong settings, in the order in which they were found."""

    lines: list[str] = field(default_factory=list[str])
    has_lost_values: bool = False
    """A value could not be assigned to a setting, so the other values do not show what the user meant."""

    def add(self, line: str, *, loses_value: bool = True) -> None:
        """Add a message. `loses_value=False`: the problem hides no value from validation."""
        self.lines.append(line)
        self.has_lost_values = self.has_lost_values or loses_value


class WrongTypeError(Exception):
    """A text that the setting's type does not admit; the message names the admitted values."""


@functools.cache
def all_sections() -> Mapping[str, tuple[Any, str]]:
    """Return section name -> (dataclass, help)."""
    hints = get_type_hints(Config)
    return {f.name: (hints[f.name], to_one_line(hints[f.name].__doc__)) for f in fields(Config)}


@functools.cache
def all_settings() -> Mapping[str, Setting]:
    """Return dotted key -> setting, in the order of schema.py."""
    from docstring_parser import parse_from_object

    found: dict[str, Setting] = {}
    for section, (cls, _) in all_sections().items():
        texts = {param.arg_name: to_one_line(param.description) for param in parse_from_object(cls).params}
        hints = get_type_hints(cls)
        for f in fields(cls):
            found[f"{section}.{f.name}"] = Setting(section, f.name, hints[f.name], f.default, texts.get(f.name, ""))
    return found


def to_one_line(text: str | None) -> str:
    """Replace line breaks and indents by single blanks."""
    return " ".join((text or "").split())


def parse_value(type_: Any, raw: RawValue) -> Any:
    """Convert a text to the type."""
    union = get_origin(type_) in (Union, types.UnionType)
    admitted = get_args(type_) if union else (type_,)
    if raw.syntax == "null":
        if type(None) in admitted:
            return None
    elif raw.syntax != "collection":
        if str in admitted:
            return raw.text
        value = _parse(type_, raw.text)
        if value is not None and (raw.syntax == "plain" or isinstance(value, str)):
            return value
    choices = [str(choice) for member in admitted for choice in get_args(member)]
    expected = " or ".join([TYPE_NAMES[member] for member in admitted if member in TYPE_NAMES] + choices)
    fix = " Remove the quotes." if raw.syntax == "quoted" and _parse(type_, raw.text) is not None else ""
    raise WrongTypeError(f"it takes {expected}.{fix}{did_you_mean(raw.text, choices)}")


@functools.cache
def _make_parser(type_: Any) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=type_)
    return parser


def _parse(type_: Any, text: str) -> Any:
    """Parse with jsonargparse; return None if it refuses."""
    try:
        return _make_parser(type_).parse_args([f"--value={text}"]).value
    except ArgumentError:
        return None


def format_value(value: object) -> str:
    """Format as one line of YAML that `parse_value` reads back."""
    import yaml

    style = '"' if isinstance(value, str) and not value.isprintable() else None
    return yaml.safe_dump(value, default_style=style, allow_unicode=True, width=float("inf")).split("\n")[0]


def format_unknown_name(name: str, source: str, valid: Iterable[str]) -> str:
    """Format the message for an unknown name, with the nearest valid ones: `--optim.lr` for `--lr`."""
    names = list(valid)
    by_last_part: dict[str, list[str]] = {}
    for candidate in names:
        by_last_part.setdefault(_last_part(candidate), []).append(candidate)
    near = by_last_part.get(_last_part(name), [])
    if not near and "." in name:
        near = difflib.get_close_matches(name, names, n=1)
    elif not near:
        parts = difflib.get_close_matches(_last_part(name), by_last_part, n=1)
        near = [candidate for part in parts for candidate in by_last_part[part]]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{source}: it would have no effect.{hint} Correct or remove it; --help lists all settings."


def _last_part(name: str) -> str:
    return name.lstrip("-").replace("-", "_").rsplit(".", 1)[-1]
