"""The engine of a run, from the configuration: checks, process group, time limits, placement of the model."""

import os
import time

import psutil

from agnews_dist.config.schema import Config, EngineConfig
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.rendezvous import end_if_stuck
from agnews_dist.distributed.slurm import slurm_seconds_left
from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed import require_deepspeed
from agnews_dist.engine.deepspeed_config import ZeroOptions, build_deepspeed_config, read_deepspeed_file
from agnews_dist.engine.device import choose_precision, should_use_cuda
from agnews_dist.engine.engine import Engine, check_accelerate_environment
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.training.diagnostics import make_deterministic

SLURM_MARGIN_SECONDS = 60.0
"""Time kept free before the end of a Slurm job. Slurm itself may act that much earlier."""


def zero_options(engine: EngineConfig) -> ZeroOptions | None:
    """Return DeepSpeed's options, the user's own JSON included; None for another engine."""
    if engine.backend != "deepspeed":
        return None
    own = read_deepspeed_file(engine.deepspeed_config) if engine.deepspeed_config is not None else {}
    return ZeroOptions(stage=engine.zero_stage, offload=engine.offload, settings=own)


def check_engine(config: Config, world: World) -> None:
    """Check everything about the engine that can be known before anything is loaded.

    Raises:
        UserError: no such device or precision, DeepSpeed not installed, or contradicting DeepSpeed settings.
    """
    engine = config.engine
    choose_precision(engine.precision, use_cuda=should_use_cuda(world, engine.device))
    zero = zero_options(engine)
    check_accelerate_environment(zero)
    if zero is not None:
        require_deepspeed()
        build_deepspeed_config(
            zero,
            num_ranks=world.num_ranks,
            num_parameters=1,
            max_grad_norm=config.optim.max_grad_norm,
            compress_gradients=engine.gradient_compression == "bf16",
            pin_memory=False,
        )


def start_engine(engine: EngineConfig, world: World, *, is_training: bool = True) -> Engine:
    """Choose device and precision and open the process group. Without training, DeepSpeed and FSDP have nothing to shard."""
    return Engine(
        world,
        device=engine.device,
        precision=engine.precision,
        allow_tf32=engine.allow_tf32,
        timeout_seconds=engine.timeout_seconds,
        zero=zero_options(engine) if is_training else None,
        fsdp=is_training and engine.backend == "fsdp",
        compress_gradients=engine.gradient_compression == "bf16",
    )


def start_training_engine(config: Config, world: World, preemption: PreemptionHandler) -> Engine:
    """Check and start the engine of a training, and connect every rank's `preemption` with the others. Collective."""
    check_engine(config, world)
    set_deadline(preemption, config.run.max_minutes)
    if config.run.debug:
        make_deterministic()
    timeout = config.engine.timeout_seconds
    with end_if_stuck(world, timeout):
        engine = start_engine(config.engine, world)
        if world.num_ranks > 1:
            preemption.connect(collectives.connect_store(timeout), world.rank, world.num_ranks, timeout)
    return engine


def set_deadline(preemption: PreemptionHandler, max_minutes: float | None) -> None:
    """Make the run stop, with a checkpoint, before its own time limit and before its job's."""
    limits: list[tuple[float, str]] = []
    if max_minutes is not None:
        margin = min(30.0, 6 * max_minutes)
        begin_time = preemption.begin_time
        age = time.time() - (psutil.Process().create_time() if begin_time is None else begin_time)
        limits.append((60 * max_minutes - margin - age, f"run.max_minutes {max_minutes:g}"))
    seconds_left = slurm_seconds_left(os.environ, time.time())
    if seconds_left is not None:
        limits.append((seconds_left - SLURM_MARGIN_SECONDS, "the time limit of the Slurm job"))
    if limits:
        preemption.set_deadline(*min(limits))


def place_classifier(classifier: Classifier, engine: Engine, *, fast_path: bool, checkpointing: bool = False) -> None:
    """Move the frozen part to the device in its own dtype, and the trainable part in fp32."""
    classifier.use_fast_path(fast_path)
    classifier.prefix.to(engine.device, engine.frozen_dtype)
    classifier.suffix.autocast_dtype = engine.autocast_dtype
    classifier.suffix.checkpointing = checkpointing
    if not engine.has_sharded_weights:
        classifier.suffix.to(engine.device)
