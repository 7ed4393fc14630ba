"""The examples of each global batch, their split among the ranks, and the batches on a rank.

`plan` and `PlanSettings` decide the global batches. `LengthBucketedBatchSampler` serves them to any torch DataLoader.
"""

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.sampler import LengthBucketedBatchSampler
from agnews_dist.data.batching.settings import PlanSettings

__all__ = ["LengthBucketedBatchSampler", "PlanSettings", "plan"]
