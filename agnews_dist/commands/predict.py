"""`agnews-dist predict`: classify texts with a saved classifier, on any number of ranks. Answers have the order of the texts.

--model.name is a run's directory, an exported directory, or a hub id of a GPT2ForSequenceClassification. Rank 0 reads the texts
and writes the answers.
"""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import QUIET, importing
from agnews_dist.config.schema import Count, PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError
from agnews_dist.events import Event, Warned

COMMAND = Command(
    "predict",
    "Classify texts from arguments, a file or standard input. Answers come in the order of the texts.",
    (
        'agnews-dist predict --model.name runs/NAME "Shares fell." "He scored."',
        "agnews-dist predict --model.name runs/NAME --file new.csv --output out.parquet",
        "cat texts.txt | agnews-dist predict --model.name runs/NAME",
    ),
    (
        Option("text", "Texts to classify; after -- also one that begins with -.", nargs="*"),
        Option("--file", "Table, text file or directory; - is standard input.", PathText),
        Option(
            "--input_format",
            "Default: the suffix, or txt, which is a text per line.",
            Literal["csv", "tsv", "jsonl", "json", "txt"],
        ),
        Option("--output", "File of the input's columns and the answers.", PathText),
        Option("--top_k", "Classes whose probabilities are given.", Count | Literal["all"]),
        Option("--format", "Default: table on a terminal, else JSON lines.", Literal["table", "jsonl"]),
        QUIET,
    ),
    ("data.text_column", "data.max_length", "model.name", "model.revision", "engine.device", "engine.precision"),
    shows_defaults=False,
    display="stderr",
)


def run(world: World, loaded: Loaded) -> None:
    """Classify the texts chunk by chunk, and print or write the answers of each chunk at once."""
    config, options = loaded.config, loaded.options
    _check_options(loaded)
    # Imported here, so that --help and wrong settings do not wait for torch.
    with importing():
        from agnews_dist.data.input_texts import InputTexts
        from agnews_dist.distributed import collectives
        from agnews_dist.evaluation.predictor import predict_chunks
        from agnews_dist.model.export import SavedClassifier
        from agnews_dist.report.console import Sinks
        from agnews_dist.report.prediction_files import check_output, open_answers
        from agnews_dist.report.prediction_view import Write, create_printer
        from agnews_dist.run import engine_setup, hub_inputs, prediction
        from agnews_dist.run.fingerprints import weights_fingerprint

    output = None if options["output"] is None else Path(options["output"])
    is_table = options["format"] == "table" or (options["format"] is None and sys.stdout.isatty())
    shows_answers = output is None and sys.stdout.isatty()
    with ExitStack() as stack:

        def open_texts() -> InputTexts:
            if output is not None:
                check_output(output, overwrite=config.run.overwrite)
            return prediction.open_input(config, options)

        def load() -> tuple[SavedClassifier, int | None]:
            length = config.data.max_length if "data.max_length" in loaded.explicit else None
            model = prediction.load_model(config, length)
            return model, prediction.choose_num_best(options, len(model.class_names), is_table=is_table)

        def open_output() -> Write:
            assert texts is not None
            write = None
            if output is not None:
                write = stack.enter_context(open_answers(output, texts, model.class_names, options["top_k"]))
            for note in (*(f"warning: {note}" for note in model.notes), *texts.notes):
                _tell(note)
            texts.check()
            if loaded.console is not None and shows_answers:
                # From here on the answers show the progress. A live display would take their stream.
                loaded.console.close()
            return write or create_printer(model.class_names, is_table=is_table)

        engine = engine_setup.start_engine(config.engine, world, is_training=False)
        texts = collectives.raise_if_any_failed(collectives.catch_on_main(open_texts, "opens the texts"))
        hub_inputs.fetch_inputs(partial(hub_inputs.list_requests, config, has_data=False), world, _warn)
        model, num_best = collectives.raise_if_any_failed(collectives.catch(load))
        write = collectives.raise_if_any_failed(collectives.catch_on_main(open_output, "checks the texts"))
        if world.num_ranks > 1:
            weights = {**model.classifier.frozen_state, **model.classifier.suffix.state_dict()}
            collectives.check_equal({"weights": weights_fingerprint(weights)})
        predictor = prediction.build_predictor(model, engine, num_best, fast_path=config.engine.fast_path)
        emit = stack.enter_context(Sinks(None if shows_answers else loaded.console))
        chunks, num_texts = (texts.chunks(predictor.texts_per_chunk), texts.num_texts) if texts is not None else ((), 0)
        num_done, num_cut = predict_chunks(chunks, write, predictor, num_texts=num_texts, emit=emit)
    if num_cut:
        _tell(
            f"warning: {num_cut} of {num_done} texts were truncated to {model.max_length} tokens. "
            "Split them, or train with a larger --data.max_length."
        )


def _check_options(loaded: Loaded) -> None:
    """Check what needs neither a file nor a model.

    Raises:
        ConfigError: no model is set, or --format with --output.
    """
    if "model.name" not in loaded.explicit:
        raise ConfigError(
            f"model.name is not set: its default {loaded.config.model.name!r} is not a classifier. Set --model.name to a run's "
            "directory, such as runs/NAME."
        )
    if loaded.options["output"] is not None and loaded.options["format"] is not None:
        raise ConfigError(
            f"--format {loaded.options['format']}: with --output nothing is printed, and the file's suffix says its format. "
            "Remove one of them."
        )


def _warn(event: Event) -> None:
    """Print a warning, which no console shows yet."""
    if isinstance(event, Warned):
        _tell(f"warning: {event.message}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
