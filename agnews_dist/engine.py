"""The only door to accelerate: process group, device, precision, DDP and where the gradients meet.

accelerate receives the model and the optimizer, never a data loader: its sharding of variable batches silently counts some
examples twice and drops others. Its own gradient accumulation stays at 1; `accumulating` sets the boundary.
"""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn

from agnews_dist.errors import UserError
from agnews_dist.world import World


class Engine:
    """What this rank runs on. Creating it creates the process group when there is more than one rank."""

    def __init__(self, world: World, *, device: str, precision: str, allow_tf32: bool, timeout_seconds: int) -> None:
        """`device`: auto | cpu | cuda; `precision`: auto | bf16 | fp32.

        Raises:
            UserError: CUDA asked for but absent, more ranks than GPUs, bf16 the GPU lacks, or a process group whose size is
                not the launcher's.
        """
        self.world = world
        use_cuda = chooses_cuda(world, device)
        has_bf16 = use_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = ("bf16" if has_bf16 else "fp32") if precision == "auto" else precision
        if use_cuda and self.precision == "bf16" and not has_bf16:
            raise UserError(
                f"engine.precision bf16, but {torch.cuda.get_device_name()} has no bf16: every product would be emulated. "
                "Set --engine.precision fp32."
            )
        # Gradients may live in the reducer's buckets: nobody keeps a view of them from step to step.
        handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        if world.num_ranks > 1:
            # Without a launcher accelerate takes a named backend for a sign that there is a process group.
            timeout = timedelta(seconds=timeout_seconds)
            handlers.append(InitProcessGroupKwargs(backend="nccl" if use_cuda else "gloo", timeout=timeout))
        self._accelerator = Accelerator(
            cpu=not use_cuda,
            mixed_precision="bf16" if self.precision == "bf16" else "no",
            gradient_accumulation_steps=1,
            kwargs_handlers=handlers,
        )
        if self._accelerator.num_processes != world.num_ranks:
            raise UserError(
                f"the process group has {self._accelerator.num_processes} ranks but WORLD_SIZE says {world.num_ranks}: each "
                "would train alone on a part of the data. Start the job with torchrun and unset ACCELERATE_* variables."
            )
        self.device: torch.device = self._accelerator.device
        if use_cuda:
            torch.backends.cuda.matmul.allow_tf32 = allow_tf32
            torch.backends.cudnn.allow_tf32 = allow_tf32

    @property
    def description(self) -> str:
        """The device for the header: name of the GPU, or threads of the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} thread(s) per rank"

    @property
    def frozen_dtype(self) -> torch.dtype:
        """How frozen weights are stored."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def prepare(self, suffix: nn.Module) -> nn.Module:
        """Wrap what trains: on the device, under autocast, gradients averaged over the ranks (DDP) when there are several."""
        wrapped = self._accelerator.prepare_model(suffix)
        assert isinstance(wrapped, nn.Module)
        return wrapped

    def accumulating(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of one micro-batch: only the last one of a step synchronises gradients."""
        return nullcontext() if is_last else self._accelerator.no_sync(wrapped)

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for code outside the wrapped module: the prefix and scoring."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of an already normalised loss.

        Not accelerate's `backward`: it divides by ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which wins over the argument 1.
        """
        loss.backward()


def chooses_cuda(world: World, device: str) -> bool:
    """Whether this rank runs on a GPU; the stories ask before they load anything.

    Raises:
        UserError: CUDA asked for but absent, or more ranks than GPUs on this node.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            f"engine.device cuda, but torch {torch.__version__} sees no CUDA device: the job would run on the CPU, many times "
            "slower. Use --engine.device auto, or install a CUDA build of torch and check nvidia-smi."
        )
    if device == "cpu" or not available:
        return False
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{world.label} is number {world.local_rank} on this node, which shows {torch.cuda.device_count()} GPU(s): NCCL "
            "refuses two ranks on one GPU. Lower --nproc_per_node, or use --engine.device cpu."
        )
    return True
