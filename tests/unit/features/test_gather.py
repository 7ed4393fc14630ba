"""Cached features are bit for bit those that the frozen part computes, whatever the batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.data.rows import Ints
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.features.layout import assign_owners, lay_out, order_longest_first
from agnews_dist.features.precompute import SplitFeatures
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.packed import run_in_threads
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


def split_features(prefix: Prefix, table: TokenTable, groups: list[Ints]) -> SplitFeatures:
    layout = lay_out(
        table.lengths_N,
        groups,
        call_tokens=prefix.call_tokens,
        row_bytes=prefix.row_bytes,
        one_row_per_text=prefix.one_row_per_text,
    )
    return SplitFeatures(prefix, table, layout)


def cache_in_memory(split: SplitFeatures) -> CachedFeatures:
    rows, tasks = split.prepare_in_memory(CPU, split.compute_segment, lambda _: None)
    run_in_threads(tasks, CPU)
    return CachedFeatures(rows, split.layout)


def real_rows(found: Any) -> list[list[list[float]]]:
    """Return the rows of each text, without padding."""
    return [rows[:length].tolist() for rows, length in zip(found.hidden_BTD, found.lengths_B.tolist(), strict=True)]


@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_cached_features_of_an_evaluated_split_equal_uncached_ones(table, trainable_blocks):
    prefix = toy_classifier(trainable_blocks).prefix
    batches = evaluation_batches(table)
    split = split_features(prefix, table, batches)
    assert (len(batches) > 3, split.layout.num_segments > len(batches)) == (True, True), "many batches, of many calls each"
    source, reference = cache_in_memory(split), uncached_features(prefix)
    for ids in batches:
        found, expected = source(table.batch(ids)), reference(table.batch(ids))
        assert torch.equal(found.lengths_B, expected.lengths_B)
        assert real_rows(found) == real_rows(expected)
    assert bool(split.layout.rows_N.max() == 1) == (trainable_blocks == 0), "one row per text if only the last token is read"


@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_cached_features_of_a_training_batch_are_the_rows_of_its_texts(table, trainable_blocks):
    """Each text's rows are those of its call, whatever the batch. Other calls differ in the last bits."""
    prefix = toy_classifier(trainable_blocks).prefix
    split = split_features(prefix, table, [order_longest_first(table.lengths_N)])
    of_text: dict[int, list[list[float]]] = {}
    for ids in split.layout.texts:
        rows = prefix.rows(*table.pack(ids)).split(split.layout.rows_N[ids].tolist())
        of_text |= {int(row): part.tolist() for row, part in zip(ids, rows, strict=True)}
    assert len(of_text) == len(table)
    source, reference = cache_in_memory(split), uncached_features(prefix)
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 60):
        ids = rng.permutation(len(table))[:size]
        found, expected = source(table.batch(ids)), reference(table.batch(ids))
        assert real_rows(found) == [of_text[row] for row in ids.tolist()]
        assert torch.equal(found.lengths_B, expected.lengths_B)
        for cached, uncached in zip(real_rows(found), real_rows(expected), strict=True):
            assert cached == pytest.approx(np.array(uncached), abs=1e-5)
    # The control: the rows of another text are different.
    assert real_rows(source(table.batch(np.array([3])))) != real_rows(source(table.batch(np.array([4]))))


def test_cached_features_give_a_filler_row_one_row_and_change_no_other(table):
    prefix = toy_classifier().prefix
    source = cache_in_memory(split_features(prefix, table, [order_longest_first(table.lengths_N)]))
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
    order = order_longest_first(table.lengths_N)
    for rank in range(3):
        own = order[owner_N[order] == rank]
        split = split_features(prefix, table, [own])
        source, reference = cache_in_memory(split), uncached_features(prefix)
        assert split.layout.num_rows == (len(own) if trainable_blocks == 0 else int(table.lengths_N[own].sum()))
        for row in own.tolist():
            batch = table.batch(np.array([row]))
            for found, expected in zip(real_rows(source(batch)), real_rows(reference(batch)), strict=True):
                assert found == pytest.approx(np.array(expected), abs=1e-5)
        other = int(order[owner_N[order] != rank][0])
        with pytest.raises(IndexError):
            source(table.batch(np.array([other])))


def test_cached_features_without_rows_serve_filler_rows(table):
    split = split_features(toy_classifier().prefix, table, [NO_IDS])
    assert (split.layout.num_rows, split.layout.num_segments, split.num_tokens) == (0, 0, 0)
    found = cache_in_memory(split)(table.batch(NO_IDS))
    assert (found.hidden_BTD.tolist(), found.lengths_B.tolist()) == ([[[0.0] * 24]], [1])
