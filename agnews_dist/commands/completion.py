"""`agnews-dist --install_completion [SHELL]` and `--print_completion SHELL`: completion for bash, zsh and fish, by shtab."""

import importlib
import os
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

from agnews_dist.commands.arguments import Command
from agnews_dist.commands.help import add_arguments
from agnews_dist.errors import UserError
from agnews_dist.storage import atomic

PROGRAM = "agnews-dist"
SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str], modules: Mapping[str, str]) -> int:
    """Print or install the completion; return the exit code. `modules`: command -> its module."""
    flag, *words = [part for word in argv for part in word.split("=", 1)]
    shell = words[0] if words else Path(os.environ.get("SHELL", "")).name
    try:
        if shell not in SHELLS or len(words) > 1:
            text = " ".join(words) or shell
            raise UserError(f"{flag} {text!r}: there is completion for {', '.join(SHELLS)}. Write {flag} bash, for example.")
        script = build_script(shell, [importlib.import_module(module).COMMAND for module in modules.values()])
        print(script if flag == "--print_completion" else install(shell, script))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_script(shell: str, commands: Sequence[Command]) -> str:
    """Return the completion script of a shell: commands, their options and settings, choices, and names of files."""
    import shtab

    parser = ArgumentParser(prog=PROGRAM, add_help=False)
    for flag, text in (("--help", "List the commands."), ("--version", "Print the version.")):
        parser.add_argument(flag, action="store_true", help=text)
    for flag in ("--install_completion", "--print_completion"):
        parser.add_argument(flag, choices=SHELLS, help="Completion for a shell.")
    group = parser.add_subparsers()
    for command in commands:
        text = command.summary.partition(". ")[0]
        add_arguments(group.add_parser(command.name, help=text, add_help=False), command, everything=True, is_short=True)
    return shtab.complete(parser, shell)


def install(shell: str, script: str) -> str:
    """Write the script where the shell finds it, and return a message.

    Raises:
        UserError: a file cannot be written.
    """
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "agnews_dist" / shell
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        file, start, line = config / "fish" / "completions" / f"{PROGRAM}.fish", None, ""
    elif shell == "zsh":
        file, start = data / f"_{PROGRAM}", Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        line = f"fpath=({shlex.quote(str(data))} $fpath); autoload -Uz compinit && compinit"
    else:
        file, start, line = data / PROGRAM, home / ".bashrc", f"source {shlex.quote(str(data / PROGRAM))}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, script)
        if start is not None:
            old = start.read_text(encoding="utf-8") if start.exists() else ""
            if line not in old.splitlines():
                with start.open("a", encoding="utf-8") as startup:
                    startup.write(("" if not old or old.endswith("\n") else "\n") + line + "\n")
    except OSError as error:
        raise UserError(f"{error.filename}: it cannot be written ({error.strerror}). Use --print_completion {shell}.") from None
    return f"{file} written" + (f", and a line in {start} that reads it" if start else "") + ". Start a new shell to use it."
