"""The main story: text in, a classifier that Hugging Face loads out. `torchrun --nproc_per_node=8 -m agnews_dist.train`.

prepare   claim the run's directory, load model and tokenizer, open or build the token cache (no collective yet)
meet      the process group; whatever failed on any rank so far is raised on all
train     epochs of global batches; after each, the validation split is scored and the best suffix kept
finish    restore the best epoch, score the test split once, export, write result.json
"""

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from agnews_dist import cli
from agnews_dist.story import tell
from agnews_dist.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code (0, 1 for a failed run, 2 for wrong settings)."""
    return tell("train", argv, run)


def run(world: World, loaded: cli.Loaded) -> None:
    """Train, evaluate and export one classifier."""
    start = time.perf_counter()
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    import torch

    from agnews_dist import collectives, debug
    from agnews_dist.clock import Clock, TimedFeatures
    from agnews_dist.data.loader import TokenTable, TrainLoader
    from agnews_dist.data.sharing import quadratic_weight
    from agnews_dist.events import StepDone
    from agnews_dist.fitting import check_fits
    from agnews_dist.memory import Estimate
    from agnews_dist.model.gpt2 import parameter_table
    from agnews_dist.opening import announce
    from agnews_dist.optim import build_optimizer, learning_rate, set_lr
    from agnews_dist.outcome import BestEpoch, RunningTotals, fingerprints, finish
    from agnews_dist.profiling import profiling
    from agnews_dist.rehearsal import rehearse
    from agnews_dist.report.console import Console
    from agnews_dist.report.runlog import RunLog
    from agnews_dist.report.sinks import Sinks
    from agnews_dist.rundir import Claim, run_name
    from agnews_dist.scoring import ScoredSplit, score_split
    from agnews_dist.sources import (
        Sources,
        check_engine,
        load_sources,
        open_features,
        place,
        plan_settings,
        start_engine,
    )
    from agnews_dist.step import train_step

    config = loaded.config
    check_engine(config, world)
    clock = Clock(start)
    name = run_name(config.run.name, config.model.name, datetime.now())
    claim = Claim(Path(config.run.dir), name, overwrite=config.run.overwrite, config_yaml=cli.dump(config))
    directory = claim.directory
    if config.run.debug:
        debug.be_deterministic()

    with claim, Sinks() as emit:

        def prepare() -> tuple[Estimate, Sources]:
            if world.is_main:
                emit.add(Console(every_step=config.run.debug))
                claim.take()
                emit.add(RunLog(claim.staging / "events.jsonl"))
            memory = check_fits(config, world)
            return memory, load_sources(
                config.data, config.model, seed=config.run.seed, emit=emit, clock=clock, world=world
            )

        outcome = collectives.attempt(prepare)
        engine = start_engine(config.engine, world)
        memory, sources = collectives.agree(outcome)
        prints = fingerprints(config, sources)
        collectives.check_equal(prints)
        claim.keep()
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
        settings = plan_settings(config.batch, config.run.seed)
        loader = TrainLoader(
            tables["train"],
            world,
            settings,
            max_tokens_per_rank=config.batch.max_tokens_per_rank,
            quadratic=quadratic_weight(classifier.config.n_embd),
            max_length=config.data.max_length,
        )
        features = open_features(config, sources, tables, engine, prints["frozen_weights"])
        loader.owner_N = features.owner_N
        num_steps, parameters = loader.num_steps(config.optim.epochs), parameter_table(classifier)
        announce(
            config,
            engine,
            sources,
            features,
            memory,
            parameters,
            loader,
            num_steps=num_steps,
            directory=directory,
            emit=emit,
        )
        if config.run.debug:
            emit(debug.overfit_one_batch(classifier, tables["train"], engine, lr=config.optim.lr))
        if config.batch.longest_first:
            rehearse(classifier, loader.largest_step(0), engine, emit)
        # Every rank draws its own dropout masks; the shared draws (weights, plan) have generators of their own.
        torch.manual_seed(config.run.seed * world.num_ranks + world.rank)
        optimizer = build_optimizer(classifier.suffix, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
        wrapped = engine.prepare(classifier.suffix, optimizer, max_grad_norm=config.optim.max_grad_norm)

        clock.end_of_setup()
        with clock.stage("prefix"):
            features.build(emit)
        built_seconds, loader.owner_N = clock.seconds["prefix"], features.owner_N
        embed = TimedFeatures(features.source("train"))

        def score(name: str) -> ScoredSplit:
            with clock.stage("eval"):
                return score_split(
                    classifier, tables[name], engine, num_classes=num_classes, features=features.source(name)
                )

        best, totals, step = BestEpoch(wrapped), RunningTotals(built_seconds), 0
        with profiling(
            config.run.profile and world.is_main, directory, device=engine.device, num_steps=num_steps, emit=emit
        ) as profiler:
            for epoch in range(config.optim.epochs):
                classifier.suffix.train()
                for batches in loader.steps(epoch):
                    begin = time.perf_counter()
                    lr = learning_rate(
                        step,
                        num_steps=num_steps,
                        peak=config.optim.lr,
                        warmup_ratio=config.optim.warmup_ratio,
                        schedule=config.optim.schedule,
                    )
                    set_lr(optimizer, lr)
                    result = train_step(engine, embed, wrapped, batches)
                    step += 1
                    seconds = time.perf_counter() - begin
                    totals.add(batches.share, seconds)
                    emit(
                        StepDone(
                            step=step,
                            epoch=epoch + 1,
                            loss=result.loss,
                            lr=lr,
                            grad_norm=result.grad_norm,
                            num_examples=batches.num_examples,
                            num_tokens=batches.share.num_real_tokens,
                            seconds=seconds,
                        )
                    )
                    profiler.step()
                validation = score("validation")
                emit(validation.event("validation", epoch + 1, sources.store.class_names))
                best.offer(epoch + 1, validation)
                clock.seconds["train"], clock.seconds["prefix"] = totals.seconds, built_seconds + embed.seconds()

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
            directory=directory,
            best=best,
            parameters=parameters,
            num_steps=step,
            totals=totals,
            prints=prints,
            clock=clock,
            emit=emit,
        )


if __name__ == "__main__":
    sys.exit(main())
