"""`agnews-dist predict`: classify texts with a saved classifier, in one process. Answers come in the order of the texts.

--model.name is a run's directory, an exported directory, or a hub id of a GPT2ForSequenceClassification.
"""

import os
import sys
from collections.abc import Sequence
from typing import Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing, run_command
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError, UserError

COMMAND = Command(
    "predict",
    "Classify texts from arguments, a file or standard input. Answers come in the order of the texts.",
    (
        'agnews-dist predict --model.name runs/NAME "Shares fell." "He scored."',
        "agnews-dist predict --model.name runs/NAME --file texts.txt --format jsonl",
        "cat texts.txt | agnews-dist predict --model.name runs/NAME",
    ),
    (
        Option("text", "Texts to classify.", nargs="*"),
        Option("--file", "One text per line, or .jsonl with 'text' per line.", PathText),
        Option("--format", "Default: table on a terminal, else JSON lines.", Literal["table", "jsonl"]),
    ),
    ("data.max_length", "model.name", "model.revision", "engine.device", "engine.precision"),
    shows_defaults=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run_command(COMMAND, argv, predict)


def predict(world: World, loaded: Loaded) -> None:
    """Read all texts, classify them chunk by chunk, and print the answers of each chunk at once."""
    config, options = loaded.config, loaded.options
    if world.num_ranks > 1:
        raise UserError(
            f"predict was started as {world.num_ranks} ranks: each would print every answer. Start it without torchrun, "
            "or score a split on many ranks with evaluate."
        )
    if "model.name" not in loaded.explicit:
        raise ConfigError(
            f"model.name is not set: its default {config.model.name!r} is not a classifier. Set --model.name to a run's "
            "directory, such as runs/NAME."
        )
    # Imported here, so that --help and wrong settings do not wait for torch.
    with importing():
        from agnews_dist.evaluation.predictor import classify, read_texts
        from agnews_dist.model.export import load_classifier
        from agnews_dist.model.gpt2 import check_max_length
        from agnews_dist.report.prediction_view import print_lines, print_table
        from agnews_dist.run.engine_setup import place_classifier, start_engine

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    if not options["text"] and options["file"] is None and sys.stdin.isatty():
        print("Reading texts from the terminal, one per line; end with Ctrl-D.", file=sys.stderr, flush=True)
    texts = read_texts(options["text"], options["file"], sys.stdin)
    saved = load_classifier(config.model.name, revision=config.model.revision)
    classifier, tokenizer, class_names, max_length, encoding, notes = saved
    for note in notes:
        warn(note)
    if "data.max_length" in loaded.explicit:
        max_length = config.data.max_length
        check_max_length(max_length, classifier.config.n_positions)
    engine = start_engine(config.engine, world, is_training=False)
    place_classifier(classifier, engine, fast_path=config.engine.fast_path)
    predictions = classify(texts, classifier, tokenizer, engine, max_length=max_length, encoding=encoding, warn=warn)
    is_table = options["format"] == "table" or (options["format"] is None and sys.stdout.isatty())
    try:
        (print_table if is_table else print_lines)(predictions, class_names)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`). Buffered output must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
