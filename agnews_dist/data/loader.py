"""A rank's view of the plan: token arrays on the device, cut into padded micro-batches without a loop over examples."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agnews_dist.batch import Batch
from agnews_dist.data.batching import Ints, Share, num_steps_per_epoch, plan_epoch, share
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.world import World


class TokenTable:
    """A split's tokens on the device: all of AG News is some 24 MB, so batches are gathered there, without workers."""

    def __init__(self, split: TokenSplit, *, pad_id: int, device: torch.device) -> None:
        self.name = split.name
        self.lengths_N: Ints = split.lengths
        self.labels_N: Ints = np.array(split.labels, dtype=np.int64)
        self._pad_id = pad_id
        # torch cannot index with uint16; int32 halves what int64 would take.
        self._tokens = torch.from_numpy(np.asarray(split.tokens).astype(np.int32)).to(device)
        self._offsets = torch.from_numpy(np.array(split.offsets, dtype=np.int64)).to(device)
        self._labels = torch.from_numpy(self.labels_N).to(device)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def batch(self, ids_B: Ints) -> Batch:
        """The examples `ids_B`, right-padded to the longest; for no ids, one valid filler row of weight 0.

        The filler exists because Hugging Face's blocks refuse a batch of 0 rows while the other ranks would wait.
        """
        device = self._tokens.device
        if not len(ids_B):
            one = torch.ones(1, dtype=torch.int64, device=device)
            filler_BT = torch.full((1, 1), self._pad_id, dtype=torch.int64, device=device)
            return Batch(filler_BT, one, one - 1, torch.zeros(1, device=device), one - 2)
        ids = torch.from_numpy(np.array(ids_B)).to(device)
        begin_B = self._offsets[ids]
        lengths_B = self._offsets[ids + 1] - begin_B
        column_T = torch.arange(int(self.lengths_N[ids_B].max()), device=device)
        is_real_BT = column_T < lengths_B[:, None]
        index_BT: Tensor = torch.where(is_real_BT, begin_B[:, None] + column_T, 0)
        tokens_BT = torch.where(is_real_BT, self._tokens[index_BT].long(), self._pad_id)
        return Batch(tokens_BT, lengths_B, self._labels[ids], torch.ones(len(ids_B), device=device), ids)


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimiser step."""

    micro_batches: tuple[Batch, ...]
    """The same number on every rank."""
    num_examples: int
    """Examples of the global batch: the divisor of the loss."""
    share: Share


class TrainLoader:
    """The training split dealt to this rank, one epoch at a time."""

    def __init__(
        self,
        table: TokenTable,
        world: World,
        *,
        global_batch_size: int,
        max_tokens_per_rank: int,
        bucket_window: int,
        seed: int,
    ) -> None:
        self._table, self._world = table, world
        self._global_batch_size, self._bucket_window, self._seed = global_batch_size, bucket_window, seed
        self._max_tokens_per_rank = max_tokens_per_rank
        self.num_steps_per_epoch = num_steps_per_epoch(len(table), global_batch_size)

    def steps(self, epoch: int) -> Iterator[StepBatches]:
        """The epoch's steps in order; epochs count from 0."""
        lengths_N = self._table.lengths_N
        plan = plan_epoch(
            lengths_N,
            global_batch_size=self._global_batch_size,
            bucket_window=self._bucket_window,
            seed=self._seed,
            epoch=epoch,
        )
        for step in range(plan.num_steps):
            ids = plan.global_batch(step)
            dealt = share(
                lengths_N[ids], num_ranks=self._world.num_ranks, max_tokens_per_rank=self._max_tokens_per_rank
            )
            mine = (row[self._world.rank] for row in dealt.slices)
            yield StepBatches(tuple(self._table.batch(ids[begin:end]) for begin, end in mine), len(ids), dealt)
