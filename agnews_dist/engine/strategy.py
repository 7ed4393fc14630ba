"""The trainable part under an engine: forward, backward, one update, and its whole state. All engines give the same numbers."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.errors import Stopped

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in the optimizer's state."""
AVERAGE = "average"
"""Name of the average of a weight over steps. It lies in the optimizer's state, and is sharded as the moments are."""


class Strategy:
    """Base class, for one process and for DDP: every rank holds all weights, gradients and moments."""

    def __init__(
        self,
        world: World,
        module: nn.Module,
        suffix: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        max_grad_norm: float,
        initial_loss_scale: float | None,
    ) -> None:
        """`module`: `suffix` as the engine wraps it; `initial_loss_scale`: None unless fp16 needs loss scaling."""
        self.module, self.suffix = module, suffix
        self._world, self._optimizer, self._max_grad_norm = world, optimizer, max_grad_norm
        # Passed in: offloaded weights are not on the compute device.
        self._device = device
        has_scale = initial_loss_scale is not None
        self._scaler = torch.amp.GradScaler(device.type, init_scale=initial_loss_scale or 1.0, enabled=has_scale)
        self._must_order_buckets = False
        """True if DDP has not made a pass since a state was loaded, or since it was wrapped again."""
        self._norm: float | None = None
        self.num_averaged = 0
        """Steps whose weights are in the average of the weights; 0: there is none."""

    def __call__(self, *features: Tensor) -> Tensor:
        """Compute logits_BC from `Features`."""
        if self._must_order_buckets and isinstance(self.module, DistributedDataParallel):
            self._order_buckets(self.module, *features)
        self._must_order_buckets = False
        return cast(Tensor, self.module(*features))

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Wrap the forward and backward pass of one micro-batch. Only the last one of a step synchronises gradients."""
        return nullcontext() if is_last or self._world.num_ranks == 1 else cast(Any, self.module).no_sync()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a normalised loss. accelerate's own `backward` would divide it once more."""
        self._scaler.scale(loss).backward()

    def clip(self) -> float | None:
        """Clip the gradients and return their global norm before, equal on every rank; None: `update` does both."""
        self._scaler.unscale_(self._optimizer)
        norm = self._sum_norm(nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm or math.inf))
        self._norm = norm.item()
        return self._norm

    def update(self) -> float:
        """Clip the gradients unless `clip` did, update the weights, clear the gradients. Return the norm before clipping.

        If it is not finite, no rank updates anything.
        """
        norm = self.clip() if self._norm is None else self._norm
        assert norm is not None
        if math.isfinite(norm):
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._norm = None
        return norm

    @property
    def loss_scale(self) -> float:
        """Factor on losses before the backward pass; gradients are divided by it again. 1 without fp16."""
        return float(self._scaler.get_scale())

    @property
    def scaling(self) -> tuple[float, int]:
        """(loss scale, steps without overflow since it last changed); (1, 0) without fp16."""
        return self.loss_scale, self._scaler.state_dict().get("_growth_tracker", 0)

    def load_scaling(self, scale: float, clean_steps: int) -> None:
        """Restore `scaling`. Does nothing without fp16."""
        if self._scaler.is_enabled():
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": clean_steps})

    @property
    def num_updates(self) -> int:
        """Updates made by AdamW, for its bias correction. Skipped updates do not count."""
        return next((int(state["step"]) for state in self._optimizer.state.values() if "step" in state), 0)

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """Move the average of the weights towards the weights by this share of the difference. The first call copies them."""
        weights, states = self._optimizer_weights(), self._optimizer.state
        if self.num_averaged == 0:
            # AdamW creates its moments only for a weight without any state, and fp16 may have skipped all updates so far.
            self._create_moments(self.num_updates)
            for weight in weights:
                states[weight][AVERAGE] = torch.zeros_like(weight)
        for weight in weights:
            self._shard(states[weight][AVERAGE]).lerp_(self._shard(weight), rate if self.num_averaged else 1.0)
        self.num_averaged += 1

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Compute with the average of the weights inside the block, if there is one. Collective.

        The block must not change weights. It ends on all ranks together: normally, or by `Stopped`.
        """
        if self.num_averaged == 0:
            yield
            return
        weights = list(self.suffix.parameters())
        kept = [self._show_average(weight) for weight in weights]

        def restore() -> None:
            for weight, value in zip(weights, kept, strict=True):
                self._show_weight(weight, value)

        try:
            yield
        except Stopped:
            restore()
            raise
        restore()

    def check_replicas(self, step: int) -> None:
        """Check that the ranks still hold the same bits of what each of them holds whole. Collective.

        If a bit flips in memory or in a reduction on one rank, that rank trains other weights from there on. Shards have no
        second copy to compare.

        Raises:
            SharedError: on all ranks; it names the ranks that differ.
        """
        if self._world.num_ranks > 1:
            collectives.check_replicas(collectives.sum_bits(self._replicas()), f"weights after step {step}")

    def gather_weights(self) -> dict[str, Tensor]:
        """Return whole fp32 weights on the CPU by name, on rank 0; an empty mapping elsewhere. Collective.

        These are the weights to score and to export: the average, if there is one.
        """
        kind = AVERAGE if self.num_averaged else WEIGHT
        return {name: weight.clone().cpu() for name, weight in self._gather_all(kind) if self._world.is_main}

    def gather_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield weights and moments in fp32: 'weight.<name>', then 'exp_avg.<name>', then 'exp_avg_sq.<name>'.

        If there is an average of the weights, 'average.<name>' is last.
        Collective: every rank must iterate to the end. One tensor at a time is gathered, to save memory. Rank 0's may be a view
        of the weight, so copy it before the next step; the others' are unspecified. Before the first update moments are zeros.
        """
        for kind in self._kinds:
            for name, value in self._gather_all(kind):
                yield f"{kind}.{name}", value

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights from `gather_weights`, and drop their average. Only rank 0's `state` is read. Collective."""
        self.num_averaged = 0
        self._broadcast_all(WEIGHT, {f"{WEIGHT}.{name}": weight for name, weight in state.items()})

    def load_state(self, state: Mapping[str, Tensor], num_updates: int, num_averaged: int = 0) -> None:
        """Restore weights and moments from `gather_state`, saved by any engine on any number of ranks.

        Only rank 0's `state` is read; the two counts are equal on all ranks. `num_averaged` 0: without an average. Collective.
        """
        self._create_moments(num_updates)
        self.num_averaged = num_averaged
        if num_averaged:
            for weight in self._optimizer_weights():
                self._optimizer.state[weight][AVERAGE] = torch.zeros_like(weight)
        for kind in self._kinds:
            self._broadcast_all(kind, state)
        self._must_order_buckets = True

    def freeze(self, weights: Iterable[nn.Parameter], wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Take weights out of the training: they get neither gradient nor update, and lose their moments and average.

        `wrap` wraps the suffix again, as DDP waits for the gradients of all weights that had one at its start. Collective.
        """
        for weight in weights:
            weight.requires_grad_(False)
            self._optimizer.state.pop(weight, None)
        for group in self._optimizer.param_groups:
            group["params"] = [weight for weight in group["params"] if weight.requires_grad]
        # The old wrapper ends first: its hooks are on the weights.
        self.module = self.suffix
        self.module = wrap(self.suffix)
        # A run that resumes from here orders them too.
        self._must_order_buckets = True

    def _order_buckets(self, module: DistributedDataParallel, *features: Tensor) -> None:
        """Make DDP order its buckets as it does after the first backward pass of a run.

        On three or more ranks the last bits of a sum depend on its place in a bucket. Without this pass the first step after
        a restart would differ from the run without a restart. The gradients of the pass are dropped.
        """
        synchronises, module.require_backward_grad_sync = module.require_backward_grad_sync, True
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            cast(Tensor, module(*features)).sum().backward()
        module.require_backward_grad_sync = synchronises
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def _kinds(self) -> tuple[str, ...]:
        """Everything of a weight that a checkpoint holds."""
        return (WEIGHT, *MOMENTS, AVERAGE) if self.num_averaged else (WEIGHT, *MOMENTS)

    def _gather_all(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        exists = kind not in MOMENTS or self.num_updates > 0
        for name, weight in self.suffix.named_parameters():
            # The moments of a frozen weight are zeros.
            if exists and (kind not in MOMENTS or weight.requires_grad):
                yield name, self._gather(weight, kind)
            else:
                yield name, torch.zeros(self._full_shape(weight), dtype=weight.dtype, device=self._device)

    def _broadcast_all(self, kind: str, state: Mapping[str, Tensor]) -> None:
        """Set every weight, or one of its moments, from rank 0's `state`. Raises SharedError: a rank received other bits."""
        collectives.check_replicas(collectives.sum_bits(self._receive_all(kind, state)), f"{kind} from rank 0,")

    def _receive_all(self, kind: str, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for name, weight in self.suffix.named_parameters():
            if self._world.is_main:
                value = state[f"{kind}.{name}"].to(self._device)
            else:
                value = torch.empty(self._full_shape(weight), dtype=weight.dtype, device=self._device)
            self._scatter(weight, kind, collectives.broadcast(value))
            yield value

    def _create_moments(self, num_updates: int) -> None:
        """Create the optimizer's state where AdamW has not yet created it, and set the number of updates."""
        for weight in self._optimizer_weights():
            state = self._optimizer.state[weight]
            if not state:
                # torch's fused AdamW counts in fp32, on the device of the weight.
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state.update({kind: torch.zeros_like(weight) for kind in MOMENTS})
            state["step"].fill_(num_updates)

    def _optimizer_weights(self) -> list[Tensor]:
        """Return the keys of the optimizer's state."""
        return [weight for group in self._optimizer.param_groups for weight in group["params"]]

    def _replicas(self) -> list[Tensor]:
        """Return the weights, and moments and average once they exist."""
        states = self._optimizer.state
        found = [states[weight] for weight in self._optimizer_weights() if weight in states]
        return [*self.suffix.parameters(), *(state[kind] for state in found for kind in (*MOMENTS, AVERAGE) if kind in state)]

    def _full_shape(self, weight: Tensor) -> torch.Size:
        return weight.shape

    def _local(self, weight: Tensor, kind: str) -> Tensor:
        """Return this rank's shard of the weight or of one of its moments. A frozen weight is its own average."""
        is_weight = kind == WEIGHT or (kind == AVERAGE and not weight.requires_grad)
        return weight.detach() if is_weight else self._optimizer.state[weight][kind]

    def _gather(self, weight: Tensor, kind: str) -> Tensor:
        """Return the whole weight or moment. Collective."""
        return self._local(weight, kind)

    def _scatter(self, weight: Tensor, kind: str, value: Tensor) -> None:
        """Set this rank's shard from the whole `value`, equal on every rank. Collective."""
        self._local(weight, kind).copy_(value)

    def _shard(self, tensor: Tensor) -> Tensor:
        """Return the memory of this rank's shard of a tensor."""
        return tensor

    def _show_average(self, weight: Tensor) -> Tensor | None:
        """Put the average in place of a weight for the next forward passes; return what `_show_weight` needs. Collective."""
        shown = self._local(weight, WEIGHT)
        kept = shown.clone()
        shown.copy_(self._local(weight, AVERAGE))
        return kept

    def _show_weight(self, weight: Tensor, kept: Tensor | None) -> None:
        """Restore the weight that `_show_average` has replaced. Collective."""
        assert kept is not None
        self._local(weight, WEIGHT).copy_(kept)

    def _sum_norm(self, norm: Tensor) -> Tensor:
        """Return the gradient norm over all shards."""
        return norm
