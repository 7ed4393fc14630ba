"""Training: the loop, one exact step, checkpoints, and the checks around them."""

from agnews_dist.training.diagnostics import profile_steps
from agnews_dist.training.loop import Trainer
from agnews_dist.training.step import train_step
from agnews_dist.training.timing import StageTimer

__all__ = ["StageTimer", "Trainer", "profile_steps", "train_step"]
