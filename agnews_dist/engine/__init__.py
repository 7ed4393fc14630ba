"""Device, precision, memory, and the strategies: DDP, FSDP2, DeepSpeed."""

from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy

__all__ = ["Engine", "Strategy"]
