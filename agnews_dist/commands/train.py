"""`agnews-dist train`: text in, a classifier that Hugging Face loads out. `torchrun --nproc_per_node=8 -m agnews_dist.train`.

start     open the process group; from here on a signal to any rank stops all
load      claim the run's directory, find its checkpoint, load model and tokens; an error on any rank is raised on all
train     global batches; after every epoch or some steps, score the validation split and keep the best weights; checkpoints
finish    restore the best weights, score the test split once, write result.json, export
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from agnews_dist.commands.arguments import Command, Loaded
from agnews_dist.commands.command import TRAINING_OPTIONS, importing, run_command
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World
from agnews_dist.errors import count_noun

COMMAND = Command(
    "train",
    "Fine-tune, evaluate, and write a model that Hugging Face loads. Under torchrun, all ranks train one model.",
    (
        "agnews-dist train --debug",
        "agnews-dist train --config my.yaml --optim.lr 3e-4 --run.name news",
        "torchrun --nproc_per_node=8 -m agnews_dist.train --config my.yaml",
    ),
    TRAINING_OPTIONS,
    display="stdout",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 for a failed run, 2 for wrong settings, or the exit code of a stop (preemption.py)."""
    preemption = PreemptionHandler(os.environ)
    return run_command(COMMAND, argv, partial(train, preemption=preemption), preemption)


def train(world: World, loaded: Loaded, *, preemption: PreemptionHandler) -> None:
    """Train, evaluate and export one classifier.

    Raises:
        Stopped: the run was asked to stop before its end.
    """
    start = time.perf_counter()
    # Imported here: --help and wrong settings must not wait seconds for torch.
    with importing():
        from agnews_dist import training
        from agnews_dist.distributed import collectives
        from agnews_dist.engine.device import check_compiler
        from agnews_dist.engine.memory import Estimate, estimate
        from agnews_dist.preflight.memory_check import check_fits
        from agnews_dist.run import setup
        from agnews_dist.run.attempt import Attempt
        from agnews_dist.run.engine_setup import start_training_engine
        from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
        from agnews_dist.run.memory_setup import build_memory_setup
        from agnews_dist.run.reporting import Reporter
        from agnews_dist.run.results import write_results
        from agnews_dist.run.summary import log_summary

    config, timer = loaded.config, training.StageTimer(start)
    loaded.begin_phase(f"connect {count_noun(world.num_ranks, 'rank')}")
    engine = start_training_engine(config, world, preemption)
    with Attempt(config, engine, preemption, accept=loaded.options["accept"], timer=timer, console=loaded.console) as attempt:
        monitors = attempt.monitors
        attempt.claim()
        fetch_inputs(partial(list_requests, config), world, monitors.emit)

        def load() -> tuple[Estimate, setup.TrainingInputs]:
            check_compiler(config.engine.compile)
            files = setup.read_model_files(config.model, config.data)
            shape, sizes = build_memory_setup(config, world, files.config)
            check_fits(shape, sizes, world)
            is_checked = attempt.has_checked_export
            found = setup.load_training_inputs(config, world, monitors.emit, timer, files, has_checked_export=is_checked)
            return estimate(shape, replace(sizes, num_classes=len(found.class_names))), found

        memory, inputs = collectives.raise_if_any_failed(collectives.catch(load))
        attempt.begin(inputs.fingerprints)
        tables = setup.place_inputs(config, inputs, engine)
        loader = setup.build_loader(config, inputs.classifier, tables["train"], world)
        features = setup.open_features(config, inputs, tables, engine, requested=attempt.requested_place())
        loader.owner_N = features.owner_N
        log_summary(config, engine, inputs, loader, features, memory=memory, attempt=attempt)
        setup.check_first_step(config, inputs.classifier, tables["train"], loader, engine, monitors.emit)
        reporter = Reporter(config, inputs, engine, features)
        trainer = setup.build_trainer(config, inputs, engine, loader, monitors)
        setup.build_features(features, loader, monitors)
        trainer.use_features(features.source("train"))
        evaluate = setup.build_evaluation(inputs, tables, engine, features, monitors)
        checkpoints = attempt.open_checkpoints(trainer, inputs.fingerprints, features.choice.place)
        has_profile = loaded.options["profile"] and world.is_main
        with (
            closing(checkpoints),
            training.profile_steps(has_profile, attempt.directory, engine.device, trainer.num_steps, monitors.emit) as on_step,
        ):
            trainer.fit(lambda: evaluate("validation"), checkpoints, on_step)

        trainer.best.restore()
        scores = {"validation": trainer.best.scores}
        if "test" in tables:
            scores["test"] = evaluate("test")
            monitors.emit(scores["test"].to_event("test", trainer.best.epoch, inputs.class_names, step=trainer.best.step))
        reporter.compute_features(tables, features)
        write_results(config, engine, inputs, features, trainer, scores, attempt=attempt, report=reporter.write)
