"""The key of a feature cache: everything that features are a function of changes it, and nothing else does."""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import CLASSES, toy_classifier, toy_model, toy_split

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.features import keys
from agnews_dist.features import layout as calls
from agnews_dist.features.keys import features_key
from agnews_dist.features.layout import lay_out, longest_first
from agnews_dist.model.gpt2 import Backbone, Classifier, split
from agnews_dist.run.fingerprints import fingerprint_of

LENGTHS = np.random.default_rng(3).integers(1, 30, 40).tolist()
ROWS = toy_split(LENGTHS)


def key_of(
    classifier: Classifier | None = None,
    rows: Any = ROWS,
    *,
    call_tokens: int = 64,
    row_bytes: int = 96,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> str:
    """As a run makes it, of a classifier and a split."""
    classifier = classifier or toy_classifier()
    classifier.config.update(config)
    table = TokenTable(rows, pad_id=0, device=torch.device("cpu"))
    layout = lay_out(table.lengths_N, [longest_first(table.lengths_N)], call_tokens=call_tokens, row_bytes=row_bytes)
    return features_key(
        frozen_weights=fingerprint_of(classifier.frozen_state),
        config=classifier.config,
        num_blocks=len(classifier.prefix.h),
        table=table,
        layout=layout,
        dtype=dtype,
    )


EXPECTED = key_of()


def test_equal_things_have_one_key():
    assert key_of() == EXPECTED
    assert len(EXPECTED) == 64
    assert set(EXPECTED) <= set("0123456789abcdef")


def with_one_bit_more(part: str) -> Classifier:
    """The smallest change there is in one of the frozen weights."""
    classifier = toy_classifier()
    weight = classifier.frozen_state[part].view(-1)
    weight[7] = torch.nextafter(weight[7], torch.tensor(torch.inf))
    return classifier


@pytest.mark.parametrize(
    "part", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.mlp.c_proj.weight"]
)
def test_the_last_bit_of_one_frozen_weight_counts(part):
    assert key_of(with_one_bit_more(part)) != EXPECTED


def test_products_rounded_to_tf32_count_where_there_are_any(monkeypatch):
    matmul, bf16 = torch.backends.cuda.matmul, key_of(dtype=torch.bfloat16)
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert key_of() == EXPECTED, "a CPU has none"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert key_of() != EXPECTED
        assert key_of(dtype=torch.bfloat16) == bf16
        matmul.allow_tf32 = False
        assert key_of() == EXPECTED
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_the_freeze_boundary_counts(blocks):
    assert key_of(toy_classifier(trainable_blocks=blocks)) != EXPECTED


def test_the_number_of_blocks_counts_beside_their_weights():
    """A block whose output is added nowhere could have the weights' fingerprint of none: the number stands for itself."""
    table = TokenTable(ROWS, pad_id=0, device=torch.device("cpu"))
    layout = lay_out(table.lengths_N, [longest_first(table.lengths_N)], call_tokens=64, row_bytes=96)
    found = {
        features_key(
            frozen_weights="same",
            config=toy_classifier().config,
            num_blocks=number,
            table=table,
            layout=layout,
            dtype=torch.float32,
        )
        for number in (1, 2)
    }
    assert len(found) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("n_inner", 48),
        ("n_head", 4),
    ],
)
def test_how_the_weights_are_read_counts(name, value):
    assert getattr(toy_classifier().config, name) != value
    assert key_of(**{name: value}) != EXPECTED


def test_one_token_counts():
    tokens = ROWS.tokens.copy()
    tokens[-1] += 1
    assert key_of(rows=replace(ROWS, tokens=tokens)) != EXPECTED


def test_where_a_text_begins_counts():
    offsets = ROWS.offsets.copy()
    offsets[5] += 1
    assert offsets[5] < offsets[6], "every text still has a token"
    assert key_of(rows=replace(ROWS, offsets=offsets)) != EXPECTED


def test_one_text_less_counts():
    fewer = replace(ROWS, offsets=ROWS.offsets[:-1], labels=ROWS.labels[:-1], tokens=ROWS.tokens[: ROWS.offsets[-2]])
    assert key_of(rows=fewer) != EXPECTED


def test_the_type_counts():
    assert key_of(dtype=torch.bfloat16) != EXPECTED


def test_what_is_stored_and_checked_together_counts(monkeypatch):
    monkeypatch.setattr(calls, "NUM_SEGMENTS", 3)
    assert key_of() != EXPECTED


@pytest.mark.parametrize("num_segments", [1, calls.NUM_SEGMENTS])
def test_what_is_computed_together_counts(monkeypatch, num_segments):
    """Texts of a call are computed in one matrix product, so another size of calls moves the last bits: even where the
    segments are the same."""
    monkeypatch.setattr(calls, "NUM_SEGMENTS", num_segments)
    assert key_of(call_tokens=64) != key_of(call_tokens=128)


@pytest.mark.parametrize("module", ["layout", "last_token", "packed", "prefix"])
def test_the_code_that_computes_features_counts(monkeypatch, module):
    original = inspect.getsource

    def edited(thing: Any) -> str:
        return original(thing) + ("\n" if thing.__name__.endswith(f".{module}") else "")

    monkeypatch.setattr(inspect, "getsource", edited)
    assert key_of() != EXPECTED


def test_other_code_does_not(monkeypatch):
    original = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: original(thing) + ("" if thing in keys._CODE else "\n"))
    assert key_of() == EXPECTED


def with_other_suffix() -> Classifier:
    classifier = toy_classifier()
    with torch.no_grad():
        for weight in classifier.suffix.parameters():
            weight.add_(1)
    return classifier


@pytest.mark.parametrize(
    "make",
    [
        lambda: split(Backbone(toy_model(), None, None), trainable_blocks=1, num_classes=CLASSES, seed=99),
        lambda: split(Backbone(toy_model(), None, None), trainable_blocks=1, num_classes=CLASSES + 3, seed=5),
        lambda: toy_classifier(dropout=0.3),
        with_other_suffix,
    ],
    ids=["another head", "more classes", "dropout", "what trains"],
)
def test_what_does_not_reach_the_features_does_not_count(make):
    assert key_of(make()) == EXPECTED


def test_labels_and_names_do_not_count():
    assert key_of(rows=replace(ROWS, labels=(ROWS.labels + 1) % CLASSES, name="elsewhere")) == EXPECTED


def test_what_a_config_says_of_the_run_does_not_count():
    assert key_of(id2label={0: "a", 1: "b"}, pad_token_id=3, initializer_range=0.5) == EXPECTED
