"""Forecast: its figures equal those counted over the planned steps; its warning about small batches is true."""

import json

import numpy as np
import pytest

from agnews_dist.data.batching import forecast as module
from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.forecast import Forecast, forecast, warn_of_idle_ranks
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import Efficiency, share_batch
from agnews_dist.errors import UserError

QUADRATIC = 1 / 768


def make_lengths(num: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(3.9, 0.4, num), 1, 200).astype(np.int64)


def make_forecast(lengths: np.ndarray, settings: PlanSettings, *, ranks: int, epochs: int = 2, tokens: int = 300) -> Forecast:
    return forecast(lengths, settings, num_epochs=epochs, num_ranks=ranks, max_tokens_per_rank=tokens, quadratic=QUADRATIC)


def rows_by_rank(lengths: np.ndarray, settings: PlanSettings, *, ranks: int, epochs: int, tokens: int) -> list[list[list]]:
    """Compute step -> rank -> lengths of the rows of each micro-batch, as a training computes them."""
    found = []
    for epoch in range(epochs):
        for ids in plan(lengths, settings, epoch=epoch).global_batches():
            share = share_batch(lengths[ids], num_ranks=ranks, max_tokens_per_rank=tokens, quadratic=QUADRATIC)
            found.append([[lengths[ids[rows]] for rows in share.slices(rank)] for rank in range(ranks)])
    return found


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize(
    "settings",
    [
        PlanSettings(global_batch_size=24, bucket_window=4),
        PlanSettings(global_batch_size=5, bucket_window=1, seed=3),
        PlanSettings(global_token_budget=700, bucket_window="epoch"),
        PlanSettings(global_token_budget=201),
    ],
    ids=["examples", "few", "tokens", "few tokens"],
)
def test_forecast_counts_every_step_of_the_training(settings: PlanSettings, ranks: int) -> None:
    lengths = make_lengths(331)
    steps = rows_by_rank(lengths, settings, ranks=ranks, epochs=2, tokens=300)
    padded = np.array([[sum(max(rows.max(initial=0) * len(rows), 1) for rows in rank) for rank in step] for step in steps])
    rows_of = np.array([[sum(map(len, rank)) for rank in step] for step in steps])
    real_of = np.array([sum(int(rows.sum()) for rank in step for rows in rank) for step in steps])
    micro_of = np.array([len(step[0]) for step in steps])
    found = make_forecast(lengths, settings, ranks=ranks)
    assert real_of.sum() == 2 * lengths.sum() == 2 * found.num_tokens
    assert found.efficiency.padding == real_of.sum() / padded.sum()
    assert found.efficiency.critical_path == real_of.sum() / (ranks * padded.max(axis=1).sum())
    assert found.efficiency.rank_balance == pytest.approx(padded.mean(axis=1).sum() / padded.max(axis=1).sum())
    assert found.idle_share == (rows_of == 0).mean()
    for spread, figures in (
        (found.examples_per_step, rows_of.sum(axis=1)),
        (found.tokens_per_step, real_of),
        (found.micro_batches_per_step, micro_of),
    ):
        assert spread == (figures.min(), pytest.approx(figures.mean()), figures.max())
    assert found.num_steps == found.num_steps_measured == len(steps)
    assert found.num_steps_per_epoch == np.cumsum(real_of).tolist().index(lengths.sum()) + 1
    assert (found.num_examples, found.longest) == (331, lengths.max())


def test_forecast_cases_include_several_micro_batches_and_idle_ranks() -> None:
    """Control of the test above."""
    lengths = make_lengths(331)
    assert make_forecast(lengths, PlanSettings(global_batch_size=24), ranks=1).micro_batches_per_step.min > 1
    assert make_forecast(lengths, PlanSettings(global_batch_size=5), ranks=8).idle_share > 0.3


def test_forecast_of_equal_lengths_by_hand() -> None:
    same = np.full(64, 10)
    even = make_forecast(same, PlanSettings(global_batch_size=16), ranks=8)
    assert even.efficiency == Efficiency(1, 1, 1)
    assert even.idle_share == 0
    # 4 rows of 10 tokens and 4 filler rows of 1: 40 real tokens of 44, while every rank waits for 10.
    few = make_forecast(same, PlanSettings(global_batch_size=4), ranks=8)
    assert (few.efficiency.critical_path, few.efficiency.padding) == (0.5, 40 / 44)
    assert few.idle_share == 0.5


def test_forecast_measures_the_first_steps_of_a_long_training(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "share_batch", lambda *args, **kwargs: calls.append(1) or share_batch(*args, **kwargs))
    monkeypatch.setattr(module, "MAX_STEPS", 20)
    lengths, settings = make_lengths(331), PlanSettings(global_batch_size=24)
    found = make_forecast(lengths, settings, ranks=2, epochs=5000)
    assert len(calls) == 20
    assert (found.num_steps_per_epoch, found.num_steps, found.num_steps_measured) == (14, 14 * 5000, 20)
    first = rows_by_rank(lengths, settings, ranks=2, epochs=2, tokens=300)[:20]
    padded = [[sum(int(rows.max()) * len(rows) for rows in rank) for rank in step] for step in first]
    real = sum(int(rows.sum()) for step in first for rank in step for rows in rank)
    assert found.efficiency.padding == real / np.sum(padded)


def test_forecast_ends_where_max_steps_end() -> None:
    lengths, settings = make_lengths(331), PlanSettings(global_token_budget=700)
    options = {"num_epochs": 1, "num_ranks": 3, "max_tokens_per_rank": 300, "quadratic": QUADRATIC}
    longer = forecast(lengths, settings, max_steps=60, **options)
    assert (longer.num_steps, longer.num_steps_measured) == (60, 60)
    steps = rows_by_rank(lengths, settings, ranks=3, epochs=3, tokens=300)[:60]
    assert longer.num_steps_per_epoch < 60 < 3 * longer.num_steps_per_epoch, "the second or third epoch is cut"
    assert longer.tokens_per_step.mean == np.mean([sum(int(rows.sum()) for rank in step for rows in rank) for step in steps])


def test_forecast_counts_steps_that_differ_between_epochs() -> None:
    lengths, settings = make_lengths(331), PlanSettings(global_token_budget=300, bucket_window=8)
    steps = [sum(1 for _ in plan(lengths, settings, epoch=epoch).global_batches()) for epoch in range(8)]
    assert len(set(steps)) > 1
    found = make_forecast(lengths, settings, ranks=2, epochs=8)
    assert (found.num_steps, found.num_steps_per_epoch) == (sum(steps), steps[0])


@pytest.mark.parametrize(
    "lengths", [make_lengths(331), np.array([7]), np.array([3, 3, 3]), np.append(make_lengths(500), 199_999)]
)
def test_histogram_holds_every_text_once(lengths: np.ndarray) -> None:
    bins = make_forecast(lengths, PlanSettings(), ranks=1, tokens=10**6).histogram
    assert bins[0].first == lengths.min()
    assert bins[-1].last == lengths.max()
    assert [each.first for each in bins[1:]] == [each.last + 1 for each in bins[:-1]]
    for first, last, num_texts in bins:
        assert num_texts == ((lengths >= first) & (lengths <= last)).sum()
    assert sum(each.num_texts for each in bins) == len(lengths)
    assert len(bins) <= module.NUM_BINS + 1


def test_histogram_keeps_its_shape_with_one_very_long_text() -> None:
    bins = make_forecast(np.append(make_lengths(500), 199_999), PlanSettings(), ranks=1, tokens=10**6).histogram
    assert max(each.num_texts for each in bins) < 250


def test_forecast_without_texts_has_no_steps() -> None:
    found = make_forecast(np.empty(0, np.int64), PlanSettings(), ranks=4)
    assert (found.num_steps, found.num_steps_measured, found.num_tokens, found.longest) == (0, 0, 0, 0)
    assert (found.idle_share, found.histogram, found.tokens_per_step) == (0, (), (0, 0, 0))
    assert found.efficiency.critical_path == 1.0


def test_forecast_raises_the_errors_of_the_plan() -> None:
    with pytest.raises(UserError, match=r"max_tokens_per_rank 8 is below the longest text \(9 tokens\).*Raise batch"):
        make_forecast(np.array([9, 1]), PlanSettings(), ranks=1, tokens=8)
    with pytest.raises(UserError, match=r"example 0 has 9 tokens, more than the maximum of 8.*Truncate it"):
        forecast(np.array([9, 1]), PlanSettings(), num_epochs=1, num_ranks=1, max_tokens_per_rank=99, quadratic=0, max_length=8)


@pytest.mark.parametrize(
    ("settings", "decides", "absent"),
    [
        (PlanSettings(global_batch_size=24), ("global_batch_size", 24), "global_token_budget"),
        (PlanSettings(global_token_budget=900), ("global_token_budget", 900), "global_batch_size"),
    ],
)
def test_forecast_to_dict_is_strict_json(settings: PlanSettings, decides: tuple[str, int], absent: str) -> None:
    found = make_forecast(make_lengths(331), settings, ranks=3)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (read[decides[0]], read[absent]) == (decides[1], None)
    assert read["critical_path_efficiency"] == found.efficiency.critical_path
    assert not {"critical_path_limit", "critical_path_random", "critical_path_equal_counts"} & set(read)
    assert read["tokens_per_step"] == found.tokens_per_step._asdict()
    assert read["length_histogram"][0] == found.histogram[0]._asdict()
    assert read["plan_fingerprint"]["num_examples"] == read["num_examples"] == 331


# --- warn_of_idle_ranks


def test_idle_warning_for_fewer_rows_than_ranks() -> None:
    assert warn_of_idle_ranks(PlanSettings(global_batch_size=4), num_examples=10_000, num_ranks=8) == (
        "batch.global_batch_size 4 on 8 ranks: 4 of 8 ranks compute a filler row at every step, 50% of the machine waits. "
        "Raise batch.global_batch_size to 8 or more, or use at most 4 ranks."
    )
    almost = warn_of_idle_ranks(PlanSettings(global_batch_size=63), num_examples=10_000, num_ranks=64)
    assert almost is not None
    assert "1 of 64 ranks compute a filler row at every step, 2% of the machine waits" in almost


def test_idle_warning_for_rows_that_do_not_divide_among_the_ranks() -> None:
    warning = warn_of_idle_ranks(PlanSettings(global_batch_size=10), num_examples=10_000, num_ranks=8)
    assert warning is not None
    assert warning.startswith("batch.global_batch_size 10 on 8 ranks: ")
    assert "ranks with fewer than 2 rows of similar length wait, up to 38% of the machine." in warning
    assert warning.endswith("Set batch.global_batch_size to a multiple of 8, such as 16.")
    # The plan of texts of one length confirms the figure.
    same = make_forecast(np.full(80, 50), PlanSettings(global_batch_size=10), ranks=8)
    assert same.efficiency.critical_path == 1 - 0.375


def test_idle_warning_for_a_token_budget_uses_the_measured_balance() -> None:
    settings = PlanSettings(global_token_budget=201)
    balance = make_forecast(make_lengths(331), settings, ranks=8).efficiency.rank_balance
    warning = warn_of_idle_ranks(settings, num_examples=10_000, num_ranks=8, rank_balance=balance)
    assert warning is not None
    assert warning.startswith("batch.global_token_budget 201 on 8 ranks: ")
    assert f", {1 - balance:.0%} of the machine waits. Raise batch.global_token_budget, or use fewer ranks." in warning
    assert balance < 0.8
    # A token budget replaces the batch size, which is then not judged.
    assert (
        warn_of_idle_ranks(PlanSettings(global_token_budget=99, global_batch_size=1), num_examples=10_000, num_ranks=8) is None
    )


@pytest.mark.parametrize("settings", [PlanSettings(), PlanSettings(global_token_budget=9000)], ids=["examples", "tokens"])
def test_idle_warning_for_fewer_texts_than_ranks(settings: PlanSettings) -> None:
    assert warn_of_idle_ranks(settings, num_examples=6, num_ranks=8, rank_balance=0.7) == (
        "6 training texts on 8 ranks: 2 of 8 ranks compute a filler row at every step, 25% of the machine waits. "
        "Use at most 6 ranks."
    )
    assert make_forecast(make_lengths(6), settings, ranks=8, tokens=9000).idle_share == 0.25


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (8, 8), (32, 8), (256, 8), (250, 8), (4096, 64)])
def test_idle_warning_is_silent_for_batches_that_fit(size: int, ranks: int) -> None:
    assert warn_of_idle_ranks(PlanSettings(global_batch_size=size), num_examples=10_000, num_ranks=ranks) is None
    assert (
        warn_of_idle_ranks(PlanSettings(global_token_budget=size), num_examples=10_000, num_ranks=ranks, rank_balance=0.97)
        is None
    )
