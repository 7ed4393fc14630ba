"""Lengths and plans for tests of batching."""

import numpy as np

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import Lengths, PlanSettings
from agnews_dist.data.rows import Ints


def draw_lengths(num: int) -> Ints:
    """Draw lengths distributed like those of AG News in GPT-2 tokens."""
    return np.clip(np.random.default_rng(0).lognormal(3.9, 0.33, num), 8, 323).astype(np.int64)


def plan_batches(lengths: Lengths, settings: PlanSettings, epoch: int = 0) -> list[Ints]:
    """Return all global batches of an epoch."""
    return list(plan(lengths, settings, epoch=epoch).global_batches())
