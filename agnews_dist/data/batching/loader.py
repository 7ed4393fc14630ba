"""Micro-batches of one rank, for training and for scoring, gathered on the device without a loop over examples."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.epoch_plan import Plan, plan
from agnews_dist.data.batching.position import fingerprint_plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import Efficiency, Share, measure_efficiency, plan_evaluation, share_batch, share_by_owner
from agnews_dist.data.rows import Ints
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World

EVALUATION_TOKENS = 8192
"""Padded tokens per scoring call. A constant, because the size of a call decides the last bits of a result."""
HASH_BYTES = 16
"""Size of a text's hash: for a billion texts, the chance that two have the same one is below 1e-20."""


class TokenTable:
    """Tokens of a split on the device. All of AG News is some 24 MB, so batches are gathered there, without workers."""

    def __init__(self, split: TokenSplit, *, pad_id: int, device: torch.device) -> None:
        self.name = split.name
        self.lengths_N: Ints = split.lengths
        self.labels_N: Ints = np.array(split.labels, dtype=np.int64)
        self._begin_N: Ints = np.array(split.offsets[:-1], dtype=np.int64)
        self._pad_id = pad_id
        # torch cannot index with uint16. int32 takes half the memory of int64.
        self._tokens = torch.from_numpy(np.asarray(split.tokens).astype(np.int32)).to(device)
        self._offsets = torch.from_numpy(np.array(split.offsets, dtype=np.int64)).to(device)
        self._labels = torch.from_numpy(self.labels_N).to(device)

    def __len__(self) -> int:
        return len(self.lengths_N)

    @cached_property
    def hashes_N(self) -> NDArray[np.void]:
        """Hash of the tokens of each text, 16 bytes: texts of equal tokens have equal hashes."""
        tokens = memoryview(self._tokens.cpu().numpy().astype("<i4").tobytes())
        bounds = [
            (begin, begin + length) for begin, length in zip(self._begin_N.tolist(), self.lengths_N.tolist(), strict=True)
        ]
        digests = (hashlib.blake2b(tokens[4 * begin : 4 * end], digest_size=HASH_BYTES).digest() for begin, end in bounds)
        return np.frombuffer(b"".join(digests), dtype=f"V{HASH_BYTES}")

    def batch(self, ids_B: Ints) -> Batch:
        """Gather the examples `ids_B`, right-padded to the longest; without ids, one filler row (see `Batch`)."""
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
        """Gather the examples `ids_B` end to end without padding; returns tokens_P on the device and the lengths."""
        lengths_B = self.lengths_N[ids_B]
        first_B = self._begin_N[ids_B] - (np.cumsum(lengths_B) - lengths_B)
        index_P = np.repeat(first_B, lengths_B) + np.arange(int(lengths_B.sum()))
        return self._tokens[torch.from_numpy(index_P).to(self._tokens.device)].long(), lengths_B.tolist()


@dataclass(frozen=True)
class StepBatches:
    """Micro-batches of one rank in one optimiser step."""

    micro_batches: tuple[Batch, ...]
    """Equal in number on all ranks."""
    num_examples: int
    """Examples of the global batch."""
    loss_divisor: float
    """Divisor of the summed loss: the class weights of the global batch's labels together; without weights `num_examples`."""
    share: Share


class TrainLoader:
    """This rank's micro-batches of the training split. Epochs and steps count from 0."""

    def __init__(
        self,
        table: TokenTable,
        world: World,
        settings: PlanSettings,
        *,
        max_tokens_per_rank: int,
        quadratic: float,
        max_length: int | None = None,
        class_weights_C: NDArray[np.float64] | None = None,
    ) -> None:
        """Prepare the plan; `max_tokens_per_rank` and `quadratic`: see `share_batch`; `max_length`: see `plan`."""
        self.class_weights_C = class_weights_C
        """Weight of each class in the loss; None: all count the same."""
        self.owner_N: Ints | None = None
        """Rank that holds each text's features, if every rank holds a part of them; None: shares of equal cost."""
        self.table, self._world, self._settings = table, world, settings
        self._max_tokens_per_rank, self._quadratic, self._max_length = max_tokens_per_rank, quadratic, max_length
        self._newest_plan: tuple[int, Plan] | None = None

    @cached_property
    def fingerprint(self) -> dict[str, int | str | None]:
        """Fingerprint of the plan, independent of the number of ranks: see `fingerprint_plan`."""
        return fingerprint_plan(self.table.lengths_N, self._settings)

    def num_steps(self, num_epochs: int, max_steps: int | None = None) -> int:
        """Count the steps of a run: `max_steps`, or those of `num_epochs` epochs, which can differ under a token budget."""
        return max_steps or sum(self.epoch_steps(epoch) for epoch in range(num_epochs))

    def epoch_steps(self, epoch: int) -> int:
        return self._plan(epoch).num_steps

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatches]:
        """Yield the steps of the epoch from `start`, without computing the earlier ones."""
        for ids in self._plan(epoch).global_batches(start):
            yield self._step_batches(ids)

    def expected_efficiency(self, max_steps: int = 1000) -> Efficiency:
        """Measure the first `max_steps` steps of the first epoch. Steps come in random order, so these stand for all."""
        return measure_efficiency(self._share(ids)[1] for ids in islice(self._plan(0).global_batches(), max_steps))

    def largest_step(self, epoch: int) -> StepBatches:
        """Find the step of the epoch with the largest micro-batch, which needs the most memory."""
        batches = list(self._plan(epoch).global_batches())
        largest = max(range(len(batches)), key=lambda step: int(self._share(batches[step])[1].tokens_MR.max()))
        return self._step_batches(batches[largest])

    def _plan(self, epoch: int) -> Plan:
        # The loop asks for the plan of its epoch at every step.
        if self._newest_plan is None or self._newest_plan[0] != epoch:
            self._newest_plan = (epoch, plan(self.table.lengths_N, self._settings, epoch=epoch, max_length=self._max_length))
        return self._newest_plan[1]

    def _share(self, ids: Ints) -> tuple[Ints, Share]:
        """Split a global batch among the ranks; returns the ids in the order of the share's slices, and the share."""
        lengths_B, num_ranks = self.table.lengths_N[ids], self._world.num_ranks
        limit, quadratic = self._max_tokens_per_rank, self._quadratic
        if self.owner_N is None:
            return ids, share_batch(lengths_B, num_ranks=num_ranks, max_tokens_per_rank=limit, quadratic=quadratic)
        order_B, share = share_by_owner(
            lengths_B, self.owner_N[ids], num_ranks=num_ranks, max_tokens_per_rank=limit, quadratic=quadratic
        )
        return ids[order_B], share

    def _step_batches(self, ids: Ints) -> StepBatches:
        weights_C = self.class_weights_C
        # Exactly rounded, so that it depends on neither the order of the examples nor the host.
        divisor = float(len(ids)) if weights_C is None else math.fsum(weights_C[self.table.labels_N[ids]])
        ids, share = self._share(ids)
        micro_batches = tuple(self.table.batch(ids[rows]) for rows in share.slices(self._world.rank))
        return StepBatches(micro_batches, len(ids), divisor, share)


def evaluation_batches(table: TokenTable) -> list[Ints]:
    """Plan the micro-batches in which a split is scored; rank r computes every R-th from number r."""
    return plan_evaluation(table.lengths_N, max_tokens=EVALUATION_TOKENS)
