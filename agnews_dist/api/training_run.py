"""A whole training: text in, a classifier that Hugging Face loads out. The command and `fit` call it.

start     open the process group; from here on a signal to any rank stops all
load      claim the run's directory, find its checkpoint, load model and tokens; an error on any rank is raised on all
train     global batches; after every epoch or some steps, score the validation split and keep the best weights; checkpoints
finish    restore the best weights, score the test split once, write result.json, export
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from agnews_dist import training
from agnews_dist.config.schema import Config
from agnews_dist.data.corpus import ReadRows
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import check_compiler
from agnews_dist.engine.memory import Estimate, estimate
from agnews_dist.errors import count_noun
from agnews_dist.events import Emit, Scores, begin_phase
from agnews_dist.features.extension import GrowingFeatures
from agnews_dist.preflight.memory_check import check_fits
from agnews_dist.report.console import Console, Verbosity, create_console
from agnews_dist.run import setup
from agnews_dist.run.attempt import Attempt
from agnews_dist.run.engine_setup import start_training_engine
from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
from agnews_dist.run.memory_setup import build_memory_setup
from agnews_dist.run.model_setup import read_model_files
from agnews_dist.run.reporting import Reporter
from agnews_dist.run.results import select_scored, write_results
from agnews_dist.run.summary import log_summary


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a training is made of, the same on every rank."""

    config: Config
    accept: Sequence[str] = ()
    """Settings that may differ from the checkpoint's."""
    profile: bool = False
    """Write a torch.profiler trace."""
    verbosity: Verbosity = "normal"
    sinks: Sequence[Emit] = ()
    """Functions that get rank 0's events."""
    read_given: ReadRows | None = None
    """Reader of rows that were given in Python; None: `data.source` names them."""


@dataclass(frozen=True)
class Trained:
    """A training that has ended. Only rank 0 knows the directory."""

    directory: Path
    scores: Mapping[str, Scores]
    """Split -> scores of the best weights, for the splits with labels; the same on every rank."""


def train(
    world: World, job: TrainingJob, *, preemption: PreemptionHandler, console: Console | None = None, start: float | None = None
) -> Trained:
    """Train, evaluate and export one classifier. Collective.

    `console`: None: a new one. `start`: `time.perf_counter()` at the run's begin; None: now.

    Raises:
        UserError: anything that the user can fix.
        Stopped: the run was asked to stop before its end.
    """
    timer, config, read_given = training.StageTimer(start or time.perf_counter()), job.config, job.read_given
    if console is None and world.is_main:
        console = create_console(verbosity=job.verbosity, every_step=config.run.debug)
    if console is not None:
        console(begin_phase(f"connect {count_noun(world.num_ranks, 'rank')}"))
    engine = start_training_engine(config, world, preemption)
    with ExitStack() as stack:
        lifecycle = Attempt(config, engine, preemption, accept=job.accept, timer=timer, console=console, sinks=job.sinks)
        attempt = stack.enter_context(lifecycle)
        monitors = attempt.monitors
        attempt.claim()
        fetch_inputs(partial(list_requests, config, has_data=read_given is None), world, monitors.emit)

        def load() -> tuple[Estimate, setup.TrainingInputs]:
            check_compiler(config.engine.compile)
            files = read_model_files(config.model, config.data)
            shape, sizes = build_memory_setup(config, world, files.config)
            check_fits(shape, sizes, world)
            checked = attempt.has_checked_export
            found = setup.load_training_inputs(
                config, world, monitors.emit, timer, files, has_checked_export=checked, read_given=read_given
            )
            return estimate(shape, replace(sizes, num_classes=len(found.class_names))), found

        memory, inputs = collectives.raise_if_any_failed(collectives.catch(load))
        attempt.begin(inputs.fingerprints)
        tables = setup.place_inputs(config, inputs, engine)
        loader = setup.build_loader(config, inputs.classifier, tables["train"], world)
        features = setup.open_features(config, inputs, tables, engine, requested=attempt.requested_place())
        stack.callback(features.close)
        loader.owner_N = features.owner_N
        log_summary(config, engine, inputs, loader, features, memory=memory, attempt=attempt)
        setup.check_first_step(config, inputs.classifier, tables["train"], loader, engine, monitors.emit)
        reporter = Reporter(config, inputs, engine, features, read_given)
        trainer = setup.build_trainer(config, inputs, engine, loader, monitors)
        setup.build_features(features, loader, monitors)
        keeper = features if config.engine.feature_cache != "off" else None
        growing = GrowingFeatures(inputs.classifier, features.source("train"), keeper)
        trainer.use_features(growing, growing.extend)
        evaluate = setup.build_evaluation(inputs, tables, engine, features, monitors)
        checkpoints = attempt.open_checkpoints(trainer, inputs.fingerprints, features.choice.place)
        has_profile = job.profile and world.is_main
        with (
            closing(checkpoints),
            training.profile_steps(has_profile, attempt.directory, engine.device, trainer.num_steps, monitors.emit) as on_step,
        ):
            trainer.fit(lambda: evaluate("validation"), checkpoints, on_step)

        trainer.restore_best()
        scores = {"validation": trainer.best.scores}
        if "test" in tables:
            scores["test"] = evaluate("test")
            monitors.emit(scores["test"].to_event("test", trainer.best.epoch, inputs.class_names, step=trainer.best.step))
        done = write_results(config, engine, inputs, features, trainer, scores, attempt=attempt)
        reporter.finish(tables, features, attempt, done)
        return Trained(attempt.directory, select_scored(scores))
