"""One optimiser step: losses summed over micro-batches and ranks, divided once by the global count, voted on, applied."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from agnews_dist import collectives
from agnews_dist.batch import Batch
from agnews_dist.data.loader import StepBatches
from agnews_dist.engine import Engine
from agnews_dist.errors import SharedError
from agnews_dist.model.prefix import FeatureSource


class NonFiniteError(SharedError):
    """A loss or gradient is NaN or infinite; raised on all ranks before the update."""


@dataclass(frozen=True)
class StepResult:
    """The same numbers on every rank."""

    loss: float
    """Mean over the global batch (nats), before the update."""
    grad_norm: float
    """Global norm before clipping."""


def summed_loss(logits_BC: Tensor, batch: Batch) -> Tensor:
    """Sum of the weighted per-example cross-entropies, at least in fp32."""
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    losses_B = functional.cross_entropy(logits_BC, batch.labels_B, reduction="none")
    return (losses_B * batch.weights_B.to(losses_B.dtype)).sum()


def accumulate_gradients(engine: Engine, embed: FeatureSource, wrapped: nn.Module, batches: StepBatches) -> float:
    """Leave the gradient of the global mean loss in the parameters of `wrapped`; return this rank's sum of losses.

    DDP averages gradients over ranks, so the local sum is scaled by `num_ranks / num_examples`: the average of these is the
    sum over all ranks divided by the global count. A mean per rank or per micro-batch would weigh examples by the size of the
    share they happened to land in.
    """
    loss_sum = 0.0
    last = len(batches.micro_batches) - 1
    for index, batch in enumerate(batches.micro_batches):
        features = embed(batch)
        with engine.accumulating(wrapped, is_last=index == last):
            loss = summed_loss(wrapped(*features), batch)
            engine.backward(loss * (engine.world.num_ranks / batches.num_examples))
        loss_sum += loss.detach().double().item()
    return loss_sum


def train_step(
    engine: Engine,
    embed: FeatureSource,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: StepBatches,
    *,
    max_grad_norm: float,
) -> StepResult:
    """Gradients of one global batch, clipped by global norm (0: not clipped), then one update on all ranks or on none.

    `embed` gives the features of a micro-batch at the freeze boundary, without autograd.

    Raises:
        NonFiniteError: on all ranks, if any rank saw a non-finite loss or gradient; parameters and moments are untouched.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum = accumulate_gradients(engine, embed, wrapped, batches)
    norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), max_grad_norm or math.inf).item()
    loss = _vote(engine, loss_sum, norm) / batches.num_examples
    optimizer.step()
    return StepResult(loss, norm)


def _vote(engine: Engine, loss_sum: float, norm: float) -> float:
    """The sum of losses over ranks, in the same reduction in which the ranks vote on whether the update may happen.

    After the gradients met, a NaN of one rank is in the norm of all; the losses tell where it came from.
    """
    flags = [0.0] * engine.world.num_ranks
    flags[engine.world.rank] = float(not math.isfinite(loss_sum))
    is_bad_norm = float(not math.isfinite(norm))
    total, bad_norms, *bad_losses = collectives.all_sum(
        [loss_sum if math.isfinite(loss_sum) else 0.0, is_bad_norm, *flags], engine.device
    )
    ranks = [rank for rank, flag in enumerate(bad_losses) if flag]
    if ranks or bad_norms:
        what = f"non-finite loss on rank(s) {', '.join(map(str, ranks))}" if ranks else f"gradient norm {norm}"
        raise NonFiniteError(
            f"{what}: the update would destroy the weights, so no rank made it. Lower optim.lr or "
            "optim.max_grad_norm; if engine.precision is bf16, try fp32.",
            rank=ranks[0] if ranks else 0,
        )
    return total
