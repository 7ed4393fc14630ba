"""A rank's view of the plan: token arrays on the device, cut into padded micro-batches without a loop over examples."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.epoch_plan import Ints, Plan, PlanSettings, plan
from agnews_dist.data.batching.position import fingerprint
from agnews_dist.data.batching.shares import Efficiency, Share, efficiency, plan_evaluation, share, share_by_owner
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World


class TokenTable:
    """A split's tokens on the device: all of AG News is some 24 MB, so batches are gathered there, without workers."""

    def __init__(self, split: TokenSplit, *, pad_id: int, device: torch.device) -> None:
        self.name = split.name
        self.lengths_N: Ints = split.lengths
        self.labels_N: Ints = np.array(split.labels, dtype=np.int64)
        self._begin_N: Ints = np.array(split.offsets[:-1], dtype=np.int64)
        self._pad_id = pad_id
        # torch cannot index with uint16; int32 halves what int64 would take.
        self._tokens = torch.from_numpy(np.asarray(split.tokens).astype(np.int32)).to(device)
        self._offsets = torch.from_numpy(np.array(split.offsets, dtype=np.int64)).to(device)
        self._labels = torch.from_numpy(self.labels_N).to(device)

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens and where each text begins."""
        digest = hashlib.sha256(self._tokens.cpu().numpy().tobytes())
        digest.update(self._begin_N.tobytes())
        return digest.hexdigest()

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

    def pack(self, ids_B: Ints) -> tuple[Tensor, list[int]]:
        """The examples `ids_B` end to end without padding: tokens_P on the device, and their lengths."""
        lengths_B = self.lengths_N[ids_B]
        first_B = self._begin_N[ids_B] - (np.cumsum(lengths_B) - lengths_B)
        index_P = np.repeat(first_B, lengths_B) + np.arange(int(lengths_B.sum()))
        return self._tokens[torch.from_numpy(index_P).to(self._tokens.device)].long(), lengths_B.tolist()


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimiser step."""

    micro_batches: tuple[Batch, ...]
    """The same number on every rank."""
    num_examples: int
    """Examples of the global batch: the divisor of the loss."""
    share: Share


class TrainLoader:
    """The training split dealt to this rank, one epoch at a time; epochs and steps count from 0."""

    def __init__(
        self,
        table: TokenTable,
        world: World,
        settings: PlanSettings,
        *,
        max_tokens_per_rank: int,
        quadratic: float,
        max_length: int | None = None,
    ) -> None:
        """`max_tokens_per_rank`, `quadratic`: see `share`; `max_length`: see `plan`."""
        self.owner_N: Ints | None = None
        """The rank that holds each text's features, where each rank holds a part; None: shares of equal cost."""
        self._table, self._world, self._settings = table, world, settings
        self._max_tokens_per_rank, self._quadratic, self._max_length = max_tokens_per_rank, quadratic, max_length

    @cached_property
    def fingerprint(self) -> dict[str, int | str | None]:
        """Of the plan, whatever the number of ranks: see `position.fingerprint`."""
        return fingerprint(self._table.lengths_N, self._settings)

    def num_steps(self, num_epochs: int) -> int:
        """Steps of so many epochs; with a token budget epochs may differ in theirs."""
        return sum(self._plan(epoch).num_steps for epoch in range(num_epochs))

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatches]:
        """The epoch's steps in order, from `start` on; no batch before it is made."""
        for ids in self._plan(epoch).global_batches(start):
            yield self._deal(ids)

    def expected_efficiency(self, max_steps: int = 1000) -> Efficiency:
        """Of the first epoch, or of its first steps where it has more: they come in random order and stand for all."""
        return efficiency(self._share(ids) for ids in islice(self._plan(0).global_batches(), max_steps))

    def largest_step(self, epoch: int) -> StepBatches:
        """The step with the largest micro-batch of the epoch: what needs the most memory."""
        batches = list(self._plan(epoch).global_batches())
        largest = max(range(len(batches)), key=lambda step: int(self._share(batches[step]).tokens_MR.max()))
        return self._deal(batches[largest])

    def _plan(self, epoch: int) -> Plan:
        return plan(self._table.lengths_N, self._settings, epoch=epoch, max_length=self._max_length)

    def _share(self, ids: Ints) -> Share:
        return self._dealt(ids)[1]

    def _dealt(self, ids: Ints) -> tuple[Ints, Share]:
        """The ids in the order of the share's slices, and the share."""
        lengths_B, num_ranks = self._table.lengths_N[ids], self._world.num_ranks
        limit, quadratic = self._max_tokens_per_rank, self._quadratic
        if self.owner_N is None:
            return ids, share(lengths_B, num_ranks=num_ranks, max_tokens_per_rank=limit, quadratic=quadratic)
        order_B, dealt = share_by_owner(
            lengths_B, self.owner_N[ids], num_ranks=num_ranks, max_tokens_per_rank=limit, quadratic=quadratic
        )
        return ids[order_B], dealt

    def _deal(self, ids: Ints) -> StepBatches:
        ids, dealt = self._dealt(ids)
        mine = dealt.slices(self._world.rank)
        return StepBatches(tuple(self._table.batch(ids[rows]) for rows in mine), len(ids), dealt)


def scoring_batches(table: TokenTable) -> list[Ints]:
    """The micro-batches in which a split is scored, rank r those from r on in steps of the number of ranks."""
    return plan_evaluation(table.lengths_N, max_tokens=EVALUATION_TOKENS)


# Padded tokens per scoring call. A constant: a knob would let the hardware decide the last bits of a result.
EVALUATION_TOKENS = 8192
