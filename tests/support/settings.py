"""Helpers for tests of settings: configuration files and the errors that they cause."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from agnews_dist.config.command_line import Option, load
from agnews_dist.errors import ConfigError


def write(path: Path, text: str) -> str:
    """Write a file and return its path."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def errors_of(argv: Sequence[str], options: Sequence[Option] = ()) -> list[str]:
    """Return the lines of the error; each must have the form `<what>: <why>. <fix>.`"""
    with pytest.raises(ConfigError) as caught:
        load("train", argv, options)
    assert caught.value.exit_code == 2
    lines = str(caught.value).split("\n")
    for line in lines:
        what, colon, rest = line.partition(": ")
        assert what, line
        assert colon, line
        assert rest.endswith("."), line
        assert rest.count(". ") + rest.count("? ") >= 1, line
    return lines
