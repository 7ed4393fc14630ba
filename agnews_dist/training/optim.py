"""AdamW over the trainable part; the learning rate and the weight of a step in the average, as pure functions."""

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine"]
Average = Literal["none", "ema", "swa"]
"""Average of the weights over steps: none, an exponential moving one, or the equal mean (stochastic weight averaging)."""
LR_SCALE = "lr_scale"
"""Key of a parameter group: its learning rate, relative to that of the head."""


def build_optimizer(module: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters. Only matrices decay, not biases and norms (vectors).

    `layer_decay`: factor on the learning rate per layer below the final norm and the head, see `count_layers_above`.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    layers = count_layers_above(trainable)
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        members.setdefault((layer_decay ** layers[name], parameter.ndim >= 2), []).append(parameter)
    groups = [
        {"params": members[scale, is_matrix], "weight_decay": weight_decay if is_matrix else 0.0, LR_SCALE: scale}
        for scale, is_matrix in sorted(members, reverse=True)
    ]
    # Fused: one pass over weights and moments. With cached features the update is most of a step on a CPU.
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    set_lr(optimizer, lr)
    return optimizer


def count_layers_above(names: Collection[str]) -> dict[str, int]:
    """Return the layers above each trainable parameter: 0 for the final norm and the head, 1 for the last block, and so forth.

    Embeddings are the layer below the lowest block.

    >>> count_layers_above(["wte.weight", "h.4.ln_1.bias", "h.5.ln_1.bias", "ln_f.bias"])
    {'wte.weight': 3, 'h.4.ln_1.bias': 2, 'h.5.ln_1.bias': 1, 'ln_f.bias': 0}
    """
    blocks = {name: int(name.split(".")[1]) for name in names if name.startswith("h.")}
    above = {name: max(blocks.values()) + 1 - block for name, block in blocks.items()}
    of_embeddings = max(above.values(), default=0) + 1
    return {name: of_embeddings if name.startswith(("wte.", "wpe.")) else above.get(name, 0) for name in names}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group: `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)


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


def is_averaged(step: int, *, num_steps: int, average: Average, start: float) -> bool:
    """Return whether the weights after `step` steps of `num_steps` belong to the average: after the share `start` of the steps.

    >>> [step for step in range(1, 6) if is_averaged(step, num_steps=5, average="swa", start=0.5)]
    [3, 4, 5]
    """
    return average != "none" and step > math.floor(start * num_steps)


def averaging_rate(num_averaged: int, *, average: Average, ema_decay: float) -> float:
    """Return the weight of the next weights in an average of `num_averaged` weights; the average has 1 minus it.

    "swa" is the equal mean. The decay of "ema" grows from that of a short memory, (1 + n) / (10 + n), to `ema_decay`: so the
    first weights are forgotten in a short run too.

    >>> [averaging_rate(n, average="swa", ema_decay=0.99) for n in (0, 1, 3)]
    [1.0, 0.5, 0.25]
    """
    if average == "swa" or num_averaged == 0:
        return 1 / (num_averaged + 1)
    return 1 - min(ema_decay, (1 + num_averaged) / (10 + num_averaged))
