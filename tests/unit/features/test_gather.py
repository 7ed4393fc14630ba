"""Cached features are bit for bit those that the frozen part computes, whatever the batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.data.rows import Ints
from agnews_dist.distributed.world import World
from agnews_dist.events import ignore_event
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.filling import Work, fill, plan_work
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.features.layout import assign_owners
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.prefix import Prefix, uncached_features

CPU = torch.device("cpu")
LENGTHS = np.random.default_rng(1).integers(1, 40, 60).tolist()
NO_IDS = np.empty(0, np.int64)


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """Make calls so small that a batch takes many, and a split many segments."""
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 64)
    monkeypatch.setattr("agnews_dist.data.batching.loader.EVALUATION_TOKENS", 300)


@pytest.fixture
def table() -> TokenTable:
    return TokenTable(toy_split(LENGTHS), pad_id=0, device=CPU)


def cache_in_memory(prefix: Prefix, table: TokenTable, chosen: Ints | None = None) -> tuple[CachedFeatures, Work]:
    rows = None if chosen is None else {table.name: chosen}
    texts = DistinctTexts({table.name: table}, one_row_per_text=prefix.one_row_per_text, chosen=rows)
    work = plan_work(texts, [], prefix, copies=True)
    written = fill(work, None, prefix, memory=CPU, world=World(), emit=ignore_event)
    return work.source(table.name, written), work


def real_rows(found: Any) -> list[list[list[float]]]:
    """Return the rows of each text, without padding."""
    return [rows[:length].tolist() for rows, length in zip(found.hidden_BTD, found.lengths_B.tolist(), strict=True)]


@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_cached_features_equal_uncached_ones(table, trainable_blocks):
    """A text's rows have the same bits in every call, so any batch has the same features with and without a cache."""
    prefix = toy_classifier(trainable_blocks).prefix
    source, work = cache_in_memory(prefix, table)
    reference = uncached_features(prefix)
    batches = evaluation_batches(table)
    assert (len(batches) > 3, work.layout.num_segments > len(batches)) == (True, True), "many batches, of many calls each"
    rng = np.random.default_rng(0)
    for ids in [*batches, *(rng.permutation(len(table))[:size] for size in (1, 2, 7, 60))]:
        found, expected = source(table.batch(ids)), reference(table.batch(ids))
        assert torch.equal(found.lengths_B, expected.lengths_B)
        assert real_rows(found) == real_rows(expected)
    assert bool(found.lengths_B.max() == 1) == (trainable_blocks == 0), "one row per text if only the last token is read"
    # The control: the rows of another text are different.
    assert real_rows(source(table.batch(np.array([3])))) != real_rows(source(table.batch(np.array([4]))))


@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_features_do_not_depend_on_the_size_of_the_calls_beyond_rounding(table, monkeypatch, trainable_blocks):
    """Control: a product of another shape may have other last bits, so all calls of a cache have one."""
    prefix = toy_classifier(trainable_blocks).prefix
    small = cache_in_memory(prefix, table)[0]
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 512)
    large = cache_in_memory(prefix, table)[0]
    batch = table.batch(np.arange(len(table)))
    for found, expected in zip(real_rows(small(batch)), real_rows(large(batch)), strict=True):
        assert found == pytest.approx(np.array(expected), abs=1e-5)


def test_cached_features_give_a_filler_row_one_row_and_change_no_other(table):
    prefix = toy_classifier().prefix
    source, _ = cache_in_memory(prefix, table)
    alone = source(table.batch(NO_IDS))
    assert (tuple(alone.hidden_BTD.shape), alone.lengths_B.tolist()) == ((1, 1, 24), [1])
    assert bool(alone.hidden_BTD.isfinite().all())
    batch = table.batch(np.array([5, 6, 7]))
    with_filler = replace(batch, ids_B=torch.tensor([5, 6, -1]))
    assert real_rows(source(with_filler))[:2] == real_rows(source(batch))[:2]


@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_sharded_caches_contain_every_text_once(table, trainable_blocks):
    prefix = toy_classifier(trainable_blocks).prefix
    owner_N = assign_owners(table.lengths_N, 3)
    for rank in range(3):
        own = np.flatnonzero(owner_N == rank)
        (source, work), reference = cache_in_memory(prefix, table, own), uncached_features(prefix)
        assert work.layout.num_rows == (len(own) if trainable_blocks == 0 else int(table.lengths_N[own].sum()))
        for row in own.tolist():
            batch = table.batch(np.array([row]))
            assert real_rows(source(batch)) == real_rows(reference(batch))
        other = int(np.flatnonzero(owner_N != rank)[0])
        with pytest.raises(IndexError):
            source(table.batch(np.array([other])))


def test_cached_features_without_rows_serve_filler_rows(table):
    source, work = cache_in_memory(toy_classifier().prefix, table, NO_IDS)
    assert (work.layout.num_rows, work.layout.num_segments, work.texts.num_tokens) == (0, 0, 0)
    found = source(table.batch(NO_IDS))
    assert (found.hidden_BTD.tolist(), found.lengths_B.tolist()) == ([[[0.0] * 24]], [1])


def test_cached_features_of_several_parts_are_those_of_one(table):
    source, _ = cache_in_memory(toy_classifier().prefix, table)
    (rows,), begin_N, rows_N = source._parts, source._begin_N.numpy(), table.lengths_N.astype(np.int64)
    part_N = np.arange(len(table)) % 3
    parts = CachedFeatures([rows, rows.clone(), rows.clone()], part_N=part_N, begin_N=begin_N, rows_N=rows_N)
    for number in (1, 2):
        parts._parts[number] += number
    batch = replace(table.batch(np.arange(9)), ids_B=torch.tensor([3, 1, 2, 5, 4, 8, 6, 7, -1]))
    found, expected = parts(batch), source(batch)
    assert torch.equal(found.lengths_B, expected.lengths_B)
    added = torch.tensor([0, 1, 2, 2, 1, 2, 0, 1, 0])
    assert torch.equal(found.hidden_BTD, expected.hidden_BTD + added[:, None, None])
