"""The main story: text in, a classifier that Hugging Face loads out. `torchrun --nproc_per_node=8 -m agnews_dist.train`.

meet      the process group; from here on a signal to any rank is known to all
prepare   claim the run's directory, find what it goes on from, load model and tokenizer, open or build the token cache;
          whatever failed on any rank is raised on all
train     epochs of global batches; after each, the validation split is scored and the best suffix kept; checkpoints
finish    restore the best epoch, score the test split once, export, write result.json
"""

import os
import time
from collections.abc import Sequence
from functools import partial

from agnews_dist.commands.command import TRAINING_OPTIONS, run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code (0, 1 for a failed run, 2 for wrong settings, see preempt.py for a stopped one)."""
    preemption = PreemptionHandler(os.environ)
    return run_command("train", argv, partial(run, preemption=preemption), TRAINING_OPTIONS, preemption=preemption)


def run(world: World, loaded: cli.Loaded, *, preemption: PreemptionHandler) -> None:
    """Train, evaluate and export one classifier.

    Raises:
        Stopped: it was to stop before its end.
    """
    start = time.perf_counter()
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    from agnews_dist.data.batching.loader import TokenTable, TrainLoader
    from agnews_dist.data.batching.shares import quadratic_weight
    from agnews_dist.data.corpus import check_source
    from agnews_dist.distributed import collectives
    from agnews_dist.engine.memory import Estimate
    from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
    from agnews_dist.model.gpt2 import parameter_table
    from agnews_dist.preflight.memory_check import check_fits
    from agnews_dist.report.console import Console, Sinks
    from agnews_dist.run.attempt import Attempt, set_deadline
    from agnews_dist.run.fingerprints import fingerprints
    from agnews_dist.run.memory_setup import read_memory_setup
    from agnews_dist.run.results import finish
    from agnews_dist.run.setup import (
        TrainingInputs,
        check_engine,
        load_sources,
        open_features,
        place,
        plan_settings,
        start_engine,
    )
    from agnews_dist.run.summary import log_summary
    from agnews_dist.training import diagnostics as debug
    from agnews_dist.training.diagnostics import profiling, rehearse
    from agnews_dist.training.loop import Trainer
    from agnews_dist.training.optim import build_optimizer
    from agnews_dist.training.timing import StageTimer, TimedFeatures

    config = loaded.config
    check_engine(config, world)
    set_deadline(preemption, config.run.max_minutes)
    timer = StageTimer(start)
    if config.run.debug:
        debug.be_deterministic()
    engine = start_engine(config.engine, world)
    if world.num_ranks > 1:
        timeout = config.engine.timeout_seconds
        preemption.meet(collectives.side_channel(timeout), world.rank, world.num_ranks, timeout)

    with Sinks() as emit, Attempt(config, engine, preemption, emit, accept=loaded.options["accept"]) as attempt:
        if world.is_main:
            emit.add(Console(every_step=config.run.debug))
        # Alone, and first: of a run that is refused no rank shall tokenise anything.
        collectives.raise_if_any_failed(collectives.catch(attempt.claim))

        def prepare() -> tuple[Estimate, TrainingInputs]:
            check_source(config.data.source)
            memory = check_fits(*read_memory_setup(config, world), world)
            return (
                memory,
                load_sources(
                    config.data,
                    config.model,
                    seed=config.run.seed,
                    emit=emit,
                    timer=timer,
                    world=world,
                ),
            )

        memory, sources = collectives.raise_if_any_failed(collectives.catch(prepare))
        prints = fingerprints(config, sources)
        collectives.check_equal(prints)
        attempt.begin(prints)
        classifier, num_classes = sources.classifier, len(sources.store.class_names)
        place(
            classifier,
            engine,
            fast_path=config.engine.fast_path,
            checkpointing=config.engine.activation_checkpointing,
        )
        if not world.is_main:
            # Only rank 0 exports; on a GPU node the other ranks would each keep a second copy of the model in host memory.
            classifier.frozen_state.clear()
        tables = {
            name: TokenTable(split, pad_id=sources.pad_id, device=engine.device)
            for name, split in sources.store.splits.items()
        }
        loader = TrainLoader(
            tables["train"],
            world,
            plan_settings(config.batch, config.run.seed),
            max_tokens_per_rank=config.batch.max_tokens_per_rank,
            quadratic=quadratic_weight(classifier.config.n_embd),
            max_length=config.data.max_length,
        )
        features = open_features(
            config,
            sources,
            tables,
            engine,
            frozen_weights=prints["frozen_weights"],
            wanted=attempt.features_wanted(),
        )
        loader.owner_N = features.owner_N
        num_steps, parameters = loader.num_steps(config.optim.epochs), parameter_table(classifier)
        log_summary(
            config,
            engine,
            sources,
            features,
            memory,
            parameters,
            loader,
            num_steps=num_steps,
            directory=attempt.directory,
            emit=emit,
        )
        if config.run.debug:
            emit(debug.overfit_one_batch(classifier, tables["train"], engine, lr=config.optim.lr))
        if config.batch.longest_first:
            rehearse(classifier, loader.largest_step(0), engine, emit)
        optimizer = build_optimizer(classifier.suffix, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
        strategy = engine.prepare(classifier.suffix, optimizer, max_grad_norm=config.optim.max_grad_norm)

        timer.end_of_setup()
        with timer.stage("prefix"):
            features.build(emit)
        built_seconds, loader.owner_N = timer.seconds["prefix"], features.owner_N
        embed = TimedFeatures(features.source("train"))

        def score(name: str) -> SplitScores:
            with timer.stage("eval"):
                return evaluate_split(
                    classifier,
                    tables[name],
                    engine,
                    num_classes=num_classes,
                    features=features.source(name),
                    is_stopping=lambda: preemption.is_stopping,
                )

        training = Trainer(
            config,
            engine,
            classifier,
            strategy,
            optimizer,
            loader,
            embed,
            about=attempt.about(prints, features.choice.place, sources.store.class_names),
            built_seconds=built_seconds,
            num_steps=num_steps,
            timer=timer,
            preemption=preemption,
            emit=emit,
        )
        saver = attempt.saver(training, strategy)
        # From here on a stop is worth a checkpoint, and the loop makes it.
        preemption.saves_from_now()
        with (
            saver,
            profiling(
                loaded.options["profile"] and world.is_main,
                attempt.directory,
                device=engine.device,
                num_steps=num_steps,
                emit=emit,
            ) as profiler,
        ):
            training.run(score, saver, profiler.step)

        best = training.best
        best.restore()
        scored = {"validation": best.scored}
        if "test" in tables:
            scored["test"] = score("test")
            emit(scored["test"].event("test", best.epoch, sources.store.class_names))
        finish(
            config,
            engine,
            sources,
            features,
            scored,
            directory=attempt.directory,
            best=best,
            parameters=parameters,
            num_steps=training.step,
            totals=training.totals,
            prints=prints,
            timer=timer,
            emit=emit,
        )
        attempt.finish(training.step)
