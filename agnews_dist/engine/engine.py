"""The only door to accelerate: process group, device, precision, and the engine of what trains: DDP, FSDP2, DeepSpeed.

accelerate receives the model and the optimizer, never a data loader: its sharding of variable batches silently counts some
examples twice and drops others. Its own gradient accumulation, clipping and autocast stay off.
"""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
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
from agnews_dist.distributed.world import LAUNCHER_VARIABLES, World
from agnews_dist.engine import deepspeed as deepspeed_door
from agnews_dist.engine.deepspeed_config import ZeroOptions, deepspeed_dictionary
from agnews_dist.engine.device import DTYPES, choose_precision, chooses_cuda
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import UserError

FIRST_LOSS_SCALE = 2.0**16


class Engine:
    """What this rank runs on. Creating it creates the process group when there is more than one rank."""

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
        """`device`: auto | cpu | cuda; `precision`: auto | bf16 | fp32 | fp16.

        `zero`: through DeepSpeed; `fsdp`: through torch's FSDP2; else DDP.

        Raises:
            UserError: CUDA asked for but absent, more ranks than GPUs, a precision the device lacks, DeepSpeed asked for but
                absent, another program's accelerate settings, or a process group whose size is not the launcher's.
        """
        use_cuda = chooses_cuda(world, device)
        self.world, self.zero = world, zero
        # One rank has nobody to divide with.
        self._fsdp = fsdp and world.num_ranks > 1
        self.precision = choose_precision(precision, use_cuda=use_cuda)
        self._compress_gradients = compress_gradients
        refuse_foreign_settings(zero)
        has_group = world.num_ranks > 1 or zero is not None
        _clear_environment(world if has_group else None)
        if not use_cuda:
            # Where it is installed, accelerate and transformers import DeepSpeed, which looks for a GPU and says so.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        timeout = timedelta(seconds=timeout_seconds)
        # Gradients may live in the reducer's buckets: nobody keeps a view of them from step to step.
        self._ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        handlers: list[KwargsHandler] = [self._ddp]
        self._plugin = None
        if zero is not None:
            deepspeed_door.make_ready(world, device)
            # Filled in by `prepare`, when it is known what trains; without these accelerate has values of its own.
            told = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
            self._plugin = DeepSpeedPlugin(hf_ds_config=told | {"zero_optimization": {"stage": zero.stage}})
        backend = "nccl" if use_cuda else "gloo"
        if world.num_ranks > 1 and not collectives.is_distributed():
            # Before accelerate would: it then takes what is there.
            open_process_group(world, backend, timeout_seconds)
        if has_group:
            # Without a launcher accelerate takes a named backend for a sign that there is a process group.
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
        self._accelerator = Accelerator(
            # With `cpu` accelerate would drop DeepSpeed without a word.
            cpu=zero is None and not use_cuda,
            mixed_precision="no",
            gradient_accumulation_steps=1,
            deepspeed_plugin=self._plugin,
            kwargs_handlers=handlers,
        )
        if self._accelerator.num_processes != world.num_ranks:
            raise UserError(
                f"the process group has {self._accelerator.num_processes} ranks but WORLD_SIZE says {world.num_ranks}: each "
                "would train alone on a part of the data. Start the job with torchrun and unset ACCELERATE_* variables."
            )
        if zero is not None and self._accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise UserError(
                f"accelerate runs {self._accelerator.distributed_type} although engine.backend is deepspeed: what trains would "
                "not be divided, and no figure would show it. Unset ACCELERATE_* variables."
            )
        if zero is not None:
            # Otherwise transformers would divide whatever it loads or builds from now on, the export among it, and a child
            # process or a second engine would be told that it is DeepSpeed's.
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        # Not accelerate's "cpu:0": moving a weight there would copy it, and every rank would hold the mapped checkpoint itself.
        self.device: torch.device = self._accelerator.device if use_cuda else torch.device("cpu")
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
        """In which frozen weights are stored and computed."""
        return DTYPES[self.precision]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """In which the products of what trains are computed, if not in the fp32 its weights are stored in."""
        return None if self.precision == "fp32" else DTYPES[self.precision]

    @property
    def gathers_weights(self) -> bool:
        """Whether a forward pass of what trains is collective: then every rank must make the same number of them."""
        return self._fsdp or (self.zero is not None and self.zero.stage == 3 and self.world.num_ranks > 1)

    @property
    def divides_weights(self) -> bool:
        """Whether what trains is taken from the host's memory part by part, never whole onto the device."""
        return self._fsdp or (self.zero is not None and self.zero.stage == 3)

    def prepare(self, suffix: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> Strategy:
        """Hand over what trains, in fp32, and the optimizer of its parameters; gradients clip to `max_grad_norm` (0: not)."""
        num_parameters = sum(parameter.numel() for parameter in suffix.parameters())
        scale = FIRST_LOSS_SCALE if self.precision == "fp16" else None
        if self._fsdp:
            from agnews_dist.engine.fsdp import FSDPStrategy

            return FSDPStrategy(
                self.world,
                suffix,
                optimizer,
                self.device,
                max_grad_norm=max_grad_norm,
                compress_gradients=self._compress_gradients,
            )
        if self.zero is None:
            self._ddp.bucket_cap_mb = bucket_megabytes(4 * num_parameters)
            module = self._accelerator.prepare_model(suffix)
            if self._compress_gradients and isinstance(module, DistributedDataParallel):
                module.register_comm_hook(None, collectives.average_in_bf16)
            return Strategy(
                self.world, module, suffix, optimizer, self.device, max_grad_norm=max_grad_norm, first_loss_scale=scale
            )
        assert self._plugin is not None
        settings = self._plugin.deepspeed_config
        settings.clear()
        settings |= deepspeed_dictionary(
            self.zero,
            num_ranks=self.world.num_ranks,
            num_parameters=num_parameters,
            max_grad_norm=max_grad_norm,
            compress_gradients=self._compress_gradients,
            pin_memory=self.device.type == "cuda",
        )
        if self.zero.stage == 3:
            deepspeed_door.fetch_whole_blocks(suffix)
        module, _ = self._accelerator.prepare(suffix, optimizer)
        return deepspeed_door.DeepSpeedStrategy(
            self.world,
            module,
            suffix,
            optimizer,
            self.device,
            zero=self.zero,
            max_grad_norm=max_grad_norm,
            first_loss_scale=scale,
        )


def bucket_megabytes(num_bytes: int) -> int:
    """DDP's bucket for `num_bytes` of gradients: an eighth, so that sending overlaps with computing, within bounds."""
    return min(128, max(4, num_bytes // 8 // 2**20))


def refuse_foreign_settings(zero: ZeroOptions | None) -> None:
    """What `accelerate launch` was told about the engine must be what engine.backend says; the rest of it does not count.

    Raises:
        UserError: it was told to run another engine.
    """
    wanted = {
        "ACCELERATE_USE_DEEPSPEED": zero is not None,
        "ACCELERATE_USE_FSDP": False,
        "ACCELERATE_USE_MEGATRON_LM": False,
    }
    for name, is_ours in wanted.items():
        if os.environ.get(name, "false").lower() == "true" and not is_ours:
            raise UserError(
                f"{name}=true, but engine.backend names another engine: accelerate's own configuration would run one that you "
                "did not set. Choose the engine with --engine.backend, and use launch/accelerate.sh or a configuration "
                "of accelerate without one."
            )


def _clear_environment(world: World | None) -> None:
    """Leave accelerate nothing but its arguments and, where there is to be a process group, a launcher's variables.

    Over its arguments it obeys variables that compile, move to another device, divide gradients or choose an engine.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if world is None:
        return
    # DeepSpeed wants them even for one process, and accelerate divides the cores by the last, which not every launcher sets.
    given = (world.rank, world.num_ranks, world.local_rank, world.ranks_per_node)
    for name, value in zip(LAUNCHER_VARIABLES, given, strict=True):
        os.environ.setdefault(name, str(value))
