"""The settings of the optimisation, as the training loop takes them."""

from dataclasses import dataclass
from typing import Literal

from agnews_dist.events import Metric
from agnews_dist.training.optim import Average, Schedule


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings of the optimisation. `run.setup` fills them in from the configuration."""

    epochs: int
    max_steps: int | None
    """Steps of the run, in place of `epochs`."""
    lr: float
    weight_decay: float
    warmup_ratio: float
    schedule: Schedule
    max_grad_norm: float
    label_smoothing: float
    best_metric: Metric
    evaluate_every: int | Literal["epoch"]
    """Steps between evaluations, counted over the whole run; 'epoch': at the end of every epoch."""
    patience: int | None
    """Evaluations in a row without improvement after which the training ends; None: it never ends early."""
    nonfinite: Literal["stop", "skip"]
    seed: int
    class_names: tuple[str, ...]
    average: Average = "none"
    average_start: float = 0.5
    """Share of the steps after which averaging begins."""
    ema_decay: float = 0.99
    layer_decay: float = 1.0
    r_drop: float = 0.0
    solver: Literal["adamw", "lbfgs"] = "adamw"
    """lbfgs: see `lbfgs.HeadSolver`, which has no use for most of these."""
    freeze_schedule: tuple[int, ...] | None = None
    """Trained blocks in each epoch, which never rise; the last number holds for all later epochs. None: always all."""
    standardize: bool = False
    """Standardise the inputs of `out_head`, which must depend on no trained block."""
