"""`--help` of a command: two sentences, examples, its options and the basic settings; `--help all` has every setting."""

import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from typing import Any, get_origin

from agnews_dist.commands.arguments import GENERAL, Command, Option
from agnews_dist.config.fields import all_sections, all_settings, choices_of, describe_type, format_value, is_path, split_type

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


def format_help(command: Command, *, everything: bool = False) -> str:
    """Format the help for a terminal of the current width."""
    texts = [f"[{option.name.upper()} ...]" for option in command.options if option.nargs]
    usage = " ".join(["agnews-dist", command.name, *texts, "[--OPTION VALUE]", "[--SECTION.FIELD VALUE]"])
    description = "\n".join([textwrap.fill(command.summary, 78), "", "examples:", *(f"  {line}" for line in command.examples)])
    parser = ArgumentParser(
        usage=usage,
        description=description,
        add_help=False,
        formatter_class=partial(RawDescriptionHelpFormatter, max_help_position=36),
    )
    add_arguments(parser, command, everything=everything)
    return parser.format_help()


def add_arguments(parser: ArgumentParser, command: Command, *, everything: bool, is_short: bool = False) -> None:
    """Add the options and settings of a command: all, or those of the short help. `is_short`: with one sentence each."""
    group = parser.add_argument_group("options")
    for option in (*command.options, *GENERAL):
        if everything or option.level == "basic":
            _add_argument(group, option)
    if not everything and any(map(command.shows, all_settings())):
        title = "settings [with defaults]" if command.shows_defaults else "settings"
        group = parser.add_argument_group(f"{title} (--help all explains all {len(all_settings())})")
    for section, (_, text) in all_sections().items():
        if everything:
            group = parser.add_argument_group(section, text)
        for key, setting in all_settings().items():
            if setting.section != section or not (everything or command.shows(key)):
                continue
            if everything and not is_short:
                text = f"{setting.help} It takes {describe_type(setting.type)}."
            else:
                text = setting.help.partition(". ")[0].removesuffix(".")
            _add_argument(group, Option(f"--{key}", text, setting.type, setting.default), has_default=command.shows_defaults)


def _add_argument(group: Any, option: Option, *, has_default: bool = True) -> None:
    text, choices = option.help.replace("%", "%%"), choices_of(option.type)
    if has_default and option.default is not None and option.default is not False and option.default != ():
        text += f" [{format_value(option.default)}]"
    if option.type is bool and not option.default:
        group.add_argument(option.name, action="store_true", help=text)
        return
    if option.type is bool:
        choices = ["true", "false"]
    members = [member for member, _ in split_type(option.type)]
    words = [METAVARS[member] for member in members if member in METAVARS] + choices
    is_short = len(option.name) + len("|".join(words)) <= 31
    metavar = "|".join(words) if is_short else METAVARS.get(members[0], "CHOICE")
    if option.nargs:
        metavar = option.name.upper()
    elif is_path(option.type):
        metavar = "PATH"
    elif get_origin(members[0]) is tuple:
        metavar = "A,B"
    nargs = option.nargs or ("?" if option.bare else None)
    # shtab lets a flag that appends be repeated.
    how = "append" if option.name == "--config" else "store"
    action = group.add_argument(option.name, action=how, nargs=nargs, metavar=metavar, help=text)
    # Not given above: argparse would show them instead of the metavar. shtab completes them, or the names of files.
    action.choices = choices or None
    if is_path(option.type):
        action.complete = "file"
