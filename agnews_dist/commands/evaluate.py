"""`agnews-dist evaluate`: score a split of any source with a saved classifier, on any number of ranks.

--model.name is a run's directory, an exported directory, or a hub id of a GPT2ForSequenceClassification. A single file, and
other data without names of splits, is scored whole. For a held-out validation split give --config runs/NAME/config.yaml too. A
split without labels is predicted: --output gets the predictions and no scores.
"""

import time
from functools import partial
from pathlib import Path
from typing import Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import QUIET, VERBOSE, importing
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import DataError, count_noun

COMMAND = Command(
    "evaluate",
    "Score a split of any source with a saved model. Any number of ranks gives the same scores.",
    (
        "agnews-dist evaluate --model.name runs/NAME --data.source data/news",
        "agnews-dist evaluate --config runs/NAME/config.yaml --model.name runs/NAME",
        "agnews-dist evaluate --model.name runs/NAME --data.source new.csv --output out",
    ),
    (
        QUIET,
        VERBOSE,
        Option("--split", "Split to score; default: test, or a whole file.", Literal["train", "validation", "test"]),
        Option("--output", "Directory for scores and predictions.", PathText),
    ),
    ("data.source", "data.max_length", "data.cache_dir", "model.name", "engine.device", "engine.precision", "run.overwrite"),
    shows_defaults=False,
    display="stdout",
)


def run(world: World, loaded: Loaded) -> None:
    """Score one split, and show or write the result."""
    start = time.perf_counter()
    # Imported here, so that --help and wrong settings do not wait for torch.
    with importing():
        from agnews_dist.data.batching.loader import TokenTable
        from agnews_dist.distributed import collectives
        from agnews_dist.engine.device import should_use_cuda
        from agnews_dist.evaluation.evaluator import evaluate_split
        from agnews_dist.evaluation.metrics import are_labelled
        from agnews_dist.events import RunStarted
        from agnews_dist.model.gpt2 import count_parameters
        from agnews_dist.report.console import Sinks
        from agnews_dist.run import directory, engine_setup, fingerprints, hub_inputs, results, setup
        from agnews_dist.training.timing import StageTimer

    config, output, timer = loaded.config, loaded.options["output"], StageTimer(start)
    should_use_cuda(world, config.engine.device)
    with Sinks(loaded.console) as emit:
        loaded.begin_phase(f"connect {count_noun(world.num_ranks, 'rank')}")
        engine = engine_setup.start_engine(config.engine, world, is_training=False)
        if output is not None:
            check_output = partial(directory.check_output, Path(output), overwrite=config.run.overwrite)
            collectives.raise_if_any_failed(collectives.catch_on_main(check_output, f"looks at {output}"))
        hub_inputs.fetch_inputs(partial(hub_inputs.list_requests, config, hold_out=False), world, emit)

        def load() -> setup.EvaluationInputs:
            split = loaded.options["split"]
            length = config.data.max_length if "data.max_length" in loaded.explicit else None
            inputs = setup.load_evaluation_inputs(config, split=split, max_length=length, emit=emit, timer=timer, world=world)
            if output is None and not are_labelled(inputs.tokens.labels, len(inputs.class_names)):
                raise DataError(
                    f"{config.data.source} has no labels in {inputs.tokens.name}: there is nothing to score. Set --output to a "
                    "directory for the predictions, or --data.label_column."
                )
            return inputs

        inputs = collectives.raise_if_any_failed(collectives.catch(load))
        classifier, tokens = inputs.classifier, inputs.tokens
        weights = fingerprints.weights_fingerprint(inputs.classifier.frozen_state)
        collectives.check_equal(hashes := {"tokens": inputs.fingerprint, "frozen_weights": weights})
        engine_setup.place_classifier(classifier, engine, fast_path=config.engine.fast_path)
        table = TokenTable(tokens, pad_id=setup.pad_id_of(inputs.tokenizer), device=engine.device)
        facts = {
            "model": config.model.name,
            "data": f"{config.data.source}: {len(table):,} rows of {table.name}",
            "device": f"{engine.description}, {engine.precision}",
            "ranks": f"{world.num_ranks} ({world.ranks_per_node} per node)",
            **inputs.data_facts,
        }
        emit(RunStarted(facts=facts, parameters=count_parameters(classifier)))
        timer.end_setup()
        with timer.stage("eval"):
            scores = evaluate_split(classifier, table, engine, emit=emit)
        emit(scores.to_event(tokens.name, 0, inputs.class_names))
        if output is not None:
            results.write_scores(Path(output), engine, tokens.name, scores, fingerprints=hashes, timer=timer, emit=emit)
