"""One optimiser step: losses summed over micro-batches and ranks, divided once by the global count, voted on, applied."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agnews_dist import collectives
from agnews_dist.batch import Batch
from agnews_dist.data.loader import StepBatches
from agnews_dist.engine import Engine
from agnews_dist.errors import SharedError
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.wrapped import Wrapped


class NonFiniteError(SharedError):
    """A loss or gradient is NaN or infinite; raised on all ranks before the update."""


@dataclass(frozen=True)
class StepResult:
    """The same numbers on every rank."""

    loss: float
    """Mean over the global batch (nats), before the update."""
    grad_norm: float | None
    """Global norm before clipping; None: it overflowed in fp16, so the update was left out and the loss scale lowered."""


def summed_loss(logits_BC: Tensor, batch: Batch) -> Tensor:
    """Sum of the weighted per-example cross-entropies, at least in fp32."""
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    losses_B = functional.cross_entropy(logits_BC, batch.labels_B, reduction="none")
    return (losses_B * batch.weights_B.to(losses_B.dtype)).sum()


def accumulate_gradients(engine: Engine, embed: FeatureSource, wrapped: Wrapped, batches: StepBatches) -> float:
    """Leave the gradient of the global mean loss in `wrapped`; return this rank's sum of losses.

    Every engine averages gradients over ranks, so the local sum is scaled by `num_ranks / num_examples`: the average of these
    is the sum over all ranks divided by the global count. A mean per rank or per micro-batch would weigh examples by the size
    of the share they happened to land in.
    """
    loss_sum = 0.0
    last = len(batches.micro_batches) - 1
    for index, batch in enumerate(batches.micro_batches):
        features = embed(batch)
        with wrapped.accumulating(is_last=index == last):
            loss = summed_loss(wrapped(*features), batch)
            wrapped.backward(loss * (engine.world.num_ranks / batches.num_examples))
        loss_sum += loss.detach().double().item()
    return loss_sum


def train_step(engine: Engine, embed: FeatureSource, wrapped: Wrapped, batches: StepBatches) -> StepResult:
    """Gradients of one global batch, clipped by global norm, then one update on all ranks or on none.

    `embed` gives the features of a micro-batch at the freeze boundary, without autograd.

    Raises:
        NonFiniteError: on all ranks, if any rank saw a non-finite loss or gradient; parameters and moments are untouched.
    """
    loss_sum = accumulate_gradients(engine, embed, wrapped, batches)
    loss = _vote(engine, loss_sum) / batches.num_examples
    scale = wrapped.loss_scale
    norm = wrapped.update()
    if math.isfinite(norm):
        return StepResult(loss, norm)
    if scale > 1:
        # Every fp16 training begins so: the scale is as large as the gradients let it be.
        return StepResult(loss, None)
    raise NonFiniteError(
        f"gradient norm {norm}: the update would destroy the weights, so no rank made it. Lower optim.lr or "
        "optim.max_grad_norm; if engine.precision is bf16 or fp16, try fp32.",
        rank=0,
    )


def _vote(engine: Engine, loss_sum: float) -> float:
    """The sum of losses over ranks, in the same reduction in which the ranks vote on whether the update may happen.

    Once the gradients have met, a NaN of one rank is in the norm of all; the losses tell where it came from.
    """
    flags = [0.0] * engine.world.num_ranks
    flags[engine.world.rank] = float(not math.isfinite(loss_sum))
    total, *bad_losses = collectives.all_sum([loss_sum if math.isfinite(loss_sum) else 0.0, *flags], engine.device)
    ranks = [rank for rank, flag in enumerate(bad_losses) if flag]
    if ranks:
        raise NonFiniteError(
            f"non-finite loss on rank(s) {', '.join(map(str, ranks))}: the update would destroy the weights, so no rank made "
            "it. Lower optim.lr or optim.max_grad_norm; if engine.precision is bf16 or fp16, try fp32.",
            rank=ranks[0],
        )
    return total
