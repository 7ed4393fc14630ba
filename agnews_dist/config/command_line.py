"""The `Config` of a command, from defaults, YAML files and arguments; all errors are reported at once.

jsonargparse parses single values (fields.py) and prints `--help`. It would stop at the first error, without suggestions, and
accept `null` for a number. So this module takes the command line apart itself.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from agnews_dist.config.fields import (
    Problems,
    RawValue,
    WrongTypeError,
    all_sections,
    all_settings,
    format_unknown_name,
    format_value,
    parse_value,
)
from agnews_dist.config.schema import Config, validate
from agnews_dist.config.yaml_file import read_config
from agnews_dist.errors import ConfigError

SWITCHES = {
    "--help": "Show this text (-h is the same).",
    "--print_config": "Print the whole configuration as a YAML file for --config.",
    "--debug": "Short for --config configs/debug.yaml: small, verbose, deterministic.",
}


@dataclass(frozen=True)
class Option:
    """An argument of one command: a flag (`--split`; `--json` without a value for a bool) or, with `nargs="*"`, all positional
    arguments (`text`)."""

    name: str
    help: str
    type: Any = str
    """Annotation, as for a field: `str`, `int`, `str | None`."""
    default: Any = None
    choices: tuple[str, ...] = ()
    """Allowed values; empty: all of the type."""
    nargs: Literal["*"] | None = None

    @property
    def key(self) -> str:
        """Name in `Loaded.options`: `split`."""
        return self.name.lstrip("-")

    @property
    def value_type(self) -> Any:
        """The type, narrowed to the choices."""
        return Literal[self.choices] if self.choices else self.type


@dataclass(frozen=True)
class Loaded:
    """The configuration and options of a command."""

    config: Config
    explicit: frozenset[str]
    """Dotted keys that a YAML file or a flag has set, even to the default."""
    options: Mapping[str, Any]
    """The command's own arguments, with defaults; positional arguments are a tuple of strings."""


def load(command: str, argv: Sequence[str], options: Sequence[Option] = ()) -> Loaded:
    """Build the configuration. Flags override `--config` files, later files override earlier ones, and all override defaults.

    `command`: name for the usage line. `options`: arguments that this command takes besides the configuration.

    Raises:
        ConfigError: everything that is wrong, one line each.
        SystemExit: with 0, after printing for `--help` or `--print_config`.
    """
    problems = Problems()
    arguments = _split_arguments(argv, options, problems)
    if "--help" in arguments.switches:
        _print_help(command, options)
        raise SystemExit(0)
    raw_values = [raw for path in arguments.files for raw in read_config(path, problems)] + arguments.values
    settings = all_settings()
    known = {key: (setting.type, setting.default) for key, setting in settings.items()}
    known |= {option.name: (option.value_type, option.default) for option in options if not option.nargs}
    values: dict[str, Any] = {name: default for name, (_, default) in known.items()}
    values |= {option.name: tuple(arguments.positionals) for option in options if option.nargs}
    unreadable: set[str] = set()
    for raw in raw_values:
        type_, default = known[raw.name]
        try:
            values[raw.name] = parse_value(type_, raw)
        except WrongTypeError as error:
            line = f"{raw.source}: {error} Correct it; the default is {format_value(default)}."
            problems.add(line, loses_value=False)
            unreadable.add(raw.name)
    config = Config(
        **{
            section: cls(**{s.name: values[key] for key, s in settings.items() if s.section == section})
            for section, (cls, _) in all_sections().items()
        }
    )
    if not problems.has_lost_values:
        # An unreadable value is still the default here, so messages that name its setting are left out.
        found = validate(config)
        problems.lines.extend(line for line in found if not any(key in line for key in unreadable))
    if problems.lines:
        raise ConfigError("\n".join(problems.lines))
    if "--print_config" in arguments.switches:
        print(dump(config), end="")
        raise SystemExit(0)
    explicit = frozenset(raw.name for raw in raw_values if raw.name in settings)
    return Loaded(config, explicit, {option.key: values[option.name] for option in options})


def dump(config: Config) -> str:
    """Format as YAML, with each field's help as a comment; `--config` reads it back as an equal `Config`."""
    lines: list[str] = []
    for section, values in asdict(config).items():
        lines += [f"# {all_sections()[section][1]}", f"{section}:"]
        for name, value in values.items():
            lines += [f"  # {line}" for line in textwrap.wrap(all_settings()[f"{section}.{name}"].help, 116)]
            lines.append(f"  {name}: {format_value(value)}")
        lines.append("")
    return "\n".join(lines)


@dataclass
class _Arguments:
    """Parts of the command line; values are text."""

    switches: set[str] = field(default_factory=set[str])
    files: list[str] = field(default_factory=list[str])
    values: list[RawValue] = field(default_factory=list[RawValue])
    positionals: list[str] = field(default_factory=list[str])


def _split_arguments(argv: Sequence[str], options: Sequence[Option], problems: Problems) -> _Arguments:
    """Take the command line apart, from left to right, without abbreviations."""
    found, rest = _Arguments(), list(argv)
    takes_positionals = any(option.nargs for option in options)
    option_flags = {option.name for option in options if not option.nargs}
    bools = {f"--{key}" for key, setting in all_settings().items() if setting.type is bool}
    bools |= {option.name for option in options if option.type is bool}
    valid = [*(f"--{key}" for key in all_settings()), "--config", *option_flags, *SWITCHES]
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
        elif name == "--local_rank" and equals:
            continue  # added by DeepSpeed's launcher; the variable LOCAL_RANK has the same value
        elif name not in valid:
            problems.add(format_unknown_name(name, f"unknown option {argument!r}", valid), loses_value=False)
            if not equals and following and not following.startswith("-"):
                rest.pop(0)  # the unknown option's value
        elif name in SWITCHES:
            if equals:
                problems.add(f"{argument}: it takes no value. Write {name} alone, or leave it out.")
            found.switches.add(name)
            if name == "--debug":
                found.files.append("configs/debug.yaml")
        else:
            if not equals and name in bools and not _is_bool(following, or_any=not takes_positionals):
                text = "true"
            elif not equals and following is not None:
                text = rest.pop(0)
            elif not equals or (name == "--config" and not text):
                problems.add(f"{name} without a value: it needs one. Write {name} VALUE.")
                continue
            if name == "--config":
                found.files.append(text)
            else:
                key = name if name in option_flags else name[2:]
                syntax = "null" if text in ("null", "Null", "NULL", "~") else "plain"
                found.values.append(RawValue(key, text, f"{name} {text!r}", syntax))
    if not takes_positionals:
        _refuse_positionals(found.positionals, problems)
    return found


def _refuse_positionals(positionals: Sequence[str], problems: Problems) -> None:
    for argument in positionals:
        fix = "Write --section.field VALUE"
        if argument.partition("=")[0] in all_settings():
            fix = f"Write --{argument}"
        elif argument.endswith((".yaml", ".yml")):
            fix = f"Write --config {argument}"
        problems.add(f"argument {argument!r}: it follows no option that takes a value. {fix}, or remove it.")


def _is_bool(text: str | None, *, or_any: bool) -> bool:
    """Return whether the argument after `--run.overwrite` is its value; `or_any`: it can be nothing else, even if mistyped."""
    return text is not None and (or_any or text.lower() in ("true", "false", "yes", "no", "on", "off"))


def _print_help(command: str, options: Sequence[Option]) -> None:
    from jsonargparse import SUPPRESS, ArgumentParser

    usage = [f"python -m agnews_dist {command}", "[--config FILE.yaml ...]", "[--section.field VALUE ...]"]
    for option in options:
        flag = option.name if option.type is bool else f"{option.name} {option.key.upper()}"
        usage.append(f"[{option.name.upper()} ...]" if option.nargs else f"[{flag}]")
    parser = ArgumentParser(usage=" ".join(usage), add_help=False, default_env=False)
    general = parser.add_argument_group("general")
    for option in options:
        extra: dict[str, Any] = {"nargs": "*", "default": SUPPRESS} if option.nargs else {"default": option.default}
        general.add_argument(option.name, type=option.value_type, help=option.help, **extra)
    general.add_argument(
        "--config", metavar="FILE.yaml", default=SUPPRESS, help="YAML file with differences from the defaults; may be repeated."
    )
    for name, text in SWITCHES.items():
        general.add_argument(name, action="store_true", default=SUPPRESS, help=text)
    for section, (_, section_text) in all_sections().items():
        group = parser.add_argument_group(section, section_text)
        for key, setting in all_settings().items():
            if setting.section == section:
                group.add_argument(f"--{key}", type=setting.type, default=setting.default, help=setting.help)
    parser.print_help()
