"""The only door to DeepSpeed: ZeRO divides over the ranks what DDP holds on each of them, and gives the same numbers.

The wrapped engine is driven directly, as accelerate's own step leaves no place for a vote. The optimizer is torch's AdamW, the
weights are fp32 and autocast is the model's own, so that nothing depends on DeepSpeed but where things are.
"""

import importlib.util
import math
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.strategy import WEIGHT, Strategy
from agnews_dist.errors import UserError


def require_deepspeed() -> None:
    """Make sure that it can be imported.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine.backend deepspeed, but DeepSpeed is not installed: nothing would divide what trains. Install it with "
            "pip install 'agnews_dist[deepspeed]', or set --engine.backend ddp."
        )


def make_ready(world: World, device: str) -> None:
    """What must be in place before accelerate starts DeepSpeed.

    Raises:
        UserError: it is not installed, or would take a GPU although `device` is cpu.
    """
    require_deepspeed()
    if device == "cpu" and torch.cuda.is_available():
        raise UserError(
            "engine.device cpu with engine.backend deepspeed, but there is a GPU: DeepSpeed takes it whatever is asked. "
            "Hide it with CUDA_VISIBLE_DEVICES='', or use --engine.backend ddp."
        )
    # DeepSpeed calls torch's collectives by names that torch 2.13 calls old, twice per step.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf".*{name}. is deprecated", FutureWarning)
    if world.num_ranks == 1:
        # DeepSpeed wants a process group even for one process.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    import deepspeed.ops

    # Otherwise every start on a CPU compiles an extension for a minute, and ends where there is no compiler.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def fetch_whole_blocks(suffix: nn.Module) -> None:
    """Have stage 3 fetch a block's weights when the block is called: it uses them without calling the layers they belong to."""
    from deepspeed.utils import set_z3_leaf_modules

    kinds = list({type(block) for block in suffix.get_submodule("h").children()})
    if kinds:
        set_z3_leaf_modules(suffix, kinds)


class DeepSpeedStrategy(Strategy):
    """What trains under ZeRO: divided over the ranks are the optimizer's state, from stage 2 gradients, in stage 3 weights."""

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
        first_loss_scale: float | None,
    ) -> None:
        """`module`: DeepSpeed's engine around `suffix`.

        Raises:
            UserError: DeepSpeed runs with something else than it was told, or would lose track of the optimizer's state.
        """
        super().__init__(world, module, suffix, optimizer, device, max_grad_norm=max_grad_norm, first_loss_scale=None)
        self._engine, self._zero = module, zero
        _check_state(module, optimizer, zero, max_grad_norm)
        _check_readable(module, zero)
        if first_loss_scale is not None:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

            # What DeepSpeed makes for weights in half precision, here for fp32 weights under fp16 autocast.
            module.optimizer.loss_scaler = DynamicLossScaler(
                init_scale=first_loss_scale,
                scale_window=2000,
                min_scale=1.0,
                delayed_shift=1,
                consecutive_hysteresis=False,
                raise_error_at_min_scale=False,
                dtype=torch.float16,
            )
            self.load_scaling(first_loss_scale, 0)

    def __call__(self, *features: Tensor) -> Tensor:
        """As `Strategy`."""
        if self._zero.stage == 3:
            # Stage 3 lets go of a block's weights when the gradient of the block's input is there: without such a gradient, at
            # once, in the middle of the block's backward pass.
            features = tuple(part.detach().requires_grad_() if part.is_floating_point() else part for part in features)
        return super().__call__(*features)

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around one micro-batch: the boundary is told to DeepSpeed, whose own count of micro-batches is 1."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of an already normalised loss."""
        self._engine.backward(loss)

    def update(self) -> float:
        """As `Strategy.update`; DeepSpeed itself leaves out an update whose norm is not finite, on all ranks alike."""
        self._engine.step()
        if self._engine.optimizer.overflow:
            self.load_scaling(self.loss_scale, 0)
            return math.inf
        return float(self._engine.get_global_grad_norm())

    @property
    def loss_scale(self) -> float:
        """As `Strategy.loss_scale`."""
        return float(self._engine.optimizer.loss_scale)

    @property
    def scaling(self) -> tuple[float, int]:
        """As `Strategy.scaling`."""
        scaler = self._engine.optimizer.loss_scaler
        clean_steps = (scaler.cur_iter - scaler.last_overflow_iter - 2) % scaler.scale_window if scaler.dynamic else 0
        return self.loss_scale, clean_steps

    def load_scaling(self, scale: float, clean_steps: int) -> None:
        """As `Strategy.load_scaling`."""
        scaler = self._engine.optimizer.loss_scaler
        if scaler.dynamic:
            # After an overflow DeepSpeed waits one step longer than torch before it raises the scale: here it does not.
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, clean_steps, -2

    def _updated(self) -> list[Tensor]:
        # Stage 3 shows its parts to the optimizer one by one, while it updates them.
        return self._engine.optimizer.fp32_partitioned_groups_flat if self._zero.stage == 3 else super()._updated()

    def _shape(self, weight: Tensor) -> torch.Size:
        return cast(Any, weight).ds_shape if self._zero.stage == 3 else weight.shape

    def _gather(self, weight: Tensor, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._zero.stage < 3:
            if kind == WEIGHT:
                return weight.detach()
            self._link(weight)
        return cast(Tensor, safe_get_full_optimizer_state(weight, _key(kind))).detach()

    def _put(self, weight: Tensor, kind: str, value: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        is_divided = self._zero.stage == 3
        if kind == WEIGHT:
            with torch.no_grad(), GatheredParameters([weight], modifier_rank=0, enabled=is_divided):
                weight.copy_(value)
        if not is_divided:
            if kind != WEIGHT:
                self._link(weight)
            safe_set_full_optimizer_state(weight, value, _key(kind))
            return
        # Not from the whole: on a last rank whose part is shorter that fails.
        size = cast(Any, weight).ds_tensor.numel()
        mine = value.flatten()[self._world.rank * size :][:size]
        part = nn.functional.pad(mine, (0, size - mine.numel()))
        safe_set_local_optimizer_state(weight, part, _key(kind))

    def _link(self, weight: Tensor) -> None:
        """Tell a weight of stage 1 or 2 which part of this rank's moments is its own.

        DeepSpeed does so after the first update of its first group of weights, when the second has no moments yet (0.19.8).
        """
        mapping = cast(Any, weight)._hp_mapping
        if mapping is not None:
            (flat,) = self._optimizer.param_groups[mapping.param_group_index]["params"]
            mapping.set_optim_state_fragment(flat, self._optimizer.state[flat])


def _key(kind: str) -> str | None:
    """DeepSpeed's name for it among the optimizer's state, where None is the fp32 copy of the weight itself."""
    return None if kind == WEIGHT else kind


def _check_state(engine: Any, optimizer: torch.optim.Optimizer, zero: ZeroOptions, max_grad_norm: float) -> None:
    """What DeepSpeed was told and what it does have differed before, in silence."""
    found = {
        "stage": (int(engine.zero_optimization_stage()), zero.stage),
        "gradient_clipping": (float(engine.gradient_clipping()), float(max_grad_norm)),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
        "optimizer": (type(engine.optimizer.optimizer), type(optimizer)),
        "type of the weights": (engine.optimizer.dtype, torch.float32),
    }
    wrong = [f"{name} {is_now} instead of {wanted}" for name, (is_now, wanted) in found.items() if is_now != wanted]
    if wrong:
        raise UserError(
            f"DeepSpeed runs with {', '.join(wrong)}: the result would be another one than under DDP. Use the DeepSpeed of "
            "requirements.lock, and leave these keys out of engine.deepspeed_config."
        )


def _check_readable(engine: Any, zero: ZeroOptions) -> None:
    """DeepSpeed 0.19.8 trains well with this setting, and links weights with the wrong parts of the optimizer's state."""
    if zero.stage < 3 and engine.optimizer.round_robin_gradients:
        raise UserError(
            "engine.deepspeed_config has zero_optimization.round_robin_gradients true: DeepSpeed does not find the moments of "
            "a weight again, and a checkpoint would hold another's. Leave the key out."
        )
