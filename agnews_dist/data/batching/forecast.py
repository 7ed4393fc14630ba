"""Forecast of a training's batches before any job: steps, padding, balance of the ranks. Pure numpy.

The first steps are planned and shared exactly as the training will do it, so the figures equal those of its result. Global
batches come in random order: in a long training the first ones stand for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.epoch_plan import Plan, plan
from agnews_dist.data.batching.position import fingerprint_plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import Efficiency, Tally, share_batch

MAX_STEPS = 12_000
"""Maximum of steps that are measured: three epochs of AG News in batches of 32, in a second."""
NUM_BINS = 8
"""Bins of equal width in the histogram; one more holds the longest hundredth of the texts."""
MIN_WAITING = 0.05
"""Share of the machine that must wait before a warning."""


class Spread(NamedTuple):
    """Range and mean of a figure over the steps; zeros without steps."""

    min: int
    mean: float
    max: int


class Bin(NamedTuple):
    """Number of texts of `first` to `last` tokens, both included."""

    first: int
    last: int
    num_texts: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Figures of a training's batches."""

    settings: PlanSettings
    num_ranks: int
    max_tokens_per_rank: int
    num_epochs: int
    num_examples: int
    """Texts per epoch."""
    num_tokens: int
    """Real tokens per epoch."""
    longest: int
    """Tokens of the longest text."""
    num_steps_per_epoch: int
    """Steps of the first epoch; under a token budget the number varies between epochs."""
    num_steps: int
    """Steps of the whole training."""
    num_steps_measured: int
    """First steps over which the figures below are measured: all, up to `MAX_STEPS`."""
    efficiency: Efficiency
    idle_share: float
    """Share of the (step, rank) pairs without a text: that rank computes a filler row and waits."""
    examples_per_step: Spread
    tokens_per_step: Spread
    """Real tokens of all ranks."""
    micro_batches_per_step: Spread
    histogram: tuple[Bin, ...]
    plan_fingerprint: dict[str, int | str | None]

    def to_dict(self) -> dict[str, object]:
        """Return the object of `plan --json`, except for the keys that the lengths do not determine."""
        settings = self.settings
        return {
            "critical_path_efficiency": self.efficiency.critical_path,
            "padding_efficiency": self.efficiency.padding,
            "rank_balance": self.efficiency.rank_balance,
            "idle_share": self.idle_share,
            "num_steps": self.num_steps,
            "num_steps_per_epoch": self.num_steps_per_epoch,
            "num_steps_dealt": self.num_steps_measured,
            "num_epochs": self.num_epochs,
            "num_examples": self.num_examples,
            "num_tokens": self.num_tokens,
            "longest": self.longest,
            "num_ranks": self.num_ranks,
            "global_batch_size": settings.global_batch_size if settings.global_token_budget is None else None,
            "global_token_budget": settings.global_token_budget,
            "bucket_window": settings.bucket_window,
            "max_tokens_per_rank": self.max_tokens_per_rank,
            "examples_per_step": self.examples_per_step._asdict(),
            "tokens_per_step": self.tokens_per_step._asdict(),
            "micro_batches_per_step": self.micro_batches_per_step._asdict(),
            "length_histogram": [texts._asdict() for texts in self.histogram],
            "plan_fingerprint": self.plan_fingerprint,
        }


def forecast(
    lengths_N: NDArray[Any],
    settings: PlanSettings,
    *,
    num_epochs: int,
    num_ranks: int,
    max_tokens_per_rank: int,
    quadratic: float,
    max_length: int | None = None,
    max_steps: int | None = None,
) -> Forecast:
    """Forecast a training; `max_length`: see `plan`; `max_tokens_per_rank` and `quadratic`: see `share_batch`.

    `max_steps`: all steps, in about `num_epochs` epochs; None: those of `num_epochs` epochs.

    Raises:
        UserError: errors of `plan` and `share_batch`.
    """

    def epoch_plans() -> Iterator[Plan]:
        # A generator, because every Plan that was asked for a batch holds the order of all examples.
        epochs = range(num_epochs) if max_steps is None else count()
        return (plan(lengths_N, settings, epoch=epoch, max_length=max_length) for epoch in epochs)

    num_steps = max_steps or sum(each.num_steps for each in epoch_plans())
    tally, num_idle = Tally(), 0
    examples_K: list[int] = []
    tokens_K: list[int] = []
    micro_batches_K: list[int] = []
    for ids in islice(chain.from_iterable(each.global_batches() for each in epoch_plans()), min(MAX_STEPS, num_steps)):
        share = share_batch(lengths_N[ids], num_ranks=num_ranks, max_tokens_per_rank=max_tokens_per_rank, quadratic=quadratic)
        tally.add(share)
        has_rows_MR = np.diff(share.bounds_S).reshape(share.tokens_MR.shape) > 0
        num_idle += int(np.count_nonzero(~has_rows_MR.any(axis=0)))
        examples_K.append(len(ids))
        tokens_K.append(share.num_real_tokens)
        micro_batches_K.append(share.num_micro_batches)
    return Forecast(
        settings=settings,
        num_ranks=num_ranks,
        max_tokens_per_rank=max_tokens_per_rank,
        num_epochs=num_epochs,
        num_examples=len(lengths_N),
        num_tokens=int(lengths_N.sum(dtype=np.int64)),
        longest=int(lengths_N.max(initial=0)),
        num_steps_per_epoch=next(epoch_plans()).num_steps,
        num_steps=num_steps,
        num_steps_measured=len(examples_K),
        efficiency=tally.efficiency,
        idle_share=num_idle / max(1, len(examples_K) * num_ranks),
        examples_per_step=_spread(examples_K),
        tokens_per_step=_spread(tokens_K),
        micro_batches_per_step=_spread(micro_batches_K),
        histogram=tuple(_count_lengths(lengths_N)),
        plan_fingerprint=fingerprint_plan(lengths_N, settings),
    )


def warn_of_idle_ranks(
    settings: PlanSettings, *, num_examples: int, num_ranks: int, rank_balance: float | None = None
) -> str | None:
    """Warn if batches are too small for the number of ranks; None if little of the machine waits.

    `num_examples`: examples per epoch, which can be fewer than a batch should have. A token budget is judged by `rank_balance`,
    measured as in `Forecast.efficiency`.
    """
    size, budget = settings.global_batch_size, settings.global_token_budget
    if num_examples < num_ranks and (budget is not None or num_examples < size):
        idle = num_ranks - num_examples
        return (
            f"{num_examples} training texts on {num_ranks} ranks: {idle} of {num_ranks} ranks compute a filler row at every "
            f"step, {idle / num_ranks:.0%} of the machine waits. Use at most {num_examples} ranks."
        )
    if budget is not None:
        if rank_balance is None or 1 - rank_balance < MIN_WAITING:
            return None
        return (
            f"batch.global_token_budget {budget} on {num_ranks} ranks: too few texts per step for an even split, "
            f"{1 - rank_balance:.0%} of the machine waits. Raise batch.global_token_budget, or use fewer ranks."
        )
    most = -(-size // num_ranks)
    waiting = 1 - size / (most * num_ranks)
    if size < num_ranks:
        idle = num_ranks - size
        return (
            f"batch.global_batch_size {size} on {num_ranks} ranks: {idle} of {num_ranks} ranks compute a filler row at every "
            f"step, {waiting:.0%} of the machine waits. Raise batch.global_batch_size to {num_ranks} or more, or use at most "
            f"{size} ranks."
        )
    if waiting < MIN_WAITING:
        return None
    return (
        f"batch.global_batch_size {size} on {num_ranks} ranks: ranks with fewer than {most} rows of similar length wait, up to "
        f"{waiting:.0%} of the machine. Set batch.global_batch_size to a multiple of {num_ranks}, such as {most * num_ranks}."
    )


def _spread(values: Sequence[int]) -> Spread:
    return Spread(min(values), sum(values) / len(values), max(values)) if values else Spread(0, 0.0, 0)


def _count_lengths(lengths_N: NDArray[Any]) -> list[Bin]:
    """Count texts in bins of equal width up to the 99th percentile, and in one bin for the rest.

    Without that percentile a few long texts would push all others into one bin.
    """
    if not len(lengths_N):
        return []
    shortest, longest = int(lengths_N.min()), int(lengths_N.max())
    width = max(1, -(-(int(np.percentile(lengths_N, 99)) - shortest + 1) // NUM_BINS))
    bin_N = np.minimum((lengths_N - shortest) // width, NUM_BINS)
    counts = np.bincount(bin_N).tolist()
    firsts = [shortest + i * width for i in range(len(counts))]
    lasts = [*(first - 1 for first in firsts[1:]), longest]
    return [Bin(*each) for each in zip(firsts, lasts, counts, strict=True)]
