"""What trains, as its engine runs it: forward, backward, one update, and the whole weights wherever they are kept.

Made by `Engine.prepare`. DDP holds everything on every rank, ZeRO and FSDP2 divide it; all give the same numbers.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from agnews_dist import collectives
from agnews_dist.world import World


class Wrapped:
    """One process, or DDP: all ranks hold all weights, gradients and moments."""

    def __init__(
        self,
        world: World,
        module: nn.Module,
        suffix: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        max_grad_norm: float,
        first_loss_scale: float | None,
    ) -> None:
        """`module`: `suffix` as it is to be called; `first_loss_scale`: None where gradients cannot underflow."""
        self.module, self.suffix = module, suffix
        self._world, self._optimizer, self._max_grad_norm = world, optimizer, max_grad_norm
        # Not asked of the weights: what is offloaded is elsewhere, and ranks talk from their devices.
        self._device = device
        self._scaler = torch.amp.GradScaler(
            self._device.type, init_scale=first_loss_scale or 1.0, enabled=first_loss_scale is not None
        )

    def __call__(self, *features: Tensor) -> Tensor:
        """`Features` to logits_BC."""
        return cast(Tensor, self.module(*features))

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of one micro-batch: only the last one of a step synchronises gradients."""
        return nullcontext() if is_last or self._world.num_ranks == 1 else cast(Any, self.module).no_sync()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of an already normalised loss.

        Not accelerate's `backward`: it divides by ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which wins over the argument 1.
        """
        self._scaler.scale(loss).backward()

    def update(self) -> float:
        """Clip, update and drop the gradients; the global norm before clipping, equal on every rank.

        If the norm is not finite, no rank has updated anything.
        """
        self._scaler.unscale_(self._optimizer)
        norm = self._global(nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm or math.inf)).item()
        if math.isfinite(norm):
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before the backward pass and gradients divided by after it; 1 without fp16."""
        return float(self._scaler.get_scale())

    def full_state(self) -> dict[str, Tensor]:
        """Name -> fp32 weights on the CPU, whole on rank 0 and empty on the others. Collective."""
        # Every rank takes part in putting a weight together, and only rank 0 keeps it.
        state = {name: weight.detach().clone().cpu() if self._world.is_main else None for name, weight in self._whole()}
        return {name: weight for name, weight in state.items() if weight is not None}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what rank 0 got from `full_state`; what the others give is not read. Collective."""
        for name, weight in self.suffix.named_parameters():
            with torch.no_grad():
                weight.copy_(self._from_main(name, state, weight.shape))

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        return self.suffix.named_parameters()

    def _global(self, norm: Tensor) -> Tensor:
        return norm

    def _from_main(self, name: str, state: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        value = state[name].to(self._device) if self._world.is_main else torch.empty(shape, device=self._device)
        return collectives.broadcast(value)
