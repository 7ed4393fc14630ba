"""Process group, device, precision and the strategy of the trainable part. The only module that imports accelerate.

accelerate receives the model and the optimizer, never a data loader: it would repeat or drop examples of batches that vary in
size. Its gradient accumulation, clipping and autocast stay off.
"""

import copy
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from agnews_dist.distributed import collectives
from agnews_dist.distributed.rendezvous import open_process_group
from agnews_dist.distributed.world import LAUNCHER_VARIABLES, World, announced
from agnews_dist.engine.deepspeed import DeepSpeedStrategy, mark_leaf_blocks, prepare_deepspeed
from agnews_dist.engine.deepspeed_config import ZeroOptions, build_deepspeed_config
from agnews_dist.engine.device import DTYPES, choose_precision, should_use_cuda
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import UserError

INITIAL_LOSS_SCALE = 2.0**16


class Engine:
    """Device, precision and process group of this rank. Creating it opens the process group if there are several ranks."""

    def __init__(
        self,
        world: World,
        *,
        device: str,
        precision: str,
        allow_tf32: bool,
        timeout_seconds: int,
        zero: ZeroOptions | None = None,
        fsdp: bool = False,
        compress_gradients: bool = False,
    ) -> None:
        """`device`: auto | cpu | cuda; `precision`: auto | bf16 | fp32 | fp16; `zero`: use DeepSpeed; `fsdp`: use FSDP2.

        Raises:
            UserError: CUDA or DeepSpeed is missing, a node has more ranks than GPUs, the device lacks the precision, accelerate
                is configured for another engine, or the size of the process group differs from WORLD_SIZE.
        """
        use_cuda = should_use_cuda(world, device)
        self.world, self.zero, self._is_alone = world, zero, False
        # With one rank there is nothing to shard.
        self._fsdp = fsdp and world.num_ranks > 1
        self.precision = choose_precision(precision, use_cuda=use_cuda)
        self._compress_gradients = compress_gradients
        check_accelerate_environment(zero)
        has_group = world.num_ranks > 1 or zero is not None
        _clear_environment(world if has_group else None)
        if not use_cuda:
            # accelerate and transformers import an installed DeepSpeed, which prints a message when it finds no GPU.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Safe: no view of a gradient is kept from step to step.
        self._ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        handlers: list[KwargsHandler] = [self._ddp]
        self._plugin = None
        if zero is not None:
            prepare_deepspeed(world, device)
            # `prepare` replaces these. Without them accelerate would set its own.
            values = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
            self._plugin = DeepSpeedPlugin(hf_ds_config=values | {"zero_optimization": {"stage": zero.stage}})
        backend = "nccl" if use_cuda else "gloo"
        if world.num_ranks > 1 and not collectives.is_distributed():
            # accelerate then uses this process group instead of opening its own.
            open_process_group(world, backend, timeout_seconds)
        if has_group:
            # Only with a process group: without a launcher accelerate takes a named backend as a sign that there is one.
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_seconds)))
        # A GPU in a bad state can take minutes to answer.
        with announced(world, lambda: "for the device without a limit: see the output of nvidia-smi"):
            self._accelerator = Accelerator(
                # With `cpu=True` accelerate silently ignores DeepSpeed.
                cpu=zero is None and not use_cuda,
                mixed_precision="no",
                gradient_accumulation_steps=1,
                deepspeed_plugin=self._plugin,
                kwargs_handlers=handlers,
            )
        if self._accelerator.num_processes != world.num_ranks:
            raise UserError(
                f"WORLD_SIZE {world.num_ranks}, but the process group has {self._accelerator.num_processes} rank(s): "
                "ranks would train separate models. Start the job with torchrun and unset ACCELERATE_* variables."
            )
        if zero is not None:
            if self._accelerator.distributed_type != DistributedType.DEEPSPEED:
                raise UserError(
                    f"engine.backend deepspeed, but accelerate runs {self._accelerator.distributed_type}: nothing would be "
                    "sharded. Unset ACCELERATE_* variables."
                )
            # Otherwise transformers would shard every model it loads or builds later, such as the export, and child processes
            # would start DeepSpeed too.
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        # Not accelerate's "cpu:0": moving memory-mapped weights there would copy them on every rank.
        self.device: torch.device = self._accelerator.device if use_cuda else torch.device("cpu")
        self._allow_tf32 = allow_tf32
        self.apply_tf32()

    def without_others(self) -> "Engine":
        """Return an engine of one rank, on this rank's device, for work inside `collectives.without_others`.

        It trains as a process without a launcher does.
        """
        alone = copy.copy(self)
        alone.world, alone.zero, alone._fsdp, alone._is_alone = World(), None, False, True
        return alone

    def set_random_state(self, seed: int) -> None:
        """Set torch's random state on this device. `torch.manual_seed` visits every kind of device, which takes 1 to 2 ms."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def apply_tf32(self) -> None:
        """Set whether fp32 matrix products of this process may use TF32."""
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self._allow_tf32
            torch.backends.cudnn.allow_tf32 = self._allow_tf32

    @property
    def description(self) -> str:
        """Name of the GPU, or number of CPU threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} thread(s) per rank"

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Type in which frozen weights are stored and computed."""
        return DTYPES[self.precision]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type of the trainable part's matrix products; None: fp32, the type of its weights."""
        return None if self.precision == "fp32" else DTYPES[self.precision]

    @property
    def is_forward_collective(self) -> bool:
        """True if a forward pass is collective: every rank must then run the same number of them."""
        return self.has_sharded_weights and self.world.num_ranks > 1

    @property
    def has_sharded_weights(self) -> bool:
        """True if `prepare` moves the trainable part to the device shard by shard, never as a whole."""
        return self._fsdp or (self.zero is not None and self.zero.stage == 3)

    def prepare(self, suffix: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> Strategy:
        """Wrap the fp32 trainable part and its optimizer. Gradients are clipped to `max_grad_norm`; 0: not at all."""
        world, zero, num_parameters = self.world, self.zero, sum(parameter.numel() for parameter in suffix.parameters())
        scale = INITIAL_LOSS_SCALE if self.precision == "fp16" else None
        if self._fsdp:
            from agnews_dist.engine.fsdp import FSDPStrategy

            return FSDPStrategy(
                world, suffix, optimizer, self.device, max_grad_norm=max_grad_norm, compress_gradients=self._compress_gradients
            )
        if zero is None:
            module = self._wrap(suffix)
            return Strategy(
                world, module, suffix, optimizer, self.device, max_grad_norm=max_grad_norm, initial_loss_scale=scale
            )
        assert self._plugin is not None
        settings = self._plugin.deepspeed_config
        settings.clear()
        settings |= build_deepspeed_config(
            zero,
            num_ranks=world.num_ranks,
            num_parameters=num_parameters,
            max_grad_norm=max_grad_norm,
            compress_gradients=self._compress_gradients,
            pin_memory=self.device.type == "cuda",
        )
        if zero.stage == 3:
            mark_leaf_blocks(suffix)
        module, _ = self._accelerator.prepare(suffix, optimizer)
        return DeepSpeedStrategy(
            world, module, suffix, optimizer, self.device, zero=zero, max_grad_norm=max_grad_norm, initial_loss_scale=scale
        )

    def freeze(self, strategy: Strategy, weights: Iterable[nn.Parameter]) -> None:
        """Take weights out of the training of an unsharded strategy. Collective."""
        # It keeps what it has wrapped, and a wrapper has buckets for all gradients.
        self._accelerator.free_memory()
        strategy.freeze(weights, self._wrap)

    def _wrap(self, suffix: nn.Module) -> nn.Module:
        """Wrap the trainable part in DDP if there are several ranks."""
        # Of one rank's work alone, accelerate's process group knows nothing.
        if self._is_alone:
            return suffix
        num_trained = sum(parameter.numel() for parameter in suffix.parameters() if parameter.requires_grad)
        self._ddp.bucket_cap_mb = choose_bucket_megabytes(4 * num_trained)
        module = cast(nn.Module, self._accelerator.prepare_model(suffix))
        if self._compress_gradients and isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, collectives.average_in_bf16)
        return module


@contextmanager
def isolate_accelerate() -> Generator[None]:
    """Hide the state that accelerate keeps per process inside the block, and restore it at the end."""
    shared = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]  # pyright: ignore[reportPrivateUsage]
    saved = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, before in zip(shared, saved, strict=True):
            state.clear()
            state.update(before)


def choose_bucket_megabytes(num_bytes: int) -> int:
    """Return DDP's bucket size: an eighth of the gradients, so that communication overlaps with the backward pass."""
    return min(128, max(4, num_bytes // 8 // 2**20))


def check_accelerate_environment(zero: ZeroOptions | None) -> None:
    """Raise UserError if a variable of `accelerate launch` names another engine than engine.backend."""
    allowed = {"ACCELERATE_USE_DEEPSPEED": zero is not None, "ACCELERATE_USE_FSDP": False, "ACCELERATE_USE_MEGATRON_LM": False}
    for name, is_allowed in allowed.items():
        if os.environ.get(name, "false").lower() == "true" and not is_allowed:
            raise UserError(
                f"{name}=true: engine.backend names another engine. "
                "Set --engine.backend, and start the job with launch/accelerate.sh."
            )


def _clear_environment(world: World | None) -> None:
    """Remove accelerate's variables, which override its arguments; for a process group of `world` set a launcher's."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if world is None:
        return
    # DeepSpeed needs them even for one process. accelerate divides the cores by the last one, which some launchers omit.
    values = (world.rank, world.num_ranks, world.local_rank, world.ranks_per_node)
    for name, value in zip(LAUNCHER_VARIABLES, values, strict=True):
        os.environ.setdefault(name, str(value))
