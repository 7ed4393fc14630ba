"""Loss of each example of a micro-batch: cross-entropy, smoothed and weighted by class; R-Drop's divergence of two passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from agnews_dist.data.batching.batch import Batch
from agnews_dist.model.dropout import example_keys, step_key
from agnews_dist.model.prefix import Features

SECOND_PASS = 1
"""Number that turns a step's key into that of R-Drop's second pass."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The loss of a step, and the action where it is not finite."""

    label_smoothing: float = 0.0
    class_weights_C: Tensor | None = None
    """Weight of each class, float64, on the device; None: all count the same. The loader divides by the same weights."""
    r_drop: float = 0.0
    """Weight of the divergence between two passes with different dropout (R-Drop); 0: one pass."""
    nonfinite: Literal["stop", "skip"] = "stop"
    targets_NC: Tensor | None = None
    """Probabilities to learn in place of the labels, row by row of the training split, on the device; None: the labels."""


PLAIN = StepSettings()
"""Plain cross-entropy."""


def example_losses(logits_BC: Tensor, batch: Batch, settings: StepSettings = PLAIN) -> Tensor:
    """Return losses_B: each example's cross-entropy times the weight of its class and its own (0 for a filler row).

    In fp32 or wider. As torch defines it, smoothing weighs each class's part by that class's weight.
    """
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    weights_C = None if settings.class_weights_C is None else settings.class_weights_C.to(logits_BC.dtype)
    if settings.targets_NC is not None:
        # A filler row has the id -1, and the weight 0.
        targets_BC = settings.targets_NC[batch.ids_B].to(logits_BC.dtype)
        losses_B = functional.cross_entropy(logits_BC, targets_BC, reduction="none")
        losses_B = losses_B if weights_C is None else losses_B * weights_C[batch.labels_B]
    else:
        losses_B = functional.cross_entropy(
            logits_BC, batch.labels_B, weights_C, reduction="none", label_smoothing=settings.label_smoothing
        )
    return losses_B * batch.weights_B.to(losses_B.dtype)


def r_drop_losses(first_BC: Tensor, second_BC: Tensor, batch: Batch, settings: StepSettings) -> Tensor:
    """Return losses_B of two passes: the mean of their cross-entropies + `r_drop` x the mean of their divergences.

    The divergences are KL(first || second) and KL(second || first). The class of an example weighs its whole loss.
    """
    weights_B = batch.weights_B.to(first_BC.dtype)
    if settings.class_weights_C is not None:
        weights_B = weights_B * settings.class_weights_C.to(first_BC.dtype)[batch.labels_B]
    log_first_BC, log_second_BC = first_BC.log_softmax(dim=1), second_BC.log_softmax(dim=1)
    # Both divergences in one sum.
    divergences_B = ((log_first_BC.exp() - log_second_BC.exp()) * (log_first_BC - log_second_BC)).sum(dim=1) / 2
    losses_B = (example_losses(first_BC, batch, settings) + example_losses(second_BC, batch, settings)) / 2
    return losses_B + settings.r_drop * divergences_B * weights_B


def forward_losses(
    model: Callable[..., Tensor], features: Features, batch: Batch, *, dropout_key: int | None, settings: StepSettings
) -> Tensor:
    """Compute losses_B of a micro-batch from its features. `model`: the trainable part; `dropout_key`: see `train_step`."""
    keys = () if dropout_key is None else (example_keys(dropout_key, batch.ids_B),)
    if settings.r_drop == 0:
        return example_losses(model(*features, *keys), batch, settings)
    # One forward pass of every text twice: engines count on one forward pass before a backward pass.
    if dropout_key is not None:
        keys = (torch.cat([*keys, example_keys(step_key(dropout_key, SECOND_PASS), batch.ids_B)]),)
    logits_BC = model(*(torch.cat([part, part]) for part in features), *keys)
    first_BC, second_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32)).chunk(2)
    return r_drop_losses(first_BC, second_BC, batch, settings)
