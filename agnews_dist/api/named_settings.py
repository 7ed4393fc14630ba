"""Settings from Python values, by name. The types, limits and messages are those of YAML files and flags.

A name is the dotted key (`optim.lr`), or the same with underscores (`optim__lr`). The field alone (`lr`) suffices where no
other section has one of this name. All that is wrong is reported together.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from agnews_dist.config.fields import Problems, RawValue, all_sections, all_settings, build_config, check_value
from agnews_dist.config.schema import Config
from agnews_dist.errors import shorten

ACCEPTABLE = tuple(key for key, setting in all_settings().items() if setting.resume == "may be accepted")
"""Settings that may be accepted when a resumed run has another value."""
DEBUG = "configs/debug.yaml"
"""File of the settings of `debug`, as of the flag --debug."""
OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "accept": (tuple[Literal[ACCEPTABLE], ...], ()),
    "debug": (bool, False),
    "profile": (bool, False),
    "quiet": (bool, False),
    "verbose": (bool, False),
}
"""Option of the command `train` that is not a setting -> (type, default)."""
MAX_SHOWN = 60
"""Characters of a value in a message."""


@dataclass
class NamedSettings:
    """Collector of settings and options. `build` checks them."""

    options: dict[str, Any] = field(default_factory=lambda: {name: default for name, (_, default) in OPTIONS.items()})
    _problems: Problems = field(default_factory=Problems)
    _files: list[RawValue] = field(default_factory=list[RawValue])
    _raw_values: dict[str, RawValue] = field(default_factory=dict[str, RawValue])

    def add_files(self, paths: object) -> None:
        """Add YAML files: None, a path or a list of them. Later files override earlier ones."""
        for path in [] if paths is None else paths if isinstance(paths, (list, tuple)) else [paths]:
            if isinstance(path, (str, os.PathLike)):
                from agnews_dist.config.yaml_file import read_config  # late: most ranks read no YAML

                self._files += read_config(os.fspath(cast("str | os.PathLike[str]", path)), self._problems)
            else:
                self._problems.add(f"config={_show(path)}: it is not the path of a file. Write config='my.yaml'.", "")

    def add(self, key: str, value: object, name: str) -> None:
        """Add the value of a setting. It overrides files. `name`: as the caller wrote it."""
        if key in self._raw_values:
            first = self._raw_values[key].source
            self._problems.add(f"{name}={_show(value)} and {first}: both are {key}. Remove one.", key)
        else:
            self._raw_values[key] = RawValue(key, _to_raw(value), f"{name}={_show(value)}")

    def add_named(self, values: Mapping[str, object], *, has_options: bool = True) -> None:
        """Add settings by name, and options if these may be among them."""
        for name, value in values.items():
            if has_options and name in OPTIONS:
                self._add_option(name, value)
            elif (key := self._find(name)) is not None:
                self.add(key, value, name)

    def _add_option(self, name: str, value: object) -> None:
        type_, default = OPTIONS[name]
        try:
            self.options[name] = check_value(RawValue(name, _to_raw(value), f"{name}={_show(value)}"), type_, default)[1]
        except ValueError as error:
            self._problems.add(str(error))

    def _find(self, name: str) -> str | None:
        """Return the dotted key that a name means; None: it means none, or several."""
        key = name.replace("__", ".")
        if key in all_settings():
            return key
        found = [each for each in all_settings() if "." not in key and each.rpartition(".")[2] == key]
        if len(found) == 1:
            return found[0]
        if found:
            full = " or ".join(each.replace(".", "__") for each in found)
            self._problems.add(f"{name}: {len(found)} sections have a setting of this name. Write {full}.", *found)
        elif key in all_sections():
            self._problems.add(f"{name}: a section takes settings below it. Write {name}__FIELD=VALUE.", f"{key}.")
        else:
            self._problems.add_unknown(key, f"unknown setting {name!r}", [*all_settings(), *OPTIONS])
        return None

    def build(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: everything that is wrong, one line each.
        """
        if self.options["debug"]:
            self.add_files(DEBUG)
        return build_config([*self._files, *self._raw_values.values()], self._problems)


def _to_raw(value: Any) -> object:
    """Return a Python value as YAML would hold it: text, None for null, or a list; of another type a dict, which is refused."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, columns of pandas
        return _to_raw(value.tolist())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return [_to_raw(each) for each in cast("Sequence[object]", value)] if isinstance(value, (list, tuple)) else {}


def _show(value: object) -> str:
    return shorten(" ".join(repr(value).split()), MAX_SHOWN)
