"""The command line: a command's options and settings from its arguments; all errors are reported at once.

argparse takes the arguments apart, and config/ checks the values. docs/commands.md says why argparse and pydantic.
"""

import re
from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agnews_dist.config.fields import BOOLS, Problems, RawValue, all_sections, all_settings, build_config, check_value, is_path
from agnews_dist.config.schema import Config, Level, PathText
from agnews_dist.errors import quote
from agnews_dist.events import begin_phase
from agnews_dist.experiments.space import Dimension, split_dimensions
from agnews_dist.storage.directories import expand_path

if TYPE_CHECKING:
    from agnews_dist.distributed.preemption import PreemptionHandler
    from agnews_dist.report.console import Console, Verbosity  # rich, which most commands need later or never


@dataclass(frozen=True)
class Option:
    """An argument of one command: a flag (`--split`; `--json` without a value for a bool) or, with `nargs="*"`, all positional
    arguments (`text`)."""

    name: str
    help: str
    type: Any = str
    """Annotation, as for a setting: `Literal["a", "b"]`, `int | None`."""
    default: Any = None
    bare: str | None = None
    """Value of the flag without a value; None: it needs one."""
    nargs: Literal["*"] | None = None
    level: Level = "basic"


GENERAL = (
    Option("--config", "YAML file of settings; may be repeated.", PathText),
    Option("--debug", "Short for --config configs/debug.yaml.", bool, False),
    Option("--print_config", "Print the settings as YAML.", Literal["all", "changed"], bare="all"),
    Option("--help", "Show this text, or explain all settings.", Literal["basic", "all"], bare="basic"),
)
"""Options of every command."""
DEBUG = "--config=configs/debug.yaml"


@dataclass(frozen=True)
class Command:
    """A command as `--help` and completion show it."""

    name: str
    summary: str
    """Two sentences at most."""
    examples: Sequence[str]
    options: Sequence[Option] = ()
    """Arguments that it takes besides the settings."""
    settings: Sequence[str] | None = None
    """Sections and keys of settings that the short help shows; None: the basic settings."""
    shows_defaults: bool = True
    """False: without a value, some settings are those of a saved model."""
    takes_lists: bool = False
    """True if settings may have lists and ranges of values."""
    display: Literal["stdout", "stderr"] | None = None
    """Stream on which people watch the command load PyTorch and work. Lines may be missing from it if it is not read."""
    handles_stops: bool = False
    """True if the command saves and ends when it is asked to stop (preemption.py)."""

    def shows(self, key: str) -> bool:
        """Return whether the short help shows a setting."""
        if self.settings is None:
            return all_settings()[key].level == "basic"
        return key in self.settings or key.partition(".")[0] in self.settings


@dataclass(frozen=True)
class Loaded:
    """The configuration and options of a command."""

    config: Config
    explicit: frozenset[str]
    """Dotted keys that a YAML file or a flag has set, even to the default."""
    options: Mapping[str, Any]
    """The command's own arguments by name (`split`), with defaults; positional arguments are a tuple of strings."""
    dimensions: Sequence[Dimension] = ()
    """Settings with lists and ranges of values; `config` has the first of each."""
    console: "Console | None" = None
    """The sink for people, on rank 0 of a command with a display."""
    preemption: "PreemptionHandler | None" = None
    """The handler of signals, of a command that handles stops."""

    @property
    def verbosity(self) -> "Verbosity":
        """The amount of output that --quiet and --verbose ask for."""
        return "quiet" if self.options.get("quiet") else "verbose" if self.options.get("verbose") else "normal"

    def begin_phase(self, task: str) -> None:
        """Show what the command does from here on."""
        if self.console is not None:
            self.console(begin_phase(task))


class HelpRequest(Exception):  # noqa: N818
    """The command line asks for help, whatever else is in it."""

    def __init__(self, level: Literal["basic", "all"]) -> None:
        super().__init__(level)
        self.level = level


def load(argv: Sequence[str], options: Sequence[Option] = (), *, takes_lists: bool = False) -> Loaded:
    """Build the configuration. Flags override `--config` files, later files override earlier ones, and all override defaults.

    `options`: arguments that the command takes besides the settings. `takes_lists`: settings may have several values.

    Raises:
        ConfigError: everything that is wrong, one line each.
        HelpRequest: for `--help`.
        SystemExit: with 0, after printing for `--print_config`.
    """
    problems, settings = Problems(), all_settings()
    flags = {option.name: option for option in (*options, *GENERAL) if not option.nargs}
    takes_texts = any(option.nargs for option in options)
    given, positionals = _split_arguments(argv, flags, problems, takes_texts=takes_texts)
    if "--help" in given:
        raise HelpRequest("all" if given["--help"][-1] == "all" else "basic")
    if not takes_texts:
        _refuse_positionals(positionals, problems)
    values = {option.name: tuple(positionals) if option.nargs else option.default for option in options}
    for option in options:
        if option.nargs and is_path(option.type):
            values[option.name] = tuple(_expand(word, problems) for word in positionals)
    raw_values: list[RawValue] = []
    for path in given.pop("--config", []):
        from agnews_dist.config.yaml_file import read_config  # late: most ranks read no YAML

        raw_values += read_config(path, problems)
    for flag, text in ((flag, text) for flag, texts in given.items() for text in texts):
        known = settings.get(flag[2:]) or flags[flag]
        is_null = text in ("null", "Null", "NULL") or (text == "~" and not is_path(known.type))
        raw = RawValue(flag[2:], None if is_null else text, f"{flag} {quote(text)}")
        if flag not in flags:
            raw_values.append(raw)
            continue
        try:
            value = check_value(raw, known.type, known.default)[1]
            values[flag] = (values[flag] or ()) + value if isinstance(value, tuple) else value
        except ValueError as error:
            problems.add(str(error))
    if values.get("--quiet") and values.get("--verbose"):
        problems.add("--quiet and --verbose: they contradict each other. Remove one of them.", "")
    raw_values, dimensions = split_dimensions(raw_values, problems) if takes_lists else (raw_values, ())
    config = build_config(raw_values, problems)
    if "--print_config" in given:
        from agnews_dist.config.yaml_file import dump

        print(dump(config, only_changed=given["--print_config"][-1] == "changed"), end="")
        raise SystemExit(0)
    own = {option.name.lstrip("-"): values[option.name] for option in options}
    return Loaded(config, frozenset(raw.name for raw in raw_values), own, dimensions)


def _expand(word: str, problems: Problems) -> str:
    try:
        return expand_path(word)
    except ValueError as error:
        problems.add(f"{quote(word)}: {error}", "")
        return word


def _split_arguments(
    argv: Sequence[str], flags: Mapping[str, Option], problems: Problems, *, takes_texts: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """Return (flag -> its values in their order, positional arguments)."""
    end = argv.index("--") if "--" in argv else len(argv)
    known = {**flags, **{f"--{key}": setting for key, setting in all_settings().items()}}
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in known:
        parser.add_argument(name, dest=name, nargs="?", const=getattr(known[name], "bare", None), action="append")
    bools = {name for name, each in known.items() if each.type is bool}
    words = _attach_values(argv[:end], bools, takes_texts=takes_texts)
    parsed, rest = parser.parse_known_args(words)
    given: dict[str, list[str]] = {}
    for name, texts in vars(parsed).items():
        if texts and None in texts:
            hides = [name[2:]] if name[2:] in all_settings() else [""] * (name == "--config")
            problems.add(f"{name} without a value: it needs one. Write {name} VALUE.", *hides)
        elif texts:
            given[name] = texts
    positionals: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "-" or not word.startswith("-") or (takes_texts and " " in word):
            positionals.append(word)
            continue
        name, equals, _ = word.partition("=")
        if name[2:] in all_sections():
            problems.add(f"{quote(word)}: a section takes settings below it. Write {name}.FIELD VALUE.", f"{name[2:]}.")
        else:
            more = ", or write it after -- if it is a text" if takes_texts else ""
            problems.add_unknown(name, f"unknown option {quote(word)}", known, more=more)
        following = "".join(words[words.index(word) + 1 :][:1])
        if not equals and following and not following.startswith("-"):
            rest.remove(following)  # the unknown option's value
    return given, positionals + list(argv[end + 1 :])


def _attach_values(words: Sequence[str], bools: Collection[str], *, takes_texts: bool) -> list[str]:
    """Write with `=` what argparse would misread: `-1e-3` after a flag, and the word after a bool, which may be a text."""
    rest, found = list(words), list[str]()
    while rest:
        word = rest.pop(0)
        following = rest[0] if rest else ""
        if word in bools:
            is_value = following.lower() in BOOLS or (following and not takes_texts and not following.startswith("-"))
            word += f"={rest.pop(0) if is_value else 'true'}"
        elif word == "-h":
            word = "--help"
        elif word.startswith("--") and "=" not in word and re.match(r"-[^-]", following) and following != "-h":
            word += f"={rest.pop(0)}"
        if word.startswith("--debug=") and word[8:].lower() in BOOLS:
            found = [each for each in found if each != DEBUG]  # the last one counts
            word = DEBUG if BOOLS[word[8:].lower()] else word
        if not re.fullmatch(r"--local[-_]rank=\d+", word):  # added by launchers; the variable LOCAL_RANK has the same value
            found.append(word)
    return found


def _refuse_positionals(positionals: Sequence[str], problems: Problems) -> None:
    for argument in positionals:
        fix = "Write --section.field VALUE"
        if argument.partition("=")[0] in all_settings():
            fix = f"Write --{argument}" + " VALUE" * ("=" not in argument)
        elif argument.endswith((".yaml", ".yml")):
            fix = f"Write --config {argument}"
        problems.add(f"argument {quote(argument)}: it follows no option that takes a value. {fix}, or remove it.", "")
