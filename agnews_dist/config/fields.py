"""Fields of `Config` as settings: dotted key, type, help; texts to values and back, and messages about wrong ones.

One rule for YAML and command line: the setting's type decides what a text means, so `1e-4` is a number for `optim.lr` and a
name for `run.name`. pydantic checks the limits.
"""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from agnews_dist.config.schema import Config, Level, Resume, Section, Sweep
from agnews_dist.errors import ConfigError, did_you_mean, find_nearest, quote
from agnews_dist.storage.directories import expand_path

BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TYPE_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
LIMITS = {"ge": "{} or more", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
MARKS = {"allow_inf_nan": "finite", "min_length": "not empty", "func": "a path"}


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    section: str
    name: str
    type: Any
    """Annotation, with its limits."""
    default: Any
    resume: Resume
    sweep: Sweep
    level: Level

    @property
    def help(self) -> str:
        """Docstring under the field, on one line."""
        return _read_texts(self.section)[self.name]


@functools.cache
def all_sections() -> Mapping[str, tuple[Any, str]]:
    """Return section name -> (model, help), outer sections first; the name of an inner one has a dot."""
    found: dict[str, tuple[Any, str]] = {}

    def collect(model: Any, prefix: str) -> None:
        for name, info in model.model_fields.items():
            if _is_section(info):
                found[f"{prefix}{name}"] = (info.annotation, info.annotation.__doc__)
                collect(info.annotation, f"{prefix}{name}.")

    collect(Config, "")
    return found


def _is_section(info: Any) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


@functools.cache
def all_settings() -> Mapping[str, Setting]:
    """Return dotted key -> setting, in the order of schema.py."""
    found: dict[str, Setting] = {}
    for section, (model, _) in all_sections().items():
        for name, info in model.model_fields.items():
            if not _is_section(info):
                type_ = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
                found[f"{section}.{name}"] = Setting(section, name, type_, info.default, **info.json_schema_extra)
    return found


@functools.cache
def _read_texts(section: str) -> dict[str, str]:
    from docstring_parser import parse_from_object

    params = parse_from_object(all_sections()[section][0]).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


class Quoted(str):
    """Text in quotes in a YAML file: never a number, `true` or `null`."""


@dataclass(frozen=True)
class RawValue:
    """A value as the user wrote it: text, Quoted text, None for null, a list of these, or a dict, which no setting takes."""

    name: str
    value: object
    source: str
    """Name in messages: `--optim.lr 'fast'`, or `optim.lr 'fast' (my.yaml, line 3)`."""
    place: str = ""


@dataclass
class Problems:
    """Messages about wrong settings, and parts of keys whose values are unknown because of them."""

    lines: list[str] = field(default_factory=list[str])
    hidden: set[str] = field(default_factory=set[str])

    def add(self, line: str, *hides: str) -> None:
        """Add a message. `hides`: parts of the keys whose values are unknown now ("": all keys)."""
        self.lines.append(line)
        self.hidden.update(hides)

    def add_unknown(self, name: str, source: str, valid: Iterable[str], *, more: str = "") -> None:
        """Add the message for an unknown name, with the nearest valid ones; `more`: another fix."""
        near = find_nearest(name, valid)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        fix = f"Correct or remove it{more}; --help all lists all settings."
        self.add(f"{source}: it would have no effect.{hint} {fix}", *(each.removeprefix("--") for each in near if "." in each))


def split_type(type_: Any, limits: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield (type, limits) of the members of a union: `int`, `str`, `Literal[...]`, `tuple[str, ...]`."""
    if get_origin(type_) is Annotated:
        inner, *extra = get_args(type_)
        yield from split_type(inner, (*limits, *(each for one in extra for each in getattr(one, "metadata", [one]))))
    elif get_origin(type_) in (Union, types.UnionType):
        yield from (pair for member in get_args(type_) for pair in split_type(member, limits))
    else:
        yield type_, limits


def choices_of(type_: Any) -> list[str]:
    """Return the words that a type, or the elements of a list, admit besides numbers and text."""
    inner = [get_args(member)[0] if get_origin(member) is tuple else member for member, _ in split_type(type_)]
    return [
        str(choice)
        for each in inner
        for member, _ in split_type(each)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]


def is_path(type_: Any) -> bool:
    """Return whether values are paths: `~` and variables are replaced in them."""
    members = [(get_args(each)[0], ()) if get_origin(each) is tuple else (each, limits) for each, limits in split_type(type_)]
    return any(
        getattr(limit, "func", None) is expand_path
        for each, more in members
        for _, limits in split_type(each, more)
        for limit in limits
    )


def describe_type(type_: Any) -> str:
    """Describe the admitted values: `a whole number (1 or more) or null`."""
    found: list[str] = []
    for member, limits in split_type(type_):
        if get_origin(member) is tuple:
            found.append(f"a list a,b,... of {describe_type(get_args(member)[0])}")
        elif member in TYPE_NAMES:
            words = {**LIMITS, **MARKS}
            ranges = [words[name].format(getattr(limit, name)) for limit in limits for name in words if hasattr(limit, name)]
            found.append(TYPE_NAMES[member] + f" ({', '.join(ranges)})" * bool(ranges))
        elif get_origin(member) is Literal:
            found += choices_of(member)
    return ", ".join(found[:-1]) + " or " * (len(found) > 1) + found[-1]


def convert(type_: Any, value: object) -> Any:
    """Convert a raw value to the first member of the type that admits it. Limits are not checked here.

    Raises:
        ValueError: no member admits it.
    """
    for member, _ in split_type(type_):
        if get_origin(member) is tuple and isinstance(value, (str, list)):
            text = value.removeprefix("[").removesuffix("]") if isinstance(value, str) else ""
            parts: list[Any] = [part.strip() for part in text.split(",") if text.strip()] if isinstance(value, str) else value
            if isinstance(value, str) and "" in parts:
                raise ValueError(value)
            return tuple(convert(get_args(member)[0], part) for part in parts)
        if value is None and member is type(None):
            return None
        if isinstance(value, str) and member is str:
            return str(value)
        if isinstance(value, str) and member in (int, float, bool) and not isinstance(value, Quoted):
            with suppress(ValueError, KeyError):
                return BOOLS[value.lower()] if member is bool else member(value)
        for choice in get_args(member):
            if str(choice) == value and (isinstance(choice, str) or not isinstance(value, Quoted)):
                return choice
    raise ValueError(value)


def check_value(raw: RawValue, type_: Any, default: object) -> tuple[Any, Any]:
    """Return (the converted value, the same with paths expanded).

    Raises:
        ValueError: the type or its limits do not admit it; the text is the whole message.
    """
    try:
        value = convert(type_, raw.value)
        return value, TypeAdapter(type_).validate_python(value, strict=True)
    except ValidationError as error:
        wrong, first = raw.value, error.errors()[0]
        own = "not UTF-8. Rename the file." if first["type"] == "string_unicode" else first.get("ctx", {}).get("error")
    except ValueError as error:
        wrong, own = error.args[0], None
    if own is not None:
        raise ValueError(f"{raw.source}: {own}")
    fix = "Remove the quotes" if raw.value and isinstance(raw.value, Quoted) else "Correct it"
    hint = did_you_mean(str(wrong).lower(), choices_of(type_)) if fix == "Correct it" else ""
    expected = describe_type(type_)
    known = f"; the default is {format_value(default)}" if default not in (None, ()) or "null" in expected else ""
    item = f", {quote(str(wrong))}" if wrong != raw.value else ""
    raise ValueError(f"{raw.source}{item}: it takes {expected}.{hint} {fix}{known}.")


def make_config(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Make a configuration of section -> name -> value; what is absent has its default."""
    values = {section: dict(sections.get(section, {})) for section in ("", *all_sections())}
    for section, (model, _) in reversed(list(all_sections().items())):
        outer, _, name = section.rpartition(".")
        values[outer][name] = model(**values[section])
    return Config(**values[""])


def build_config(raw_values: Sequence[RawValue], problems: Problems) -> Config:
    """Build the configuration; later values override earlier ones.

    Raises:
        ConfigError: `problems` has lines, or gets some: wrong values, and settings that contradict each other.
    """
    config, contradictions = Config(), list[str]()
    sections = {section: dict[str, Any]() for section in all_sections()}
    for raw in raw_values:
        setting = all_settings()[raw.name]
        try:
            sections[setting.section][setting.name] = check_value(raw, setting.type, setting.default)[0]
        except ValueError as error:
            problems.add(str(error), raw.name)
    try:
        config = make_config(sections)
    except ValidationError as error:
        contradictions = error.errors()[0]["msg"].removeprefix("Value error, ").splitlines()
    for line in contradictions:
        subject, _, rest = line.partition(": ")
        places = {raw.name: raw.place and f"{raw.name} in {raw.place}" for raw in raw_values if raw.name in subject}
        # An unreadable value is still the default here, so messages that name its setting are left out.
        if not any(hidden in subject for hidden in problems.hidden):
            shown = "; ".join(filter(None, places.values()))
            problems.lines.append(f"{subject} ({shown}): {rest}" if shown else line)
    if problems.lines:
        raise ConfigError("\n".join(problems.lines))
    return config


def replace_values(config: Config, values: Mapping[str, object]) -> Config:
    """Return the configuration with some settings replaced. The values are those of `check_value`.

    Raises:
        ConfigError: the settings contradict each other, one line each.
    """
    sections = {section: dict[str, Any]() for section in ("", *all_sections())}
    for key, value in {**dict(values_of(config)), **values}.items():
        setting = all_settings()[key]
        sections[setting.section][setting.name] = value
    for section, (model, _) in reversed(list(all_sections().items())):
        outer, _, name = section.rpartition(".")
        # Without validation of each section: all values have been validated.
        sections[outer][name] = model.model_construct(**sections[section])
    try:
        return Config(**sections[""])
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def values_of(config: Config) -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of every setting."""
    for key, setting in all_settings().items():
        yield key, getattr(functools.reduce(getattr, setting.section.split("."), config), setting.name)


def format_value(value: object, *, escape: bool = False) -> str:
    """Format as one line of YAML that `convert` reads back. `escape`: `$` as `$$`, for a path."""
    import yaml

    items: list[Any] = list(value) if isinstance(value, tuple) else [value]
    items = [item.replace("$", "$$") if escape and isinstance(item, str) else item for item in items]
    plain = items if isinstance(value, tuple) else items[0]
    style = '"' if any(isinstance(item, str) and not item.isprintable() for item in items) else None
    text = yaml.safe_dump(plain, default_style=style, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.split("\n")[0]
