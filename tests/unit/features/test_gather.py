"""Features gathered from where they are kept are those that the frozen part computes: bit for bit, whatever the batch."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.epoch_plan import Ints
from agnews_dist.data.batching.loader import TokenTable, scoring_batches
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Event, Progress, Warned
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.features.layout import Layout, lay_out, longest_first, round_robin
from agnews_dist.features.manager import FeatureCache
from agnews_dist.features.precompute import SplitFeatures
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.packed import side_by_side
from agnews_dist.model.prefix import Prefix, computed

CPU = torch.device("cpu")
LENGTHS = np.random.default_rng(1).integers(1, 40, 60).tolist()
NONE = np.empty(0, np.int64)


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """So that a batch takes many calls, and a split many segments."""
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 64)
    monkeypatch.setattr("agnews_dist.data.batching.loader.EVALUATION_TOKENS", 300)


@pytest.fixture
def table() -> TokenTable:
    return TokenTable(toy_split(LENGTHS), pad_id=0, device=CPU)


def features_of(prefix: Prefix, table: TokenTable, groups: list[Ints]) -> SplitFeatures:
    layout = lay_out(
        table.lengths_N,
        groups,
        call_tokens=prefix.call_tokens,
        row_bytes=prefix.row_bytes,
        one_row_per_text=prefix.one_row_per_text,
    )
    return SplitFeatures(prefix, table, layout)


def kept(split: SplitFeatures) -> CachedFeatures:
    rows, pieces = split.in_memory(CPU, split.segment, lambda _: None)
    side_by_side(pieces, CPU)
    return CachedFeatures(rows, split.layout)


def real(found: Any) -> list[list[list[float]]]:
    """The rows that mean something."""
    return [rows[:length].tolist() for rows, length in zip(found.hidden_BTD, found.lengths_B.tolist(), strict=True)]


@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_a_scored_split_has_the_very_bits_of_computing_at_every_use(table, trainable_blocks):
    prefix = toy_classifier(trainable_blocks).prefix
    batches = scoring_batches(table)
    split = features_of(prefix, table, batches)
    assert (len(batches) > 3, split.layout.num_segments > len(batches)) == (True, True), "many batches, of many calls"
    source, reference = kept(split), computed(prefix)
    for ids in batches:
        found, expected = source(table.batch(ids)), reference(table.batch(ids))
        assert torch.equal(found.lengths_B, expected.lengths_B)
        assert real(found) == real(expected)
    assert bool(split.layout.rows_N.max() == 1) == (trainable_blocks == 0), (
        "one row per text where the last token suffices"
    )


@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_training_batches_get_the_rows_of_each_text(table, trainable_blocks):
    """Each text's rows are those of its own call, whatever the batch; other calls give the same to rounding only."""
    prefix = toy_classifier(trainable_blocks).prefix
    split = features_of(prefix, table, [longest_first(table.lengths_N)])
    of_text: dict[int, list[list[float]]] = {}
    for ids in split.layout.texts:
        rows = prefix.rows(*table.pack(ids)).split(split.layout.rows_N[ids].tolist())
        of_text |= {int(row): part.tolist() for row, part in zip(ids, rows, strict=True)}
    assert len(of_text) == len(table)
    source, reference = kept(split), computed(prefix)
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 60):
        ids = rng.permutation(len(table))[:size]
        found, expected = source(table.batch(ids)), reference(table.batch(ids))
        assert real(found) == [of_text[row] for row in ids.tolist()]
        assert torch.equal(found.lengths_B, expected.lengths_B)
        for mine, theirs in zip(real(found), real(expected), strict=True):
            assert mine == pytest.approx(np.array(theirs), abs=1e-5)
    # The negative control: another text's rows are not these.
    assert real(source(table.batch(np.array([3])))) != real(source(table.batch(np.array([4]))))


def test_a_filler_row_costs_one_row_and_moves_no_other(table):
    prefix = toy_classifier().prefix
    source = kept(features_of(prefix, table, [longest_first(table.lengths_N)]))
    alone = source(table.batch(NONE))
    assert (tuple(alone.hidden_BTD.shape), alone.lengths_B.tolist()) == ((1, 1, 24), [1])
    assert bool(alone.hidden_BTD.isfinite().all())
    batch = table.batch(np.array([5, 6, 7]))
    with_filler = replace(batch, ids_B=torch.tensor([5, 6, -1]))
    assert real(source(with_filler))[:2] == real(source(batch))[:2]


@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_ranks_that_hold_a_part_each_hold_together_everything(table, trainable_blocks):
    prefix = toy_classifier(trainable_blocks).prefix
    owner_N = round_robin(table.lengths_N, 3)
    order = longest_first(table.lengths_N)
    for rank in range(3):
        mine = order[owner_N[order] == rank]
        split = features_of(prefix, table, [mine])
        source, reference = kept(split), computed(prefix)
        assert split.layout.num_rows == (len(mine) if trainable_blocks == 0 else int(table.lengths_N[mine].sum()))
        for row in mine.tolist():
            batch = table.batch(np.array([row]))
            for found, expected in zip(real(source(batch)), real(reference(batch)), strict=True):
                assert found == pytest.approx(np.array(expected), abs=1e-5)
        stranger = int(order[owner_N[order] != rank][0])
        with pytest.raises(IndexError):
            source(table.batch(np.array([stranger])))


def test_a_rank_that_holds_nothing_takes_part_with_filler_rows(table):
    split = features_of(toy_classifier().prefix, table, [NONE])
    assert (split.layout.num_rows, split.layout.num_segments, split.num_tokens) == (0, 0, 0)
    found = kept(split)(table.batch(NONE))
    assert (found.hidden_BTD.tolist(), found.lengths_B.tolist()) == ([[[0.0] * 24]], [1])


def check_layout(layout: Layout, lengths_N: Ints, call_tokens: int) -> None:
    texts = [row for ids in layout.texts for row in ids.tolist()]
    assert sorted(texts) == list(range(len(lengths_N)))
    assert all(len(ids) == 1 or lengths_N[ids].sum() <= call_tokens for ids in layout.texts)
    # End to end, in the order of computing; segments are whole calls and cover all.
    begin = 0
    for row in texts:
        assert layout.begin_N[row] == begin
        begin += int(layout.rows_N[row])
    assert layout.num_rows == begin
    rows = [int(layout.rows_N[np.concatenate(layout.calls(s))].sum()) for s in range(layout.num_segments)]
    assert np.cumsum([0, *rows]).tolist() == layout.bounds_S.tolist()
    assert sum(len(layout.calls(s)) for s in range(layout.num_segments)) == len(layout.texts)


@pytest.mark.parametrize("call_tokens", [1, 30, 64, 10_000])
@pytest.mark.parametrize("num_texts", [1, 2, 60, 700])
def test_a_layout_has_every_text_once_in_calls_within_the_limit(num_texts, call_tokens):
    lengths_N = np.random.default_rng(num_texts).integers(1, 40, num_texts)
    layout = lay_out(lengths_N, [longest_first(lengths_N)], call_tokens=call_tokens, row_bytes=96)
    check_layout(layout, lengths_N, call_tokens)


@pytest.mark.parametrize(
    "broken",
    [
        lambda layout: replace(layout, texts=layout.texts[:-1]),
        lambda layout: replace(layout, texts=(*layout.texts[:-2], np.concatenate(layout.texts[-2:]))),
        lambda layout: replace(layout, begin_N=layout.begin_N + 1),
        lambda layout: replace(layout, bounds_S=layout.bounds_S[[0, *range(2, len(layout.bounds_S))]]),
    ],
    ids=["a call is missing", "a call is too large", "rows lie elsewhere", "segments are no whole calls"],
)
def test_other_layouts_do_not_pass(broken):
    lengths_N = np.array([30, 30, 30, 30])
    layout = lay_out(lengths_N, [longest_first(lengths_N)], call_tokens=35, row_bytes=96)
    check_layout(layout, lengths_N, 35)
    with pytest.raises(AssertionError):
        check_layout(broken(layout), lengths_N, 35)


def test_segments_stay_below_their_size_and_small_splits_still_have_many(monkeypatch):
    lengths_N = np.full(5_000, 10)
    whole = [longest_first(lengths_N)]
    layout = lay_out(lengths_N, whole, call_tokens=40, row_bytes=100)
    assert 256 <= layout.num_segments <= 2 * 256
    monkeypatch.setattr("agnews_dist.features.layout.SEGMENT_BYTES", 8_000)
    layout = lay_out(lengths_N, whole, call_tokens=40, row_bytes=100)
    assert np.diff(layout.bounds_S).max() * 100 <= 8_000
    assert layout.num_segments == 5_000 * 10 * 100 // 8_000


def test_owners_have_every_length_evenly():
    lengths_N = np.random.default_rng(5).integers(1, 200, 1_000)
    owner_N = round_robin(lengths_N, 7)
    counts = np.bincount(owner_N, minlength=7)
    tokens = np.bincount(owner_N, weights=lengths_N, minlength=7)
    assert counts.max() - counts.min() <= 1
    assert tokens.max() - tokens.min() <= lengths_N.max()
    # The negative control: dealing in file order does not.
    unsorted = np.bincount(np.arange(1_000) % 7, weights=lengths_N, minlength=7)
    assert unsorted.max() - unsorted.min() > lengths_N.max()


# The cache of a run, in one process


def open_cache(classifier: Classifier, directory: Path, wanted: Any, *, limit_bytes: int = 10**9) -> FeatureCache:
    rng = np.random.default_rng(4)
    tables = {
        name: TokenTable(replace(toy_split(rng.integers(1, 40, size).tolist()), name=name), pad_id=0, device=CPU)
        for name, size in (("train", 50), ("validation", 40), ("test", 30))
    }
    return FeatureCache(
        classifier,
        tables,
        Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60),
        wanted=wanted,
        num_epochs=2,
        directory=directory,
        limit_bytes=limit_bytes,
        frozen_weights="a fingerprint",
        model_name="toy",
    )


@pytest.mark.parametrize("wanted", ["device", "host", "disk"])
def test_a_cache_scores_with_the_bits_of_no_cache(tmp_path, wanted):
    """The calls of a scored split end where its micro-batches end."""
    classifier, events = toy_classifier(), []
    cache, none = (open_cache(classifier, tmp_path, place) for place in (wanted, "off"))
    cache.build(events.append)
    none.build(events.append)
    assert (cache.choice.place, none.choice.place) == (wanted, "off")
    assert not [event for event in events if isinstance(event, Warned)]
    lengths = np.random.default_rng(4).integers(1, 40, 90)[50:].tolist()
    table = TokenTable(toy_split(lengths), pad_id=0, device=CPU)
    assert len(scoring_batches(table)) > 3
    for ids in scoring_batches(table):
        found, expected = (each.source("validation")(table.batch(ids)) for each in (cache, none))
        assert torch.equal(found.lengths_B, expected.lengths_B)
        assert real(found) == real(expected)


def test_progress_reaches_its_end_in_tokens_and_counts_only_what_is_done(tmp_path):
    num_tokens = 0
    for is_there in (False, True):
        events: list[Event] = []
        cache = open_cache(toy_classifier(), tmp_path, "disk")
        cache.build(events.append)
        told = [event for event in events if isinstance(event, Progress)]
        done = [event.done for event in told]
        num_tokens = num_tokens or told[0].total
        assert done == sorted(done)
        # What a former run left is no part of the rate.
        assert (done[0], done[-1]) == (num_tokens if is_there else 0, num_tokens)
        assert {(event.total, event.unit) for event in told} == {(num_tokens, "tokens")}


def test_what_fails_while_it_is_made_goes_and_the_run_goes_on(tmp_path, monkeypatch):
    """Space that runs out at the second of three files: a warning, the next place, and nothing left on the disk."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system reserves no space in advance")
    reserve, calls = os.posix_fallocate, []

    def full(handle: int, begin: int, size: int) -> None:
        calls.append(size)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(handle, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    events: list[Event] = []
    cache = open_cache(toy_classifier(), tmp_path / "features", "disk")
    assert (cache.choice.place, cache.choice.refused) == ("disk", None)
    cache.build(events.append)
    (warning,) = [event.message for event in events if isinstance(event, Warned)]
    assert warning.startswith(
        "features cannot be kept in disk (No space left on device): nothing is lost, the run goes on"
    )
    assert "Free some space, or set another --data.cache_dir or --engine.feature_cache." in warning
    assert cache.choice.place == "host"
    assert cache.choice.refused == "disk failed: kept in host instead"
    assert len(calls) == 2
    assert not list((tmp_path / "features").glob("*"))


def test_a_place_that_cannot_be_made_at_all_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    events: list[Event] = []
    cache = open_cache(toy_classifier(), tmp_path / "file" / "features", "disk")
    cache.build(events.append)
    (warning,) = [event.message for event in events if isinstance(event, Warned)]
    assert "features cannot be kept in disk (Not a directory)" in warning
    assert cache.choice.place == "host"


def test_a_wish_that_does_not_fit_is_refused_in_words(tmp_path):
    events: list[Event] = []
    cache = open_cache(toy_classifier(), tmp_path, "disk", limit_bytes=1000)
    cache.build(events.append)
    (warning,) = [event.message for event in events if isinstance(event, Warned)]
    assert warning.startswith("engine.feature_cache disk: ")
    assert warning.endswith("exceed engine.feature_cache_gigabytes (1 kB): kept in host instead.")


def test_what_is_computed_at_every_use_is_said_to_be(tmp_path):
    plain = toy_classifier()
    plain.use_fast_path(False)
    for classifier, why in (
        (plain, "the plain path computes them at every step"),
        (toy_classifier(trainable_blocks=3), "nothing is frozen but the embeddings"),
    ):
        cache = open_cache(classifier, tmp_path, "auto")
        assert (cache.choice.place, cache.choice.why) == ("off", why)
        cache.build(lambda _: None)
        assert cache.owner_N is None
    assert not list(tmp_path.iterdir())
