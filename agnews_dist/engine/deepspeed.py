"""DeepSpeed ZeRO: shards over the ranks what DDP holds on each of them. The only module that imports DeepSpeed.

DeepSpeed's engine is called directly: accelerate's step would not let the ranks agree before an update. Optimizer (torch's
AdamW), fp32 weights and autocast are ours, so DeepSpeed decides only where tensors are kept.
"""

import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.strategy import AVERAGE, MOMENTS, WEIGHT, Strategy
from agnews_dist.errors import UserError

_GROUPS = (("deepspeed.comm.comm", "cdb"), ("deepspeed.utils.groups", "_WORLD_GROUP"))
"""(module, name) under which DeepSpeed 0.19 remembers the process group. It fails if that has been destroyed."""
# Keys in DeepSpeed's optimizer state; None: the fp32 copy of the weight.
_STATE_KEYS: dict[str, str | None] = {WEIGHT: None, **{kind: kind for kind in (*MOMENTS, AVERAGE)}}


def require_deepspeed() -> None:
    """Raise UserError unless DeepSpeed is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine.backend deepspeed: DeepSpeed is not installed. Install it with pip install 'agnews_dist[deepspeed]', "
            "or set --engine.backend ddp."
        )


def prepare_deepspeed(world: World, device: str) -> None:
    """Set the environment and the options that DeepSpeed reads when accelerate starts it. Raise UserError if it cannot."""
    require_deepspeed()
    if device == "cpu" and torch.cuda.is_available():
        raise UserError(
            "engine.device cpu with engine.backend deepspeed: DeepSpeed uses a GPU wherever it finds one. "
            "Hide it with CUDA_VISIBLE_DEVICES='', or set --engine.backend ddp."
        )
    # DeepSpeed 0.19 calls collectives that torch 2.13 deprecates, twice per step.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf".*{name}. is deprecated", FutureWarning)
    if world.num_ranks == 1:
        # DeepSpeed needs a process group even for one process.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    import deepspeed.ops

    # Otherwise every start on a CPU compiles an extension for a minute, and fails without a compiler.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


@contextmanager
def isolate_deepspeed() -> Generator[None]:
    """Hide the groups that an imported DeepSpeed keeps per process inside the block, and restore them at the end."""
    saved = {(module, name): getattr(sys.modules.get(module), name, None) for module, name in _GROUPS}
    _set_groups(dict.fromkeys(_GROUPS))
    try:
        yield
    finally:
        _set_groups(saved)


def _set_groups(values: Mapping[tuple[str, str], object]) -> None:
    for (module, name), value in values.items():
        if module in sys.modules:
            setattr(sys.modules[module], name, value)


def mark_leaf_blocks(suffix: nn.Module) -> None:
    """Make stage 3 gather a whole block at once. Blocks use weights of layers that they never call."""
    from deepspeed.utils import set_z3_leaf_modules

    kinds = list({type(block) for block in suffix.get_submodule("h").children()})
    if kinds:
        set_z3_leaf_modules(suffix, kinds)


class DeepSpeedStrategy(Strategy):
    """The trainable part under ZeRO. Sharded are the moments, from stage 2 the gradients, in stage 3 the weights."""

    def __init__(
        self,
        world: World,
        module: Any,
        suffix: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        zero: ZeroOptions,
        max_grad_norm: float,
        initial_loss_scale: float | None,
    ) -> None:
        """`module`: DeepSpeed's engine around `suffix`."""
        super().__init__(world, module, suffix, optimizer, device, max_grad_norm=max_grad_norm, initial_loss_scale=None)
        self._engine, self._zero = module, zero
        _check_settings(module, optimizer, zero, max_grad_norm)
        if initial_loss_scale is not None:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

            # DeepSpeed creates this for half-precision weights only; here weights are fp32 under fp16 autocast.
            module.optimizer.loss_scaler = DynamicLossScaler(
                init_scale=initial_loss_scale,
                scale_window=2000,
                min_scale=1.0,
                delayed_shift=1,
                consecutive_hysteresis=False,
                raise_error_at_min_scale=False,
                dtype=torch.float16,
            )
            self.load_scaling(initial_loss_scale, 0)

    def __call__(self, *features: Tensor) -> Tensor:
        if self._zero.stage == 3:
            # Stage 3 frees a block's weights once the gradient of the block's input exists. Without such a gradient it would
            # free them in the middle of the block's backward pass.
            features = tuple(part.detach().requires_grad_() if part.is_floating_point() else part for part in features)
        return super().__call__(*features)

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[object]:
        # DeepSpeed itself counts one micro-batch per step.
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def clip(self) -> float | None:
        return None

    def update(self) -> float:
        # DeepSpeed skips a non-finite update on all ranks together.
        self._engine.step()
        if self._engine.optimizer.overflow:
            self.load_scaling(self.loss_scale, 0)
            return math.inf
        return float(self._engine.get_global_grad_norm())

    @property
    def loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale)

    @property
    def scaling(self) -> tuple[float, int]:
        scaler = self._engine.optimizer.loss_scaler
        clean_steps = (scaler.cur_iter - scaler.last_overflow_iter - 2) % scaler.scale_window if scaler.dynamic else 0
        return self.loss_scale, clean_steps

    def load_scaling(self, scale: float, clean_steps: int) -> None:
        scaler = self._engine.optimizer.loss_scaler
        if scaler.dynamic:
            # -2 makes DeepSpeed raise the scale after as many clean steps as torch; by default it waits one longer.
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, clean_steps, -2

    def _optimizer_weights(self) -> list[Tensor]:
        # Stage 3 passes its shards to the optimizer one by one, during the update only.
        return self._engine.optimizer.fp32_partitioned_groups_flat if self._zero.stage == 3 else super()._optimizer_weights()

    def _replicas(self) -> list[Tensor]:
        # The moments are sharded in every stage.
        return [] if self._zero.stage == 3 else list(self.suffix.parameters())

    def _full_shape(self, weight: Tensor) -> torch.Size:
        return cast(Any, weight).ds_shape if self._zero.stage == 3 else weight.shape

    def _gather(self, weight: Tensor, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._zero.stage < 3:
            if kind == WEIGHT:
                return weight.detach()
            self._link(weight)
        return cast(Tensor, safe_get_full_optimizer_state(weight, _STATE_KEYS[kind])).detach()

    def _scatter(self, weight: Tensor, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if kind == WEIGHT:
            self._show(weight, value)
        if self._zero.stage < 3:
            if kind != WEIGHT:
                self._link(weight)
            safe_set_full_optimizer_state(weight, value, _STATE_KEYS[kind])
            return
        # Setting it from the whole value fails on a last rank with a shorter shard.
        size = cast(Any, weight).ds_tensor.numel()
        values = value.flatten()[self._world.rank * size :][:size]
        shard = nn.functional.pad(values, (0, size - values.numel()))
        safe_set_local_optimizer_state(weight, shard, _STATE_KEYS[kind])

    def _show(self, weight: Tensor, value: Tensor) -> None:
        """Set the weight of the forward pass alone: the optimizer has a copy of its own, from which it updates. Collective."""
        from deepspeed.runtime.zero import GatheredParameters

        with torch.no_grad(), GatheredParameters([weight], modifier_rank=0, enabled=self._zero.stage == 3):
            weight.copy_(value)

    def _show_average(self, weight: Tensor) -> Tensor | None:
        # In stage 3 the optimizer's copy is enough to restore the weight.
        kept = weight.detach().clone() if self._zero.stage < 3 else None
        self._show(weight, self._gather(weight, AVERAGE))
        return kept

    def _show_weight(self, weight: Tensor, kept: Tensor | None) -> None:
        self._show(weight, self._gather(weight, WEIGHT) if kept is None else kept)

    def _link(self, weight: Tensor) -> None:
        """Link a weight of stage 1 or 2 to its range of this rank's flat moments.

        DeepSpeed 0.19.8 links all weights after the first update of the first group, before the second group has moments.
        """
        mapping = cast(Any, weight)._hp_mapping
        if mapping is not None:
            (flat,) = self._optimizer.param_groups[mapping.param_group_index]["params"]
            mapping.set_optim_state_fragment(flat, self._optimizer.state[flat])


def _check_settings(engine: Any, optimizer: torch.optim.Optimizer, zero: ZeroOptions, max_grad_norm: float) -> None:
    """Check that DeepSpeed runs with the given settings, of which it has silently ignored some before."""
    actual = {
        "stage": (int(engine.zero_optimization_stage()), zero.stage),
        "gradient_clipping": (float(engine.gradient_clipping()), float(max_grad_norm)),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
        "optimizer": (type(engine.optimizer.optimizer), type(optimizer)),
        "type of the weights": (engine.optimizer.dtype, torch.float32),
    }
    wrong = [f"{name} {found} instead of {wanted}" for name, (found, wanted) in actual.items() if found != wanted]
    if wrong:
        raise UserError(
            f"DeepSpeed runs with {', '.join(wrong)}: the result would differ from DDP's. Install the DeepSpeed of "
            "requirements.lock, and remove these keys from engine.deepspeed_config."
        )
    if zero.stage < 3 and engine.optimizer.round_robin_gradients:
        # DeepSpeed 0.19.8 then links weights to the wrong ranges of the moments.
        raise UserError(
            "engine.deepspeed_config zero_optimization.round_robin_gradients true: checkpoints would hold the moments of "
            "other weights. Remove the key."
        )
