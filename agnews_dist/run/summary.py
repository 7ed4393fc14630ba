"""What a run says before its first step: what runs where, on what, in how many steps, and what it warns of."""

from collections.abc import Mapping
from pathlib import Path

from agnews_dist.config.schema import BatchConfig, Config, EngineConfig
from agnews_dist.data.batching.forecast import idle_warning
from agnews_dist.data.batching.loader import TrainLoader
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.memory import Estimate, summary
from agnews_dist.events import Emit, RunStarted, Warned
from agnews_dist.features.manager import FeatureCache
from agnews_dist.run.setup import TrainingInputs, plan_settings


def log_summary(
    config: Config,
    engine: Engine,
    sources: TrainingInputs,
    features: FeatureCache,
    memory: Estimate,
    parameters: Mapping[str, tuple[int, int]],
    loader: TrainLoader,
    *,
    num_steps: int,
    directory: Path,
    emit: Emit,
) -> None:
    """The first panel, and warnings of what would waste the machine. Collective, as the plan's efficiency is."""
    expected = loader.expected_efficiency()
    rows = ", ".join(f"{len(split):,} {name}" for name, split in sources.store.splits.items())
    facts = {
        "run": str(directory),
        "ranks": f"{engine.world.num_ranks} ({engine.world.ranks_per_node} per node)",
        "device": engine.description,
        "precision": engine.precision,
        "engine": engine_text(config.engine),
        "memory": summary(memory),
        "model": f"{config.model.name} ({config.model.init}), trainable blocks: {config.model.trainable_blocks}",
        "data": f"{config.data.source}: {rows}",
        "tokens": f"{'cached' if sources.store.was_cached else 'made now'}, at most {config.data.max_length} per text",
        "features": f"{features.choice.place}: {features.choice.why}",
        "batch": batch_text(config.batch),
        "plan": f"{num_steps:,} steps, {expected.critical_path:.1%} of what the ranks compute or wait for is real tokens",
        "optimizer": f"AdamW, lr {config.optim.lr:g} ({config.optim.schedule}), {config.optim.epochs} epochs",
        "seed": str(config.run.seed),
    }
    emit(RunStarted(facts=facts, parameters=parameters, num_steps=num_steps))
    warnings = [
        idle_warning(
            plan_settings(config.batch, config.run.seed),
            num_examples=len(sources.store.splits["train"]),
            num_ranks=engine.world.num_ranks,
            rank_balance=expected.rank_balance,
        ),
        sharing_warning(engine),
    ]
    for warning in filter(None, warnings):
        emit(Warned(message=warning))


def engine_text(engine: EngineConfig) -> str:
    """Who holds what of what trains.

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


def sharing_warning(engine: Engine) -> str | None:
    """Where DeepSpeed works but has nothing to gain."""
    if engine.zero is None or (engine.device.type == "cuda" and engine.world.num_ranks > 1):
        return None
    if engine.device.type != "cuda":
        where = "on a CPU: the ranks of a node share its memory, so what one of them saves another one takes"
    elif engine.zero.offload == "none":
        where = "on one rank: there is nobody to divide with"
    else:
        return None
    return f"engine.backend deepspeed {where}. It computes the same as ddp and saves nothing."


def batch_text(batch: BatchConfig) -> str:
    """What one optimiser step takes in."""
    if batch.global_token_budget is None:
        return f"{batch.global_batch_size:,} examples per step over all ranks"
    return f"at most {batch.global_token_budget:,} tokens per step over all ranks"
