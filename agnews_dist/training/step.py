"""One optimiser step: sum the losses over micro-batches and ranks, divide once by the global divisor, vote, update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agnews_dist.data.batching.loader import StepBatches
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import SharedError, format_ids
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.training.losses import PLAIN, StepSettings, forward_losses


class NonFiniteError(SharedError):
    """A loss or gradient is NaN or infinite; raised on all ranks before the update."""

    def __init__(self, what: str, ids: tuple[int, ...], rank: int = 0) -> None:
        """Describe the fault: the message is `what` and the names of the examples `ids`; `rank` saw it first."""
        super().__init__(
            f"{what} {format_ids(ids)}: no rank updated its weights. Lower optim.lr or optim.max_grad_norm, try "
            "engine.precision fp32, or set optim.nonfinite skip.",
            rank,
        )
        self.ids = ids
        """The examples it came from: the whole global batch where only the gradient shows it."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on every rank."""

    loss: float
    """Mean over the global batch (nats), smoothed and weighted as it was trained; NaN where it was not finite."""
    grad_norm: float | None
    """Global norm before clipping. None: no update was made, because of an fp16 overflow or of `bad_ids`."""
    bad_ids: tuple[int, ...] = ()
    """Examples with a non-finite loss or gradient; the update was skipped."""
    stop: bool = False
    """True if any rank requested a stop."""
    save: bool = False
    """True if rank 0 requested a checkpoint."""


def accumulate_gradients(
    engine: Engine,
    embed: FeatureSource,
    strategy: Strategy,
    batches: StepBatches,
    *,
    dropout_key: int | None = None,
    settings: StepSettings = PLAIN,
) -> tuple[float, list[int]]:
    """Accumulate the gradient of the global mean loss in `strategy`.

    Every engine averages gradients over ranks. So the local sum is scaled by `num_ranks / loss_divisor`, and the average
    over ranks becomes the sum over all ranks divided by the global divisor. A mean per rank or per micro-batch would weigh
    each example by the size of its share. Return this rank's sum of losses, and its examples with a non-finite loss.
    """
    loss_sum, bad_ids = 0.0, list[int]()
    last = len(batches.micro_batches) - 1
    for index, batch in enumerate(batches.micro_batches):
        features = embed(batch)
        with strategy.accumulate(is_last=index == last):
            losses_B = forward_losses(strategy, features, batch, dropout_key=dropout_key, settings=settings)
            loss = losses_B.sum()
            # An infinite loss may have finite gradients: make them NaN, so that every engine skips the update.
            ratio = loss.new_tensor(engine.world.num_ranks / batches.loss_divisor)
            strategy.backward(loss * torch.where(loss.detach().isfinite(), ratio, math.nan))
        value = loss.detach().double().item()
        loss_sum += value
        if not math.isfinite(value):
            bad_ids += batch.ids_B[~losses_B.detach().isfinite()].tolist()
    return loss_sum, bad_ids


def train_step(
    engine: Engine,
    embed: FeatureSource,
    strategy: Strategy,
    batches: StepBatches,
    *,
    dropout_key: int | None = None,
    settings: StepSettings = PLAIN,
    stop: bool = False,
    save: bool = False,
) -> StepResult:
    """Compute the gradients of one global batch, clip them by global norm, and update on all ranks or on none.

    `embed` returns the features of a micro-batch at the freeze boundary, without autograd. `dropout_key`: see
    `model.dropout.step_key`. `stop` and `save`: this rank requests that the run stops, or a checkpoint (only rank 0's counts).

    Raises:
        NonFiniteError: on all ranks, if any rank saw a non-finite loss or gradient and `settings.nonfinite` is 'stop';
            parameters and moments are untouched.
        SharedError: on all ranks, if the sum of the gradients differs between them.
    """
    loss_sum, bad_ids = accumulate_gradients(engine, embed, strategy, batches, dropout_key=dropout_key, settings=settings)
    total, ranks, stops, saves = _vote(engine.world, loss_sum, strategy.clip(), stop=stop, save=save)
    if ranks:
        all_bad = _gather_ids(bad_ids)
        if settings.nonfinite == "stop":
            raise NonFiniteError(f"non-finite loss on rank(s) {', '.join(map(str, ranks))}, of", all_bad, ranks[0])
        strategy.update()
        return StepResult(math.nan, None, all_bad, stops, saves)
    loss, scale = total / batches.loss_divisor, strategy.loss_scale
    norm = strategy.update()
    if math.isfinite(norm):
        return StepResult(loss, norm, stop=stops, save=saves)
    if scale > 1:
        # Every fp16 training begins so: the scale is as large as the gradients let it be.
        return StepResult(loss, None, stop=stops, save=saves)
    mine = [example for batch in batches.micro_batches for example in batch.ids_B[batch.weights_B > 0].tolist()]
    all_of_step = _gather_ids(mine)
    if settings.nonfinite == "stop":
        raise NonFiniteError(f"gradient norm {norm} in a global batch of", all_of_step)
    return StepResult(loss, None, all_of_step, stops, saves)


def _gather_ids(ids: Sequence[int]) -> tuple[int, ...]:
    """Gather the ids of all ranks, sorted."""
    return tuple(sorted(example for mine in collectives.all_gather(list(ids)) for example in mine))


def _vote(world: World, loss_sum: float, norm: float | None, *, stop: bool, save: bool) -> tuple[float, list[int], bool, bool]:
    """Return the sum of losses over ranks, the ranks with a non-finite loss, the stop request and the save request.

    After the gradient reduction a NaN of one rank is in the norm of all ranks; only the losses show where it came from. The
    requests are part of the same collective, so that every rank acts on them after the same step. So are the norms: they are
    equal, and a rank with another one would be alone in skipping an update.
    """
    mine = (loss_sum, float(stop), float(save and world.is_main), math.nan if norm is None else norm)
    losses, stops, saves, norms = zip(*collectives.gather_numbers(mine), strict=True)
    # As text, NaN equals NaN.
    differing = [rank for rank, other in enumerate(norms) if repr(other) != repr(norms[0])]
    if differing:
        raise SharedError(
            f"gradient norm {norms[differing[0]]} on rank {differing[0]}, {norms[0]} on rank 0: a memory, device or network is "
            "faulty. Check these machines, then run the same command again to resume.",
            differing[0],
        )
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    return sum(loss for loss in losses if math.isfinite(loss)), bad, any(stops), any(saves)
