"""The header of a run: where it runs, on what, in how many steps; and warnings about wasted hardware."""

from agnews_dist.config.schema import BatchConfig, Config, EngineConfig, OptimConfig
from agnews_dist.data.batching.forecast import warn_of_idle_ranks
from agnews_dist.data.batching.loader import TrainLoader
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.memory import Estimate, format_estimate
from agnews_dist.errors import count_noun
from agnews_dist.events import RunStarted, Warned, begin_phase
from agnews_dist.features.manager import FeatureCache
from agnews_dist.report.result_files import find_commit
from agnews_dist.run.attempt import Attempt
from agnews_dist.run.setup import TrainingInputs, plan_settings


def log_summary(
    config: Config,
    engine: Engine,
    inputs: TrainingInputs,
    loader: TrainLoader,
    features: FeatureCache,
    *,
    memory: Estimate,
    attempt: Attempt,
) -> None:
    """Emit the header and the warnings. Collective, since the plan's efficiency is a sum over ranks."""
    emit = attempt.monitors.emit
    emit(begin_phase("plan the batches"))
    expected = loader.expected_efficiency()
    # L-BFGS ends when it has converged.
    num_steps = loader.num_steps(config.optim.epochs, config.optim.max_steps) if config.optim.solver == "adamw" else 0
    rows = ", ".join(f"{len(split):,} {name}" for name, split in inputs.store.splits.items())
    trainable, frozen = map(sum, zip(*inputs.parameters.values(), strict=True))
    blocks = config.model.freeze_schedule or (config.model.trainable_blocks,)
    # The first ten are shown without --verbose: two columns of five.
    facts = {
        "run": str(attempt.directory),
        "model": f"{config.model.name} ({config.model.init}), trainable blocks: {', '.join(map(str, blocks))}",
        "trainable": f"{trainable:,} of {trainable + frozen:,} parameters ({trainable / (trainable + frozen):.1%})",
        "data": f"{config.data.source}: {rows}; {len(inputs.class_names):,} classes",
        "features": f"{features.choice.place}: {features.choice.reason}",
        "device": f"{engine.description}, {engine.precision}",
        "ranks": f"{engine.world.num_ranks} ({engine.world.ranks_per_node} per node), {engine_text(config.engine)}",
        "batch": batch_text(config.batch),
        "plan": f"{count_noun(num_steps, 'step')}, {expected.critical_path:.1%} of the ranks' time goes to real tokens"
        if num_steps
        else "all training rows in every iteration",
        "optimizer": optimizer_text(config.optim),
        "memory": format_estimate(memory),
        **inputs.data_facts,
        "tokens": f"{'cached' if inputs.store.was_cached else 'made now'}, at most {config.data.max_length} per text",
        "loss": loss_text(config.optim, loader),
        "seed": str(config.run.seed),
        "commit": find_commit() if engine.world.is_main else "",
    }
    emit(RunStarted(facts=facts, parameters=inputs.parameters, num_steps=num_steps))
    warnings = [
        warn_of_idle_ranks(
            plan_settings(config.batch, config.run.seed),
            num_examples=len(inputs.store.splits["train"]),
            num_ranks=engine.world.num_ranks,
            rank_balance=expected.rank_balance,
        ),
        deepspeed_warning(engine),
    ]
    for warning in filter(None, warnings):
        emit(Warned(message=warning))


def engine_text(engine: EngineConfig) -> str:
    """Describe the engine and how it shards the trainable part.

    >>> engine_text(EngineConfig(backend="deepspeed", zero_stage=3, offload="optimizer"))
    'DeepSpeed ZeRO-3, offload: optimizer'
    """
    parts = [{"ddp": "DDP", "fsdp": "FSDP2"}.get(engine.backend, f"DeepSpeed ZeRO-{engine.zero_stage}")]
    if engine.offload != "none":
        parts.append(f"offload: {engine.offload}")
    if engine.gradient_compression != "none":
        parts.append(f"gradients sent in {engine.gradient_compression}")
    if engine.activation_checkpointing:
        parts.append("activation checkpointing")
    return ", ".join(parts)


def optimizer_text(optim: OptimConfig) -> str:
    """Describe the optimizer, and what ends the training.

    >>> optimizer_text(OptimConfig(max_steps=2000, patience=3))
    'AdamW, lr 0.001 (linear), 2,000 steps, or 3 evaluations without a better accuracy'
    >>> optimizer_text(OptimConfig(layer_decay=0.7, average="swa"))
    'AdamW, lr 0.001 (linear, x 0.7 per layer), 3 epochs, swa of the last 50% of the steps'
    """
    if optim.solver == "lbfgs":
        return f"L-BFGS on out_head alone, to convergence, L2 {optim.weight_decay:g}"
    length = count_noun(optim.epochs, "epoch") if optim.max_steps is None else count_noun(optim.max_steps, "step")
    early = f", or {count_noun(optim.patience, 'evaluation')} without a better {optim.best_metric}" if optim.patience else ""
    rates = "" if optim.layer_decay == 1 else f", x {optim.layer_decay:g} per layer"
    averaged = "" if optim.average == "none" else f", {optim.average} of the last {1 - optim.average_start:.0%} of the steps"
    return f"AdamW, lr {optim.lr:g} ({optim.schedule}{rates}), {length}{early}{averaged}"


def loss_text(optim: OptimConfig, loader: TrainLoader) -> str:
    """Describe the loss of the training."""
    parts, weights_C = ["cross-entropy"], loader.class_weights_C
    if optim.r_drop:
        parts.append(f"R-Drop {optim.r_drop:g}")
    if optim.label_smoothing:
        parts.append(f"label smoothing {optim.label_smoothing:g}")
    if weights_C is not None:
        kind = "balanced" if optim.class_weights == "balanced" else "given"
        parts.append(f"{kind} class weights {weights_C.min():.3g} to {weights_C.max():.3g}")
    return ", ".join(parts)


def deepspeed_warning(engine: Engine) -> str | None:
    """Return a warning where DeepSpeed saves no memory; None elsewhere."""
    if engine.zero is None or (engine.device.type == "cuda" and engine.world.num_ranks > 1):
        return None
    if engine.device.type != "cuda":
        where = "on a CPU: the ranks of a node share its memory"
    elif engine.zero.offload == "none":
        where = "on one rank: there is nothing to shard"
    else:
        return None
    return f"engine.backend deepspeed {where}. It saves no memory here and computes the same as ddp; use ddp."


def batch_text(batch: BatchConfig) -> str:
    """Describe the global batch."""
    if batch.global_token_budget is None:
        return f"{batch.global_batch_size:,} examples per step over all ranks"
    return f"at most {batch.global_token_budget:,} tokens per step over all ranks"
