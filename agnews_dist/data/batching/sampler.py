"""The plan as a batch sampler for a plain torch DataLoader, for training loops that want this part alone."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from agnews_dist.data.batching.epoch_plan import Plan, plan
from agnews_dist.data.batching.position import fingerprint, load_position, save_position
from agnews_dist.data.batching.settings import Lengths, PlanSettings, as_lengths, chunks
from agnews_dist.data.batching.shares import share
from agnews_dist.errors import UserError


class MicroBatch(NamedTuple):
    """What one rank computes at once, and its place in the epoch."""

    ids: list[int]
    """Indices into the data set, longest example first; none where this rank's share of the step is empty."""
    step: int
    """The optimiser step it belongs to, from 0 in every epoch."""
    num_examples: int
    """Examples of the step's global batch, over all ranks: the divisor of the loss."""
    is_last: bool
    """Whether the step's gradients are complete after it, on every rank alike."""


class LengthBucketedBatchSampler(Sampler[list[int]]):
    """This rank's micro-batches of every epoch, as lists of indices for `DataLoader(dataset, batch_sampler=...)`.

    At every optimiser step the ranks together get the plan's global batch: the same examples on any number of ranks, every
    example once per epoch. A rank's share has the number of examples that makes its padded cost equal to the others', and all
    ranks get the same number of micro-batches. One without examples is `[]`: `collate_fn` must make a filler row of it, because
    torch's own fails there while the other ranks wait.

    >>> two_ranks = [
    ...     LengthBucketedBatchSampler([9, 1, 1, 1, 5], num_ranks=2, rank=rank, settings=PlanSettings(global_batch_size=4))
    ...     for rank in range(2)
    ... ]
    >>> [list(sampler) for sampler in two_ranks]
    [[[4], [0]], [[3, 1, 2], []]]

    A loop whose gradients are those of the mean loss over the global batch. `dataset[i]` is a tensor of tokens and a label;
    `save` keeps the position beside the weights, and `sampler.load_state_dict` takes it back before `train`::

        import contextlib

        import torch
        from torch.nn.functional import cross_entropy
        from torch.nn.parallel import DistributedDataParallel
        from torch.nn.utils.rnn import pad_sequence
        from torch.utils.data import DataLoader


        def collate(rows):
            tokens, labels = zip(*rows or [(torch.tensor([0]), 0)])  # an empty share: any one valid row, weighted 0 below
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
                    # DDP averages over the ranks: x num_ranks makes that a sum.
                    scale = num_ranks / micro.num_examples if micro.ids else 0.0
                    with contextlib.nullcontext() if micro.is_last else model.no_sync():
                        loss = cross_entropy(model(tokens_BT, lengths_B), labels_B, reduction="sum") * scale
                        loss.backward()
                    if micro.is_last:
                        optimizer.step()
                        optimizer.zero_grad()
                        save(sampler.state_dict(micro.step + 1))

    Epochs are named, never counted: a second iteration without `set_epoch` is an error. Repeating the epoch in silence would
    keep one order for ever, and counting iterations would part the ranks as soon as one of them takes a look at a batch.

    The DataLoader's workers fetch ahead, so the loop alone knows where training stands: it gives the step to `state_dict`, and
    `micro_batches` goes beside the DataLoader, in the same order (leave `in_order` at True). The data are dealt out here: do
    not pass the DataLoader to `accelerator.prepare`, and set Lightning's `use_distributed_sampler` to False.
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
        """Nothing but `rank` may differ between the ranks.

        Args:
            lengths: tokens of `dataset[i]`.
            num_ranks: processes that train together.
            rank: which of them this is, from 0.
            settings: what decides the global batches.
            accumulation: the least number of micro-batches per step.
            max_tokens_per_rank: padded tokens of a micro-batch at most; steps get more micro-batches where they need them.
            quadratic: see `share`.

        Raises:
            UserError: a rank that is none, and what `plan` and `share` refuse.
        """
        if not 0 <= rank < num_ranks:
            raise UserError(
                f"rank {rank} of {num_ranks}: it would get no share, or another's. Set rank from 0 to num_ranks - 1."
            )
        self._lengths = as_lengths(lengths)
        self._rank, self._settings = rank, settings
        self._share = partial(
            share,
            num_ranks=num_ranks,
            accumulation=accumulation,
            max_tokens_per_rank=max_tokens_per_rank,
            quadratic=quadratic,
        )
        self._micro_batches_per_step = accumulation if max_tokens_per_rank is None else None
        self._move(0, 0)
        # What `share` refuses is refused here, not at the step that has the longest example, hours from now.
        longest = max((int(chunk.max()) for _, chunk in chunks(self._lengths)), default=1) if max_tokens_per_rank else 1
        self._share(np.array([longest]))

    @property
    def epoch(self) -> int:
        """The epoch of the next or current iteration, from 0."""
        return self._epoch

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the epoch, those before a loaded position included; epochs differ only with a token budget."""
        return self._plan.num_steps

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, whole; of the epoch of a loaded position, what that left.

        Raises:
            UserError: an epoch below 0.
        """
        if epoch < 0:
            raise UserError(f"epoch {epoch}: there is no plan for it. Count epochs from 0.")
        if epoch != self._epoch:
            self._move(epoch, 0)
        self._begun = False

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position after `step` optimiser steps of the current epoch, JSON-ready; valid on any number of ranks.

        Raises:
            UserError: the epoch has fewer steps.
        """
        _check_step(step, self.num_steps)
        return save_position(self._epoch, step, self._fingerprint)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where `state` was saved. An epoch that was over by then is followed by the next.

        Raises:
            UserError: not a position, or one of another plan; names what differs.
        """
        epoch, step = load_position(state, self._fingerprint)
        num_steps = plan(self._lengths, self._settings, epoch=epoch).num_steps
        _check_step(step, num_steps)
        self._move(*((epoch + 1, 0) if step == num_steps > 0 else (epoch, step)))

    def __len__(self) -> int:
        """Micro-batches of the next or current iteration, equal on all ranks. With `max_tokens_per_rank` the first call plans
        the whole epoch."""
        if self._micro_batches_per_step is not None:
            return (self.num_steps - self._start) * self._micro_batches_per_step
        if self._length is None:
            batches = self._plan.global_batches(self._start)
            self._length = sum(self._share(self._lengths[ids]).num_micro_batches for ids in batches)
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's micro-batches.

        Raises:
            UserError: the second time for one `set_epoch`.
        """
        # A generator, so that only the first `next` counts: a DataLoader with workers makes two iterators and uses one.
        if self._begun:
            raise UserError(
                f"epoch {self._epoch} is iterated a second time: the same batches would come in the same order. "
                f"Call set_epoch({self._epoch + 1}) before the next epoch, or set_epoch({self._epoch}) to repeat this one."
            )
        self._begun = True
        for micro_batch in self.micro_batches():
            yield micro_batch.ids

    def micro_batches(self) -> Iterator[MicroBatch]:
        """What the iteration of this epoch yields, in its order, with what the loop must know to get the gradients right."""
        return self._micro_batches(self._plan, self._start)

    def _micro_batches(self, epoch_plan: Plan, start: int) -> Iterator[MicroBatch]:
        for step, ids in enumerate(epoch_plan.global_batches(start), start):
            slices = self._share(self._lengths[ids]).slices(self._rank)
            for number, rows in enumerate(slices, 1):
                yield MicroBatch(ids[rows].tolist(), step, len(ids), number == len(slices))

    def _move(self, epoch: int, step: int) -> None:
        self._epoch, self._start = epoch, step
        self._plan = plan(self._lengths, self._settings, epoch=epoch)
        self._begun = False
        self._length: int | None = None

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self._lengths, self._settings)


def _check_step(step: int, num_steps: int) -> None:
    if not 0 <= step <= num_steps:
        raise UserError(
            f"step {step} of an epoch of {num_steps} steps: no position can be there. "
            "Give the number of steps done in this epoch, not since the start of training."
        )
