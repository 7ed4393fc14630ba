"""What a plan will cost, known before any job: steps, padding, balance of the ranks, and what would change it. Pure numpy.

The first steps of the training are dealt out as the training will deal them, so the figures are those of its result. Global
batches come in random order: where there are very many, the first ones stand for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.epoch_plan import Plan, PlanSettings, plan, shuffle
from agnews_dist.data.batching.position import fingerprint
from agnews_dist.data.batching.shares import Efficiency, Share, Tally, efficiency, share

MAX_STEPS = 12_000
"""Steps dealt out at most: three epochs of AG News in batches of 32, in a second."""
MAX_STEPS_COMPARED = 1_000
"""The same for the plans compared with: a sample, good for two decimals."""
NUM_BINS = 8
"""Of equal width; one more takes the longest hundredth of the texts."""
WAITING_WORTH_A_WARNING = 0.05


class Spread(NamedTuple):
    """Of a figure over the steps; zeros when there is no step."""

    min: int
    mean: float
    max: int


class Bin(NamedTuple):
    """Texts of `first` to `last` tokens, both included."""

    first: int
    last: int
    num_texts: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is known of a training's batches before it starts."""

    settings: PlanSettings
    num_ranks: int
    max_tokens_per_rank: int
    num_epochs: int
    num_examples: int
    """Per epoch."""
    num_tokens: int
    """Real ones, per epoch."""
    longest: int
    num_steps_per_epoch: int
    """Of the first epoch; with a token budget the others may have some more or less."""
    num_steps: int
    """Of all epochs."""
    num_steps_dealt: int
    """How many steps, from the first on, the figures below are measured over: all, up to `MAX_STEPS`."""
    efficiency: Efficiency
    idle_share: float
    """Share of the (step, rank) pairs without a row: that rank computes a filler row and waits."""
    examples_per_step: Spread
    tokens_per_step: Spread
    """Real ones."""
    micro_batches_per_step: Spread
    limit: Efficiency
    """With bucket_window 'epoch': what longer windows could still gain, since no split of a batch has a cheaper largest slice.
    It can be the lower one where a batch does not divide among the ranks: equal rows are then the hardest to deal out."""
    random: Efficiency
    """With bucket_window 1: random batches, split as ours are."""
    equal_counts: Efficiency
    """Random batches, the same number of rows on every rank: what a plain distributed sampler gives."""
    histogram: tuple[Bin, ...]
    plan_fingerprint: dict[str, int | str | None]

    def to_dict(self) -> dict[str, object]:
        """The object that `--json` prints, all but what the lengths do not tell."""
        settings, figures = self.settings, self.efficiency
        return {
            "critical_path_efficiency": figures.critical_path,
            "padding_efficiency": figures.padding,
            "rank_balance": figures.rank_balance,
            "critical_path_limit": self.limit.critical_path,
            "critical_path_random": self.random.critical_path,
            "critical_path_equal_counts": self.equal_counts.critical_path,
            "idle_share": self.idle_share,
            "num_steps": self.num_steps,
            "num_steps_per_epoch": self.num_steps_per_epoch,
            "num_steps_dealt": self.num_steps_dealt,
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
) -> Forecast:
    """Plan a training on `num_ranks` ranks; see `plan` for `max_length`, `share` for `max_tokens_per_rank` and `quadratic`.

    Raises:
        UserError: what `plan` and `share` refuse.
    """

    def epochs(chosen: PlanSettings) -> Iterator[Plan]:
        return (plan(lengths_N, chosen, epoch=epoch, max_length=max_length) for epoch in range(num_epochs))

    def dealt(chosen: PlanSettings, max_steps: int) -> Iterator[Share]:
        batches = chain.from_iterable(epoch.global_batches() for epoch in epochs(chosen))
        return (
            share(lengths_N[ids], num_ranks=num_ranks, max_tokens_per_rank=max_tokens_per_rank, quadratic=quadratic)
            for ids in islice(batches, max_steps)
        )

    def compared(window: int | Literal["epoch"]) -> Efficiency:
        other = replace(settings, bucket_window=window)
        return figures if other == settings else efficiency(dealt(other, MAX_STEPS_COMPARED))

    steps_E = [epoch.num_steps for epoch in epochs(settings)]
    tally, num_idle = Tally(), 0
    examples_K: list[int] = []
    tokens_K: list[int] = []
    micro_batches_K: list[int] = []
    for each in dealt(settings, MAX_STEPS):
        tally.add(each)
        num_idle += _num_idle(each)
        examples_K.append(int(each.bounds_S[-1]))
        tokens_K.append(each.num_real_tokens)
        micro_batches_K.append(each.num_micro_batches)
    figures, examples = tally.efficiency, _spread(examples_K)
    return Forecast(
        settings=settings,
        num_ranks=num_ranks,
        max_tokens_per_rank=max_tokens_per_rank,
        num_epochs=num_epochs,
        num_examples=len(lengths_N),
        num_tokens=int(lengths_N.sum(dtype=np.int64)),
        longest=int(lengths_N.max(initial=0)),
        num_steps_per_epoch=steps_E[0],
        num_steps=sum(steps_E),
        num_steps_dealt=len(examples_K),
        efficiency=figures,
        idle_share=num_idle / max(1, len(examples_K) * num_ranks),
        examples_per_step=examples,
        tokens_per_step=_spread(tokens_K),
        micro_batches_per_step=_spread(micro_batches_K),
        limit=compared("epoch"),
        random=compared(1),
        equal_counts=_equal_counts(lengths_N, max(1, round(examples.mean)), num_ranks=num_ranks, seed=settings.seed),
        histogram=tuple(_histogram(lengths_N)),
        plan_fingerprint=fingerprint(lengths_N, settings),
    )


def idle_warning(
    settings: PlanSettings, *, num_examples: int, num_ranks: int, rank_balance: float | None = None
) -> str | None:
    """Which part of the machine waits for the rest because the batches are too small for it; None where it is little.

    `num_examples`: of an epoch; they can be fewer than a batch is to have. A batch size tells by itself; of a token budget it
    must be measured: `rank_balance`, as in `Forecast.efficiency`.
    """
    size, budget = settings.global_batch_size, settings.global_token_budget
    if num_examples < num_ranks and (budget is not None or num_examples < size):
        idle = num_ranks - num_examples
        return (
            f"{num_examples} training texts on {num_ranks} ranks: {idle} of {num_ranks} ranks compute a filler row at every "
            f"step, {idle / num_ranks:.0%} of the machine waits. Use no more than {num_examples} of the ranks."
        )
    if budget is not None:
        if rank_balance is None or 1 - rank_balance < WAITING_WORTH_A_WARNING:
            return None
        return (
            f"batch.global_token_budget {budget} on {num_ranks} ranks: a step has too few texts to deal out evenly, "
            f"{1 - rank_balance:.0%} of the machine waits. Raise batch.global_token_budget, or use fewer ranks."
        )
    most = -(-size // num_ranks)
    waiting = 1 - size / (most * num_ranks)
    if size < num_ranks:
        idle = num_ranks - size
        return (
            f"batch.global_batch_size {size} on {num_ranks} ranks: {idle} of {num_ranks} ranks compute a filler row at every "
            f"step, {waiting:.0%} of the machine waits. Raise batch.global_batch_size to {num_ranks} or more, or use no more "
            f"than {size} of the ranks."
        )
    if waiting < WAITING_WORTH_A_WARNING:
        return None
    return (
        f"batch.global_batch_size {size} on {num_ranks} ranks: texts of one batch are of similar length, so ranks with "
        f"{most} rows hold up those with fewer, and up to {waiting:.0%} of the machine waits. Set batch.global_batch_size to "
        f"a multiple of {num_ranks}, such as {most * num_ranks}."
    )


def _num_idle(dealt: Share) -> int:
    """Ranks that have no row in any micro-batch."""
    num_micro, num_ranks = dealt.tokens_MR.shape
    has_rows_R = (np.diff(dealt.bounds_S).reshape(num_micro, num_ranks) > 0).any(axis=0)
    return num_ranks - int(np.count_nonzero(has_rows_R))


def _spread(values: Sequence[int]) -> Spread:
    return Spread(min(values), sum(values) / len(values), max(values)) if values else Spread(0, 0.0, 0)


def _equal_counts(lengths_N: NDArray[Any], batch_size: int, *, num_ranks: int, seed: int) -> Efficiency:
    """Of one epoch at most; a rank without a row computes one token."""
    shuffled_N = lengths_N[shuffle(len(lengths_N), np.random.PCG64(seed))][: batch_size * MAX_STEPS_COMPARED]
    begin_K = np.arange(0, len(shuffled_N), batch_size)
    rows_K = np.minimum(batch_size, len(shuffled_N) - begin_K)
    bounds_KR = begin_K[:, None] + rows_K[:, None] * np.arange(num_ranks + 1) // num_ranks
    rows_KR, longest_KR = np.diff(bounds_KR), np.zeros((len(begin_K), num_ranks), np.int64)
    if len(shuffled_N):
        longest_KR[rows_KR > 0] = np.maximum.reduceat(shuffled_N, bounds_KR[:, :-1][rows_KR > 0])
    tokens_KR = np.maximum(rows_KR * longest_KR, 1)
    slowest = int(tokens_KR.max(axis=1).sum()) * num_ranks
    return Tally(int(shuffled_N.sum(dtype=np.int64)), int(tokens_KR.sum()), slowest).efficiency


def _histogram(lengths_N: NDArray[Any]) -> list[Bin]:
    """Bins of equal width from the shortest text to the 99th percentile, and one for the rest, lest a few long texts leave
    all others in one bin."""
    if not len(lengths_N):
        return []
    shortest, longest = int(lengths_N.min()), int(lengths_N.max())
    width = max(1, -(-(int(np.percentile(lengths_N, 99)) - shortest + 1) // NUM_BINS))
    bin_N = np.minimum((lengths_N - shortest) // width, NUM_BINS)
    counts = np.bincount(bin_N).tolist()
    firsts = [shortest + i * width for i in range(len(counts))]
    lasts = [*(first - 1 for first in firsts[1:]), longest]
    return [Bin(*each) for each in zip(firsts, lasts, counts, strict=True)]
