"""`python -m agnews_dist <story> ...`; the console script `agnews-dist` is the same."""

import importlib
import sys
from collections.abc import Sequence

from agnews_dist import __version__
from agnews_dist.errors import did_you_mean

STORIES = {
    "train": "fine-tune, evaluate, and write a model that Hugging Face loads",
    "evaluate": "score a split of any source with a saved model",
    "predict": "classify texts from arguments, a file or standard input",
    "plan": "show the batches before any job: steps, padding, balance of the ranks, text lengths",
    "doctor": "check machine, cluster and settings before a job: what would fail, how long it will take",
    "prepare": "load and tokenise the data ahead of the job, where there is a network",
    "restarts": "say whether a job that has ended should be started again (batch scripts ask)",
    "cache": "list or clear the tokens and features kept on disk",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story that the first argument names with the rest of the arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in STORIES:
        module = {"restarts": "run.restart_policy"}.get(name, name)
        return importlib.import_module(f"agnews_dist.{module}").main(arguments[1:])
    if name == "--version":
        print(f"agnews_dist {__version__}")
        return 0
    stories = "\n".join(f"  {story:<10}{text}" for story, text in STORIES.items())
    usage = f"usage: python -m agnews_dist STORY [--help] [--section.field VALUE ...]\n\n{stories}"
    if name in ("--help", "-h"):
        print(usage)
        return 0
    if name:
        hint = did_you_mean(name, STORIES)
        print(f"error: story {name!r}: there is none of this name.{hint} Choose one of these.\n", file=sys.stderr)
    print(usage, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
