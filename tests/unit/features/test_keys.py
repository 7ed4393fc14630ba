"""The key of a feature cache: everything that features depend on changes it, and nothing else does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import CLASSES, toy_classifier, toy_model, toy_split

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.features import keys
from agnews_dist.features import layout as layout_module
from agnews_dist.features.keys import features_key
from agnews_dist.features.layout import Layout, lay_out, order_longest_first
from agnews_dist.model.gpt2 import Backbone, Classifier, split_model
from agnews_dist.run.fingerprints import weights_fingerprint

LENGTHS = np.random.default_rng(3).integers(1, 30, 40).tolist()
ROWS = toy_split(LENGTHS)


def table_of(rows: Any) -> TokenTable:
    return TokenTable(rows, pad_id=0, device=torch.device("cpu"))


def layout_of(table: TokenTable, call_tokens: int = 64) -> Layout:
    order = order_longest_first(table.lengths_N)
    return lay_out(table.lengths_N, [order], call_tokens=call_tokens, row_bytes=96)


def key_of(
    classifier: Classifier | None = None,
    rows: Any = ROWS,
    *,
    call_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> str:
    """Return the key that a run computes for a classifier and a split; `config`: changed fields of the model's config."""
    classifier = classifier or toy_classifier()
    classifier.config.update(config)
    table = table_of(rows)
    return features_key(
        frozen_weights=weights_fingerprint(classifier.frozen_state),
        config=classifier.config,
        num_blocks=len(classifier.prefix.h),
        table=table,
        layout=layout_of(table, call_tokens),
        dtype=dtype,
        are_means=classifier.prefix.computes_means,
    )


EXPECTED = key_of()


def test_features_key_is_the_same_for_the_same_inputs():
    assert key_of() == EXPECTED
    assert len(EXPECTED) == 64
    assert set(EXPECTED) <= set("0123456789abcdef")


def test_features_key_depends_on_the_format(monkeypatch):
    monkeypatch.setattr(keys, "FORMAT", keys.FORMAT + 1)
    assert key_of() != EXPECTED


def change_last_bit(part: str) -> Classifier:
    """Return a classifier with the smallest possible change of one number in one frozen weight."""
    classifier = toy_classifier()
    weight = classifier.frozen_state[part].view(-1)
    weight[7] = torch.nextafter(weight[7], torch.tensor(torch.inf))
    return classifier


@pytest.mark.parametrize("part", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.mlp.c_proj.weight"])
def test_features_key_depends_on_every_bit_of_the_frozen_weights(part):
    assert key_of(change_last_bit(part)) != EXPECTED


def test_features_key_depends_on_tf32_on_a_gpu_only(monkeypatch):
    matmul, bf16 = torch.backends.cuda.matmul, key_of(dtype=torch.bfloat16)
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert key_of() == EXPECTED, "a CPU has no TF32"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert key_of() != EXPECTED
        assert key_of(dtype=torch.bfloat16) == bf16
        matmul.allow_tf32 = False
        assert key_of() == EXPECTED
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_features_key_depends_on_the_freeze_boundary(blocks):
    assert key_of(toy_classifier(trainable_blocks=blocks)) != EXPECTED


def test_features_key_depends_on_the_number_of_blocks():
    """The number is hashed by itself: the fingerprint of the weights alone need not tell it."""
    table = table_of(ROWS)
    found = {
        features_key(
            frozen_weights="same",
            config=toy_classifier().config,
            num_blocks=number,
            table=table,
            layout=layout_of(table),
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
def test_features_key_depends_on_config_fields_of_the_computation(name, value):
    assert getattr(toy_classifier().config, name) != value
    assert key_of(**{name: value}) != EXPECTED


def test_features_key_depends_on_every_token():
    tokens = ROWS.tokens.copy()
    tokens[-1] += 1
    assert key_of(rows=replace(ROWS, tokens=tokens)) != EXPECTED


def test_features_key_depends_on_where_texts_begin():
    offsets = ROWS.offsets.copy()
    offsets[5] += 1
    assert offsets[5] < offsets[6], "every text still has a token"
    assert key_of(rows=replace(ROWS, offsets=offsets)) != EXPECTED


def test_features_key_depends_on_the_number_of_texts():
    fewer = replace(ROWS, offsets=ROWS.offsets[:-1], labels=ROWS.labels[:-1], tokens=ROWS.tokens[: ROWS.offsets[-2]])
    assert key_of(rows=fewer) != EXPECTED


def test_features_key_depends_on_the_type():
    assert key_of(dtype=torch.bfloat16) != EXPECTED


def test_features_key_depends_on_the_segments(monkeypatch):
    monkeypatch.setattr(layout_module, "NUM_SEGMENTS", 3)
    assert key_of() != EXPECTED


@pytest.mark.parametrize("num_segments", [1, layout_module.NUM_SEGMENTS])
def test_features_key_depends_on_the_calls(monkeypatch, num_segments):
    """One call is one matrix product, so another size of calls moves the last bits, even if the segments are the same."""
    monkeypatch.setattr(layout_module, "NUM_SEGMENTS", num_segments)
    assert key_of(call_tokens=64) != key_of(call_tokens=128)


def change_suffix() -> Classifier:
    classifier = toy_classifier()
    with torch.no_grad():
        for weight in classifier.suffix.parameters():
            weight.add_(1)
    return classifier


@pytest.mark.parametrize(
    "make",
    [
        lambda: split_model(Backbone(toy_model(), None, None), trainable_blocks=1, num_classes=CLASSES, seed=99),
        lambda: split_model(Backbone(toy_model(), None, None), trainable_blocks=1, num_classes=CLASSES + 3, seed=5),
        lambda: toy_classifier(dropout=0.3),
        change_suffix,
    ],
    ids=["another head", "more classes", "dropout", "trainable weights"],
)
def test_features_key_ignores_the_trainable_part_and_dropout(make):
    assert key_of(make()) == EXPECTED


def test_features_key_ignores_labels_and_split_names():
    assert key_of(rows=replace(ROWS, labels=(ROWS.labels + 1) % CLASSES, name="elsewhere")) == EXPECTED


def test_features_key_ignores_other_config_fields():
    assert key_of(id2label={0: "a", 1: "b"}, pad_token_id=3, initializer_range=0.5) == EXPECTED


def test_features_key_distinguishes_means_from_last_tokens():
    of_pooling = {}
    for blocks in (0, 1):
        for pooling in ("last", "mean"):
            backbone = Backbone(toy_model(), None, None)
            classifier = split_model(backbone, trainable_blocks=blocks, num_classes=CLASSES, seed=5, pooling=pooling)
            of_pooling[blocks, pooling] = key_of(classifier)
    assert of_pooling[0, "mean"] != of_pooling[0, "last"]
    assert of_pooling[1, "mean"] == of_pooling[1, "last"] == EXPECTED, "below a trained block both have the same features"
