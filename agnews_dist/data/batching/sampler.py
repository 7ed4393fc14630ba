"""The plan as a batch sampler for a torch DataLoader, for training loops other than this package's."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from agnews_dist.data.batching.epoch_plan import Plan, plan
from agnews_dist.data.batching.position import fingerprint_plan, load_position, save_position
from agnews_dist.data.batching.settings import Lengths, PlanSettings, as_lengths, iterate_chunks
from agnews_dist.data.batching.shares import share_batch
from agnews_dist.errors import UserError


class MicroBatch(NamedTuple):
    """Examples of one forward pass of one rank, and their step."""

    ids: list[int]
    """Indices into the data set, longest example first; empty if this rank has no example."""
    step: int
    """Optimiser step, from 0 in every epoch."""
    num_examples: int
    """Examples of the global batch, over all ranks: the divisor of the summed loss."""
    is_last: bool
    """True for the last micro-batch of the step, on every rank."""


class LengthBucketedBatchSampler(Sampler[list[int]]):
    """Batch sampler of one rank: micro-batches as lists of indices, for `DataLoader(dataset, batch_sampler=...)`.

    At every optimiser step the ranks together get the plan's global batch. It holds the same examples on any number of ranks,
    and every example comes once per epoch. Ranks get unequal numbers of examples at equal padded cost, and equal numbers of
    micro-batches. A micro-batch without examples is `[]`. `collate_fn` must make a filler row of it: torch's own fails, and the
    other ranks would wait.

    >>> two_ranks = [
    ...     LengthBucketedBatchSampler([9, 1, 1, 1, 5], num_ranks=2, rank=rank, settings=PlanSettings(global_batch_size=4))
    ...     for rank in range(2)
    ... ]
    >>> [list(sampler) for sampler in two_ranks]
    [[[4], [0]], [[3, 1, 2], []]]

    This loop computes the gradients of the mean loss over the global batch. `dataset[i]` is a tensor of tokens and a label.
    `save` stores the position with the weights; `sampler.load_state_dict` restores it before `train`::

        import contextlib

        import torch
        from torch.nn.functional import cross_entropy
        from torch.nn.parallel import DistributedDataParallel
        from torch.nn.utils.rnn import pad_sequence
        from torch.utils.data import DataLoader


        def collate(rows):
            tokens, labels = zip(*rows or [(torch.tensor([0]), 0)])  # no example: any valid row, weighted 0 below
            lengths_B = torch.tensor([len(row) for row in tokens])
            return pad_sequence(tokens, batch_first=True), lengths_B, torch.tensor(labels)


        def train(model, optimizer, dataset, sampler, num_epochs, save):
            num_ranks = torch.distributed.get_world_size()
            model = DistributedDataParallel(model)
            loader = DataLoader(
                dataset, batch_sampler=sampler, collate_fn=collate, num_workers=2, persistent_workers=True
            )
            for epoch in range(sampler.epoch, num_epochs):
                sampler.set_epoch(epoch)
                for (tokens_BT, lengths_B, labels_B), micro in zip(loader, sampler.micro_batches(), strict=True):
                    # DDP averages over the ranks; x num_ranks makes it a sum.
                    scale = num_ranks / micro.num_examples if micro.ids else 0.0
                    with contextlib.nullcontext() if micro.is_last else model.no_sync():
                        loss = cross_entropy(model(tokens_BT, lengths_B), labels_B, reduction="sum") * scale
                        loss.backward()
                    if micro.is_last:
                        optimizer.step()
                        optimizer.zero_grad()
                        save(sampler.state_dict(micro.step + 1))

    Call `set_epoch` before every iteration: a second iteration without it is an error. Repeating the epoch would keep one order
    for ever. Counting iterations would desynchronise the ranks when one of them looks at a batch.

    The DataLoader's workers fetch ahead, so only the loop knows the current step: it passes the step to `state_dict`. Iterate
    `micro_batches` in parallel with the DataLoader, and leave `in_order` at True. This class already shards the data: do not
    pass the DataLoader to `accelerator.prepare`, and set Lightning's `use_distributed_sampler` to False.
    """

    def __init__(
        self,
        lengths: Lengths | Sequence[int] | Tensor,
        *,
        num_ranks: int,
        rank: int,
        settings: PlanSettings,
        accumulation: int = 1,
        max_tokens_per_rank: int | None = None,
        quadratic: float = 0.0,
    ) -> None:
        """Plan epoch 0. All arguments except `rank` must be equal on all ranks.

        `lengths`: tokens of `dataset[i]`. `accumulation`, `max_tokens_per_rank` and `quadratic`: see `share_batch`.

        Raises:
            UserError: `rank` is out of range; errors of `plan` and `share_batch`.
        """
        if not 0 <= rank < num_ranks:
            raise UserError(f"rank {rank} of {num_ranks}: out of range. Set rank from 0 to num_ranks - 1.")
        self._lengths = as_lengths(lengths)
        self._rank, self._settings = rank, settings
        self._share = partial(
            share_batch,
            num_ranks=num_ranks,
            accumulation=accumulation,
            max_tokens_per_rank=max_tokens_per_rank,
            quadratic=quadratic,
        )
        self._micro_batches_per_step = accumulation if max_tokens_per_rank is None else None
        self._seek(0, 0)
        # Check the arguments of `share_batch` now, not hours later at the step with the longest example.
        maxima = (int(chunk.max()) for _, chunk in iterate_chunks(self._lengths)) if max_tokens_per_rank else ()
        self._share(np.array([max(maxima, default=1)]))

    @property
    def epoch(self) -> int:
        """Epoch of the current or next iteration, from 0."""
        return self._epoch

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the epoch, including those before a loaded position. They differ only under a token budget."""
        return self._plan.num_steps

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. The epoch of a loaded position continues there.

        Raises:
            UserError: an epoch below 0.
        """
        if epoch < 0:
            raise UserError(f"epoch {epoch}: must be at least 0. Count epochs from 0.")
        if epoch != self._epoch:
            self._seek(epoch, 0)
        self._has_begun = False

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the position after `step` steps of the current epoch, ready for JSON, valid on any number of ranks.

        Raises:
            UserError: `step` is out of range.
        """
        _check_step(step, self.num_steps)
        return save_position(self._epoch, step, self._fingerprint)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position from `state_dict`: the next iteration begins there, or at the next epoch if that one was over.

        Raises:
            UserError: `state` is not a position, or belongs to another plan; names the fields that differ.
        """
        epoch, step = load_position(state, self._fingerprint)
        num_steps = plan(self._lengths, self._settings, epoch=epoch).num_steps
        _check_step(step, num_steps)
        self._seek(*((epoch + 1, 0) if step == num_steps > 0 else (epoch, step)))

    def __len__(self) -> int:
        """Return the micro-batches of the current or next iteration, equal on all ranks.

        With `max_tokens_per_rank` the first call plans the whole epoch.
        """
        if self._micro_batches_per_step is not None:
            return (self.num_steps - self._start) * self._micro_batches_per_step
        if self._length is None:
            batches = self._plan.global_batches(self._start)
            self._length = sum(self._share(self._lengths[ids]).num_micro_batches for ids in batches)
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's micro-batches.

        Raises:
            UserError: a second iteration without `set_epoch`.
        """
        # A generator runs at the first `next`: a DataLoader with workers makes two iterators and uses one.
        if self._has_begun:
            raise UserError(
                f"epoch {self._epoch} is iterated a second time: the same batches would come in the same order. "
                f"Call set_epoch({self._epoch + 1}) before the next epoch, or set_epoch({self._epoch}) to repeat this one."
            )
        self._has_begun = True
        for micro_batch in self.micro_batches():
            yield micro_batch.ids

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the iteration in its order, with the step and divisor of each."""
        return self._micro_batches(self._plan, self._start)

    def _micro_batches(self, epoch_plan: Plan, start: int) -> Iterator[MicroBatch]:
        for step, ids in enumerate(epoch_plan.global_batches(start), start):
            slices = self._share(self._lengths[ids]).slices(self._rank)
            for number, rows in enumerate(slices, 1):
                yield MicroBatch(ids[rows].tolist(), step, len(ids), number == len(slices))

    def _seek(self, epoch: int, step: int) -> None:
        self._epoch, self._start = epoch, step
        self._plan = plan(self._lengths, self._settings, epoch=epoch)
        self._has_begun = False
        self._length: int | None = None

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint_plan(self._lengths, self._settings)


def _check_step(step: int, num_steps: int) -> None:
    if not 0 <= step <= num_steps:
        raise UserError(
            f"step {step} of an epoch of {num_steps} steps: out of range. "
            "Give the number of steps done in this epoch, not since the start of training."
        )
