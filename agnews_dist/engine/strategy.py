"""What trains, as its engine runs it: forward, backward, one update, and the whole weights wherever they are kept.

Made by `Engine.prepare`. DDP holds everything on every rank, ZeRO and FSDP2 divide it; all give the same numbers.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every weight, by torch's names."""


class Strategy:
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
        # A state was loaded, and nothing computed since.
        self._goes_on = False

    def __call__(self, *features: Tensor) -> Tensor:
        """`Features` to logits_BC."""
        if self._goes_on and isinstance(self.module, DistributedDataParallel):
            self._lay_out_buckets(self.module, *features)
        self._goes_on = False
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

    @property
    def scaling(self) -> tuple[float, int]:
        """The loss scale, and the steps without an overflow since it last changed; (1, 0) without fp16."""
        return self.loss_scale, self._scaler.state_dict().get("_growth_tracker", 0)

    def load_scaling(self, scale: float, clean_steps: int) -> None:
        """Take over another run's `scaling`; nothing without fp16."""
        if self._scaler.is_enabled():
            state = {**self._scaler.state_dict(), "scale": scale, "_growth_tracker": clean_steps}
            self._scaler.load_state_dict(state)

    @property
    def num_updates(self) -> int:
        """How many updates AdamW has made, which its bias correction depends on; what overflowed is none."""
        return next((int(state["step"]) for state in self._optimizer.state.values() if "step" in state), 0)

    def full_state(self) -> dict[str, Tensor]:
        """Name -> fp32 weights on the CPU, whole on rank 0 and empty on the others. Collective."""
        # Every rank takes part in putting a weight together, and only rank 0 keeps it.
        weights = self._whole(WEIGHT)
        state = {name: weight.clone().cpu() if self._world.is_main else None for name, weight in weights}
        return {name: weight for name, weight in state.items() if weight is not None}

    def whole_state(self) -> Iterator[tuple[str, Tensor]]:
        """All that training goes on from, in fp32: 'weight.<name>', then 'exp_avg.<name>', then 'exp_avg_sq.<name>'.

        Collective: every rank takes them to the end, one after the other, so that none holds more than one beside its part. On
        rank 0 each is whole, and perhaps a view of what trains: it is to be copied before training goes on. Elsewhere the
        values are unspecified. Before the first update the moments are zeros.
        """
        for kind in (WEIGHT, *MOMENTS):
            for name, value in self._whole(kind):
                yield f"{kind}.{name}", value

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what rank 0 got from `full_state`; what the others give is not read. Collective."""
        self._load(WEIGHT, {f"{WEIGHT}.{name}": weight for name, weight in state.items()})

    def load_state(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from what rank 0 got from `whole_state`, of any engine on any number of ranks.

        What the others give as `state` is not read; `num_updates` is the same on all. Collective; a new engine will do.
        """
        self._make_moments(num_updates)
        for kind in (WEIGHT, *MOMENTS):
            self._load(kind, state)
        self._goes_on = True

    def _lay_out_buckets(self, module: DistributedDataParallel, *features: Tensor) -> None:
        """What the first step of the run that is continued left behind: DDP's buckets in the order in which gradients come.

        DDP arranges them so after its first backward pass. On three ranks or more the last bits of a sum depend on its place
        in a bucket, and would be others in the first step after a restart. This pass leaves nothing else.
        """
        synchronises, module.require_backward_grad_sync = module.require_backward_grad_sync, True
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            cast(Tensor, module(*features)).sum().backward()
        module.require_backward_grad_sync = synchronises
        self._optimizer.zero_grad(set_to_none=True)

    def _whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        is_there = kind == WEIGHT or self.num_updates > 0
        for name, weight in self.suffix.named_parameters():
            if is_there:
                yield name, self._gather(weight, kind)
            else:
                yield name, torch.zeros(self._shape(weight), dtype=weight.dtype, device=self._device)

    def _load(self, kind: str, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.suffix.named_parameters():
            value = (
                state[f"{kind}.{name}"].to(self._device)
                if self._world.is_main
                else torch.empty(self._shape(weight), dtype=weight.dtype, device=self._device)
            )
            self._put(weight, kind, collectives.broadcast(value))

    def _make_moments(self, num_updates: int) -> None:
        """What AdamW itself makes at its first update, if it has made none, and the number of updates."""
        for weight in self._updated():
            state = self._optimizer.state[weight]
            if not state:
                # torch's fused AdamW counts in fp32, on the device of the weight.
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state.update({kind: torch.zeros_like(weight) for kind in MOMENTS})
            state["step"].fill_(num_updates)

    def _updated(self) -> list[Tensor]:
        """What the optimizer takes for weights."""
        return [weight for group in self._optimizer.param_groups for weight in group["params"]]

    def _shape(self, weight: Tensor) -> torch.Size:
        """Of the whole weight."""
        return weight.shape

    def _held(self, weight: Tensor, kind: str) -> Tensor:
        """What this rank has of the weight, or of a moment of it."""
        return weight.detach() if kind == WEIGHT else self._optimizer.state[weight][kind]

    def _gather(self, weight: Tensor, kind: str) -> Tensor:
        """The whole of it. Collective."""
        return self._held(weight, kind)

    def _put(self, weight: Tensor, kind: str, value: Tensor) -> None:
        """Set it, from the whole `value`, which every rank has. Collective."""
        self._held(weight, kind).copy_(value)

    def _global(self, norm: Tensor) -> Tensor:
        return norm
