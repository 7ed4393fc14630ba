"""Every sampler of the comparison behind one small interface: what does rank r compute, batch by batch, in one epoch?

`rank` runs the sampler as its own project runs it. `all_ranks` gives the same for all ranks; where that would repeat the same
work 64 times it goes through the same code once, and compare.py checks that rank 0 comes out equal. Third-party packages are
imported where they are used, so that a process that measures one sampler holds only what that sampler needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import share_batch

Batches = list[Sequence[int] | NDArray[np.int64]]
"""The example ids of one rank's batches, one per step."""
SEED = 0


class Sampler(ABC):
    """One sampler, made for `lengths_N`, a global batch of `global_batch` examples and `num_ranks` ranks."""

    def __init__(self, lengths_N: NDArray[np.int64], global_batch: int, num_ranks: int, **options: Any) -> None:
        self.lengths_N, self.global_batch, self.num_ranks, self.options = lengths_N, global_batch, num_ranks, options
        self.per_rank = global_batch // num_ranks
        self.prepare()

    def prepare(self) -> None:
        """Bring the lengths into the form the sampler asks for; not counted as planning."""
        self.lengths = self.lengths_N.tolist()

    @abstractmethod
    def rank(self, rank: int, epoch: int) -> Batches:
        """What one rank computes in one epoch."""

    def all_ranks(self, epoch: int) -> list[Batches]:
        return [self.rank(rank, epoch) for rank in range(self.num_ranks)]


class Ours(Sampler):
    """Options: `window` (default: that of PlanSettings) and `budget` (tokens per global batch instead of examples)."""

    def prepare(self) -> None:
        window = {"bucket_window": self.options["window"]} if "window" in self.options else {}
        budget = round(self.global_batch * self.lengths_N.mean()) if self.options.get("budget") else None
        self.settings = PlanSettings(global_batch_size=self.global_batch, global_token_budget=budget, seed=SEED, **window)

    def rank(self, rank: int, epoch: int) -> Batches:
        batches: Batches = []
        for ids in plan(self.lengths_N, self.settings, epoch=epoch).global_batches():
            dealt = share_batch(self.lengths_N[ids], num_ranks=self.num_ranks)
            batches.extend(ids[rows] for rows in dealt.slices(rank))
        return batches

    def all_ranks(self, epoch: int) -> list[Batches]:
        ranks: list[Batches] = [[] for _ in range(self.num_ranks)]
        for ids in plan(self.lengths_N, self.settings, epoch=epoch).global_batches():
            dealt = share_batch(self.lengths_N[ids], num_ranks=self.num_ranks)
            for rank, batches in enumerate(ranks):
                batches.extend(ids[rows] for rows in dealt.slices(rank))
        return ranks


class GloballySorted(Sampler):
    """The whole data set sorted by length, cut into global batches, each cut into equal contiguous shares."""

    def rank(self, rank: int, epoch: int) -> Batches:
        order_N = np.argsort(-self.lengths_N, kind="stable")
        return [
            np.array_split(order_N[begin : begin + self.global_batch], self.num_ranks)[rank]
            for begin in range(0, len(order_N), self.global_batch)
        ]


class TorchDistributed(Sampler):
    """torch's `DistributedSampler` under a `BatchSampler`, as its documentation shows: random batches."""

    def rank(self, rank: int, epoch: int) -> Batches:
        from torch.utils.data import BatchSampler, DistributedSampler

        sampler = DistributedSampler(self.lengths, self.num_ranks, rank, shuffle=True, seed=SEED, drop_last=False)
        sampler.set_epoch(epoch)
        return list(BatchSampler(sampler, self.per_rank, drop_last=False))


class HFLengthGrouped(Sampler):
    """Hugging Face `LengthGroupedSampler`, dealt by accelerate's `BatchSamplerShard`, as Trainer does it.

    Option `split_batches` is accelerate's: the sampler then makes global batches and every rank takes a part of each; without
    it every rank takes whole batches in turn.
    """

    def rank(self, rank: int, epoch: int) -> Batches:
        return self._deal(self._order(epoch), rank)

    def all_ranks(self, epoch: int) -> list[Batches]:
        order = list(self._order(epoch))
        return [self._deal(order, rank) for rank in range(self.num_ranks)]

    @property
    def _batch(self) -> int:
        return self.global_batch if self.options.get("split_batches") else self.per_rank

    def _order(self, epoch: int) -> Any:
        import torch
        from transformers.trainer_pt_utils import LengthGroupedSampler

        # Trainer gives the sampler no generator: torch's own stream, seeded alike on all ranks, decides.
        torch.manual_seed(SEED + epoch)
        return LengthGroupedSampler(self._batch, lengths=self.lengths)

    def _deal(self, order: Any, rank: int) -> Batches:
        from accelerate.data_loader import BatchSamplerShard
        from torch.utils.data import BatchSampler

        batches = BatchSampler(order, self._batch, drop_last=False)
        split = bool(self.options.get("split_batches"))
        return list(BatchSamplerShard(batches, self.num_ranks, rank, split_batches=split, even_batches=True))


class HFDistributedLengthGrouped(Sampler):
    """Hugging Face `DistributedLengthGroupedSampler`. It gets the global batch, which suits it better than the rank's."""

    def rank(self, rank: int, epoch: int) -> Batches:
        from torch.utils.data import BatchSampler
        from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

        sampler = DistributedLengthGroupedSampler(
            self.global_batch, lengths=self.lengths, num_replicas=self.num_ranks, rank=rank, seed=SEED, drop_last=False
        )
        sampler.set_epoch(epoch)
        return list(BatchSampler(sampler, self.per_rank, drop_last=False))


class HFBatchRebalance(Sampler):
    """Hugging Face `BatchRebalanceSampler`, keeping the last batch; its quadratic cost is 0, since tokens are counted."""

    def _make(self, rank: int, epoch: int) -> Any:
        from transformers.trainer_pt_utils import BatchRebalanceSampler

        class InTokens(BatchRebalanceSampler):
            QUADRATIC_COST_COEF = 0.0

        sampler = InTokens(self.lengths, self.global_batch, self.num_ranks, grad_accum=1, seed=SEED, rank=rank, drop_last=False)
        sampler.set_epoch(epoch)
        return sampler

    def rank(self, rank: int, epoch: int) -> Batches:
        return list(self._make(rank, epoch))

    def all_ranks(self, epoch: int) -> list[Batches]:
        sampler = self._make(0, epoch)

        def all_of(batch: list[int]) -> Any:
            yield [micro_batch for (micro_batch,) in sampler._assign(batch, [sampler.lengths[i] for i in batch])]

        sampler._yield_global_batch = all_of
        return [list(batches) for batches in zip(*sampler, strict=True)]


class Lhotse(Sampler):
    """lhotse `DynamicBucketingSampler` with text examples and its token constraint, the budget given per rank.

    Options: `max_tokens` per rank, `num_buckets`, `buffer` (examples held, None: all). Buckets are estimated on all examples.
    """

    def prepare(self) -> None:
        from lhotse.cut.text import TextExample

        tokens = np.zeros(int(self.lengths_N.max()), dtype=np.uint8)
        # The tokens' values do not matter to the sampler: all examples look at one array.
        self.cuts = [TextExample(text=str(i), tokens=tokens[:length]) for i, length in enumerate(self.lengths_N)]

    def _make(self, rank: int, epoch: int) -> Any:
        from lhotse.dataset.sampling import DynamicBucketingSampler
        from lhotse.dataset.sampling.base import TokenConstraint

        sampler = DynamicBucketingSampler(
            self.cuts,
            constraint=TokenConstraint(max_tokens=self.options["max_tokens"]),
            num_buckets=self.options["num_buckets"],
            num_cuts_for_bins_estimate=len(self.cuts),
            buffer_size=self.options["buffer"] or len(self.cuts),
            shuffle=True,
            drop_last=False,
            seed=SEED,
            world_size=self.num_ranks,
            rank=rank,
        )
        sampler.set_epoch(epoch)
        return sampler

    def rank(self, rank: int, epoch: int) -> Batches:
        return [[int(cut.text) for cut in cuts] for cuts in self._make(rank, epoch)]

    def all_ranks(self, epoch: int) -> list[Batches]:
        sampler = self._make(0, epoch)
        # Every rank makes the batches of all and keeps `batches[self.rank]`; a slice keeps them all. Its own statistics
        # expect the batch of one rank.
        sampler.rank = slice(None)
        sampler._log_diagnostics = lambda batch: None
        steps = [[[int(cut.text) for cut in cuts] for cuts in step] for step in sampler]
        return [list(batches) for batches in zip(*steps, strict=True)]


SAMPLERS: dict[str, tuple[type[Sampler], dict[str, Any]]] = {
    "ours": (Ours, {}),
    "ours, window 1 (random global batches)": (Ours, {"window": 1}),
    "ours, window epoch (the limit)": (Ours, {"window": "epoch"}),
    "ours, token budget": (Ours, {"budget": True}),
    "ours, token budget, window epoch": (Ours, {"budget": True, "window": "epoch"}),
    "lhotse DynamicBucketingSampler": (Lhotse, {"num_buckets": 200, "buffer": None}),
    "HF BatchRebalanceSampler": (HFBatchRebalance, {}),
    "HF DistributedLengthGroupedSampler": (HFDistributedLengthGrouped, {}),
    "HF LengthGroupedSampler, split_batches": (HFLengthGrouped, {"split_batches": True}),
    "HF LengthGroupedSampler": (HFLengthGrouped, {}),
    "torch DistributedSampler (random)": (TorchDistributed, {}),
    "globally sorted, equal shares": (GloballySorted, {}),
}
