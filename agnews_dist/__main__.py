"""Command line: `agnews-dist COMMAND`, `python -m agnews_dist COMMAND` or `torchrun -m agnews_dist COMMAND`."""

import importlib
import sys
from collections.abc import Sequence

from agnews_dist import __version__
from agnews_dist.errors import did_you_mean

COMMANDS = {
    "train": "fine-tune, evaluate, and write a model that Hugging Face loads",
    "sweep": "train all combinations of some settings on one set of features, and select one",
    "clean": "find probable label errors, and train without them",
    "evaluate": "score a split of any source with a saved model",
    "predict": "classify texts from arguments, a file or standard input",
    "report": "write the report of a run again, or compare runs",
    "runs": "list all runs with state, scores and settings",
    "export": "write the model of a run as an ONNX file",
    "push": "upload the model of a run to the Hugging Face hub",
    "plan": "show the batches of a training: steps, padding, balance of the ranks",
    "probe": "score every layer of the frozen model: how many blocks to train",
    "doctor": "check machine, cluster and settings before a job",
    "prepare": "load and tokenise the data before a job, on a machine with a network",
    "restarts": "decide whether to restart a job that has ended (for batch scripts)",
    "cache": "list or remove the tokens and features kept on disk",
    "schema": "print the JSON schema of configuration files, for editors",
}
"""Name -> one line of help."""
_RENAMED = {"schema": "print_schema", "export": "export_run", "report": "build_report", "runs": "list_runs"}
"""Names of modules are unique in the package, and other parts have these."""
MODULES = {name: f"agnews_dist.commands.{_RENAMED.get(name, name)}" for name in COMMANDS}
"""Name -> module with COMMAND and `run`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        from agnews_dist.commands.command import run_command  # late: a list of the commands needs none of them

        module = importlib.import_module(MODULES[name])
        return run_command(module.COMMAND, arguments[1:], module.run)
    if name.partition("=")[0] in ("--install_completion", "--print_completion"):
        return importlib.import_module("agnews_dist.commands.completion").main(arguments, MODULES)
    if name == "--version":
        print(f"agnews_dist {__version__}")
        return 0
    commands = "\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items())
    usage = (
        f"usage: agnews-dist COMMAND [--help] [--SECTION.FIELD VALUE]\n\n{commands}\n\n"
        "  --install_completion [bash|zsh|fish]   complete commands and settings in a shell\n"
        "  --print_completion [bash|zsh|fish]     print the script that does so\n"
        "  --version                              print the version"
    )
    if name in ("--help", "-h"):
        print(usage)
        return 0
    if name:
        print(f"error: command {name!r}: unknown.{did_you_mean(name, COMMANDS)} Choose one of these.\n", file=sys.stderr)
    print(usage, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
