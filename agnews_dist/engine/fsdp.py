"""FSDP2: weights, gradients and moments sharded over the ranks as under ZeRO-3. The only module that imports torch's FSDP."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from agnews_dist.distributed.world import World
from agnews_dist.engine.strategy import Strategy


class FSDPStrategy(Strategy):
    """The trainable part under FSDP2. Every weight is sharded, and gathered while its block computes."""

    def __init__(
        self,
        world: World,
        suffix: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        max_grad_norm: float,
        compress_gradients: bool,
    ) -> None:
        """`optimizer`: made for the whole weights, gets the shards instead; `compress_gradients`: reduce them in bf16."""
        mesh = init_device_mesh(device.type, (world.num_ranks,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compress_gradients else None)
        whole = list(suffix.parameters())
        for module in (*suffix.get_submodule("h").children(), suffix):
            # True for the outermost module too: scoring has no backward pass that would reshard its weights.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        parts = {id(old): new for old, new in zip(whole, suffix.parameters(), strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [parts[id(weight)] for weight in group["params"]]
        super().__init__(world, suffix, suffix, optimizer, device, max_grad_norm=max_grad_norm, initial_loss_scale=None)

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[object]:
        cast(Any, self.module).set_requires_gradient_sync(is_last)
        return nullcontext()

    def _replicas(self) -> list[Tensor]:
        return []

    def _shard(self, tensor: Tensor) -> Tensor:
        return cast(DTensor, tensor).to_local()

    def _sum_norm(self, norm: Tensor) -> Tensor:
        return cast(DTensor, norm).full_tensor()

    def _gather(self, weight: Tensor, kind: str) -> Tensor:
        return cast(DTensor, self._local(weight, kind)).full_tensor()

    def _scatter(self, weight: Tensor, kind: str, value: Tensor) -> None:
        part = cast(DTensor, self._local(weight, kind))
        part.copy_(distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None))
