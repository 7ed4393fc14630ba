"""Defaults, YAML files and the command line become one `Config`; everything that is wrong is said at once.

jsonargparse reads the values (settings.py) and prints `--help`. It stops at the first error, suggests nothing and takes
`null` for a number, so the walk over the arguments is ours: it collects all errors, then raises.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from agnews_dist.config.fields import (
    Given,
    Problems,
    WrongTypeError,
    all_sections,
    all_settings,
    parse_value,
    unknown_name,
    write_value,
)
from agnews_dist.config.schema import Config, validate
from agnews_dist.config.yaml_file import read_config
from agnews_dist.errors import ConfigError

SWITCHES = {
    "--help": "Show this text (-h is the same).",
    "--print_config": "Print the resolved configuration as a YAML file for --config.",
    "--debug": "Short for --config configs/debug.yaml: small, loud, deterministic.",
}
DEEPSPEED_ARGUMENT = "--local_rank"
"""What DeepSpeed's launcher adds to every rank's arguments, with `=` and its number."""
NULL_WORDS = ("null", "Null", "NULL", "~")
BOOL_WORDS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Option:
    """A story's own argument: a flag (`--split`, or the bare `--json` of a bool) or, with `nargs="*"`, all positional
    arguments (`text`)."""

    name: str
    help: str
    type: Any = str
    """As a field's annotation: `str`, `int`, `str | None`."""
    default: Any = None
    choices: tuple[str, ...] = ()
    """The only values allowed; empty: all of the type."""
    nargs: Literal["*"] | None = None

    @property
    def key(self) -> str:
        """The name in `Loaded.options`: `split`."""
        return self.name.lstrip("-")

    @property
    def usage(self) -> str:
        """How it is written: `--split SPLIT`, `--json`, `TEXT ...`."""
        if self.nargs:
            return f"{self.name.upper()} ..."
        return self.name if self.type is bool else f"{self.name} {self.key.upper()}"

    @property
    def value_type(self) -> Any:
        """The type, narrowed to the choices."""
        return Literal[self.choices] if self.choices else self.type


@dataclass(frozen=True)
class Loaded:
    """What `load` found."""

    config: Config
    explicit: frozenset[str]
    """Dotted keys that a YAML file or a flag set, to whatever value."""
    options: Mapping[str, Any]
    """The story's own arguments, defaults filled in; a positional list is a tuple of strings."""


def load(story: str, argv: Sequence[str], options: Sequence[Option] = ()) -> Loaded:
    """Defaults < each `--config FILE` in order < flags, wherever they stand on the command line.

    Args:
        story: for the usage line `python -m agnews_dist COMMAND`.
        argv: the arguments after the program's name.
        options: what this story takes besides the configuration.

    Raises:
        ConfigError: everything that is wrong, one line each.
        SystemExit: with 0, after `--help` or `--print_config` has printed.
    """
    problems = Problems()
    arguments = _scan(argv, options, problems)
    if "--help" in arguments.switches:
        _print_help(story, options)
        raise SystemExit(0)
    given = [item for path in arguments.files for item in read_config(path, problems)] + arguments.given
    settings = all_settings()
    known = {key: (setting.type, setting.default) for key, setting in settings.items()}
    known |= {option.name: (option.value_type, option.default) for option in options if not option.nargs}
    values: dict[str, Any] = {name: default for name, (_, default) in known.items()}
    values |= {option.name: tuple(arguments.positionals) for option in options if option.nargs}
    unreadable: set[str] = set()
    for item in given:
        type_, default = known[item.name]
        try:
            values[item.name] = parse_value(type_, item)
        except WrongTypeError as error:
            line = f"{item.place}: {error} Correct it; the default is {write_value(default)}."
            problems.add(line, value_lost=False)
            unreadable.add(item.name)
    config = Config(
        **{
            section: cls(**{s.name: values[key] for key, s in settings.items() if s.section == section})
            for section, (cls, _) in all_sections().items()
        }
    )
    if not problems.value_lost:
        # Where a value could not be read its default stands in, and what is said of that would be said of nothing.
        found = validate(config)
        problems.lines.extend(line for line in found if not any(key in line for key in unreadable))
    if problems.lines:
        raise ConfigError("\n".join(problems.lines))
    if "--print_config" in arguments.switches:
        print(dump(config), end="")
        raise SystemExit(0)
    explicit = frozenset(item.name for item in given if item.name in settings)
    return Loaded(config, explicit, {option.key: values[option.name] for option in options})


def dump(config: Config) -> str:
    """The whole configuration as YAML, each field below its text; `--config` reads it back as an equal `Config`."""
    lines: list[str] = []
    for section, values in asdict(config).items():
        lines += [f"# {all_sections()[section][1]}", f"{section}:"]
        for name, value in values.items():
            lines += [f"  # {line}" for line in textwrap.wrap(all_settings()[f"{section}.{name}"].text, 116)]
            lines.append(f"  {name}: {write_value(value)}")
        lines.append("")
    return "\n".join(lines)


@dataclass
class _Arguments:
    """The command line taken apart, values still text."""

    switches: set[str] = field(default_factory=set[str])
    files: list[str] = field(default_factory=list[str])
    given: list[Given] = field(default_factory=list[Given])
    positionals: list[str] = field(default_factory=list[str])


def _scan(argv: Sequence[str], options: Sequence[Option], problems: Problems) -> _Arguments:
    """Take the command line apart from left to right; no abbreviations."""
    found, rest = _Arguments(), list(argv)
    takes_positionals = any(option.nargs for option in options)
    story_flags = {option.name for option in options if not option.nargs}
    bools = {f"--{key}" for key, setting in all_settings().items() if setting.type is bool}
    bools |= {option.name for option in options if option.type is bool}
    valid = [*(f"--{key}" for key in all_settings()), "--config", *story_flags, *SWITCHES]
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        name = "--help" if name == "-h" else name
        following = rest[0] if rest and not rest[0].startswith("--") and rest[0] != "-h" else None
        if argument == "--":
            found.positionals += rest
            break
        if argument == "-" or not argument.startswith("-"):
            found.positionals.append(argument)
        elif name == DEEPSPEED_ARGUMENT and equals:
            continue  # LOCAL_RANK says the same
        elif name not in valid:
            problems.add(unknown_name(name, f"unknown option {argument!r}", valid), value_lost=False)
            if not equals and following and not following.startswith("-"):
                rest.pop(0)  # the unknown option's value
        elif name in SWITCHES:
            if equals:
                problems.add(f"{argument}: this switch takes no value. Write {name} alone, or leave it out.")
            found.switches.add(name)
            if name == "--debug":
                found.files.append("configs/debug.yaml")
        else:
            if not equals and name in bools and not _is_bool(following, or_anything=not takes_positionals):
                text = "true"
            elif not equals and following is not None:
                text = rest.pop(0)
            elif not equals or (name == "--config" and not text):
                problems.add(f"{name} without a value: it would set nothing. Write {name} VALUE.")
                continue
            if name == "--config":
                found.files.append(text)
            else:
                key = name if name in story_flags else name[2:]
                kind = "null" if text in NULL_WORDS else "plain"
                found.given.append(Given(key, text, f"{name} {text!r}", kind))
    if not takes_positionals:
        for stray in found.positionals:
            hint = "Write --section.field VALUE"
            if stray.partition("=")[0] in all_settings():
                hint = f"Write --{stray}"
            elif stray.endswith((".yaml", ".yml")):
                hint = f"Write --config {stray}"
            problems.add(f"argument {stray!r}: no setting takes it, as it follows no option. {hint}, or remove it.")
    return found


def _is_bool(text: str | None, *, or_anything: bool) -> bool:
    """Whether the argument after `--run.overwrite` is its value: also a mistyped one, where it can be nothing else."""
    return text is not None and (or_anything or text.lower() in BOOL_WORDS)


def _print_help(story: str, options: Sequence[Option]) -> None:
    from jsonargparse import SUPPRESS, ArgumentParser

    usage = [f"python -m agnews_dist {story}", "[--config FILE.yaml ...]", "[--section.field VALUE ...]"]
    usage += [f"[{option.usage}]" for option in options]
    parser = ArgumentParser(usage=" ".join(usage), add_help=False, default_env=False)
    general = parser.add_argument_group("general")
    for option in options:
        extra: dict[str, Any] = {"nargs": "*", "default": SUPPRESS} if option.nargs else {"default": option.default}
        general.add_argument(option.name, type=option.value_type, help=option.help, **extra)
    general.add_argument(
        "--config",
        metavar="FILE.yaml",
        default=SUPPRESS,
        help="YAML with differences from the defaults; may be repeated.",
    )
    for name, text in SWITCHES.items():
        general.add_argument(name, action="store_true", default=SUPPRESS, help=text)
    for section, (_, section_text) in all_sections().items():
        group = parser.add_argument_group(section, section_text)
        for key, setting in all_settings().items():
            if setting.section == section:
                group.add_argument(f"--{key}", type=setting.type, default=setting.default, help=setting.text)
    parser.print_help()
