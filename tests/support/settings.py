"""Helpers for tests of settings: configuration files and the errors that they cause."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from agnews_dist.commands.arguments import Option, load
from agnews_dist.errors import ConfigError


def write(path: Path, text: str) -> str:
    """Write a file and return its path."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def group_by_section(settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Convert dotted keys to the sections of a YAML file."""
    found: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def errors_of(argv: Sequence[str], options: Sequence[Option] = ()) -> list[str]:
    """Return the lines of the error; each must have the form `<what>: <why>. <fix>.`"""
    with pytest.raises(ConfigError) as caught:
        load(argv, options)
    assert caught.value.exit_code == 2
    lines = str(caught.value).split("\n")
    for line in lines:
        what, colon, rest = line.partition(": ")
        assert what, line
        assert colon, line
        assert rest.endswith("."), line
        assert rest.count(". ") + rest.count("? ") >= 1, line
    return lines
