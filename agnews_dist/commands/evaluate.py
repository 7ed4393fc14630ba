"""Score any split of any source with any saved classifier, on any number of ranks. `python -m agnews_dist evaluate`.

--model.name    a run's directory, an exported directory, or a hub id of a GPT2ForSequenceClassification
--data.source   as in training; a single file is scored whole
--split         train, validation or test; a validation part held out of train is training's own if the data settings are,
                which --config runs/NAME/config.yaml brings along
--output        directory for result.json and predictions-<split>.jsonl
"""

import time
from collections.abc import Sequence
from pathlib import Path

from agnews_dist.commands.command import run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World

OPTIONS = (
    cli.Option(
        "--split", choices=("train", "validation", "test"), help="Split to score; default: test, or a file whole."
    ),
    cli.Option("--output", help="Directory for result.json and predictions-<split>.jsonl; default: none are written."),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code."""
    return run_command("evaluate", argv, run, OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """Score one split and show, or write, the result."""
    start = time.perf_counter()
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    from agnews_dist.data.batching.loader import TokenTable
    from agnews_dist.data.corpus import check_source
    from agnews_dist.distributed import collectives
    from agnews_dist.engine.device import should_use_cuda
    from agnews_dist.evaluation.evaluator import evaluate_split
    from agnews_dist.events import RunStarted
    from agnews_dist.model.gpt2 import parameter_table
    from agnews_dist.report.console import Console, Sinks
    from agnews_dist.run.directory import check_output
    from agnews_dist.run.engine_setup import place_classifier, start_engine
    from agnews_dist.run.evaluation_setup import EvaluationInputs, load_evaluation_inputs
    from agnews_dist.run.fingerprints import weights_fingerprint
    from agnews_dist.run.results import write_scores
    from agnews_dist.training.timing import StageTimer

    config, options = loaded.config, loaded.options
    should_use_cuda(world, config.engine.device)
    timer = StageTimer(start)
    with Sinks() as emit:

        def prepare() -> EvaluationInputs:
            if world.is_main:
                emit.add(Console())
                if options["output"] is not None:
                    check_output(Path(options["output"]), overwrite=config.run.overwrite)
            check_source(config.data.source)
            return load_evaluation_inputs(
                config.data,
                config.model,
                split=options["split"],
                max_length=config.data.max_length if "data.max_length" in loaded.explicit else None,
                emit=emit,
                timer=timer,
                world=world,
            )

        outcome = collectives.catch(prepare)
        engine = start_engine(config.engine, world, is_training=False)
        sources = collectives.raise_if_any_failed(outcome)
        prints = {"tokens": sources.fingerprint, "frozen_weights": weights_fingerprint(sources.classifier.frozen_state)}
        collectives.check_equal(prints)
        place_classifier(sources.classifier, engine, fast_path=config.engine.fast_path)
        table = TokenTable(sources.tokens, pad_id=sources.pad_id, device=engine.device)
        facts = {
            "model": config.model.name,
            "data": f"{config.data.source}: {len(table):,} rows of {table.name}",
            "ranks": f"{world.num_ranks} ({world.ranks_per_node} per node)",
            "device": f"{engine.description}, {engine.precision}",
        }
        emit(RunStarted(facts=facts, parameters=parameter_table(sources.classifier)))
        timer.end_of_setup()
        with timer.stage("eval"):
            scored = evaluate_split(sources.classifier, table, engine, num_classes=len(sources.class_names), emit=emit)
        emit(scored.event(sources.tokens.name, 0, sources.class_names))
        if options["output"] is not None:
            write_scores(
                Path(options["output"]), engine, sources.tokens.name, scored, prints=prints, timer=timer, emit=emit
            )
