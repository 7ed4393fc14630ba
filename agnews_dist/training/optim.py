"""AdamW over the trainable part, and the learning rate as a pure function of the step."""

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine"]


def build_optimizer(module: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters. Only matrices decay, not biases and norms (vectors)."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # Fused: one pass over weights and moments. With cached features the update is most of a step on a CPU.
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step: int, *, num_steps: int, peak: float, warmup_ratio: float, schedule: Schedule) -> float:
    """Return the learning rate of update `step` (from 0) of `num_steps`.

    A linear warm-up leads to `peak`; the decay ends just above 0. The first update of a warm-up has a rate above 0,
    and so has the last update of the decay: no step is wasted.

    >>> [learning_rate(s, num_steps=4, peak=1.0, warmup_ratio=0.0, schedule="linear") for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)
