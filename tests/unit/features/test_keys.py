"""The key of a feature cache: everything that features depend on changes it, and nothing else does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import CLASSES, toy_classifier, toy_model, toy_split

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.features import keys
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.keys import frozen_key, piece_key
from agnews_dist.features.piece_index import PieceIndex
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.gpt2 import Backbone, Classifier, split_model
from agnews_dist.run.fingerprints import weights_fingerprint

ROWS = toy_split(np.random.default_rng(3).integers(1, 30, 40).tolist())


def key_of(classifier: Classifier | None = None, *, dtype: torch.dtype = torch.float32, **config: Any) -> str:
    """Return the key that a run computes for a classifier; `config`: changed fields of the model's config."""
    classifier = classifier or toy_classifier()
    classifier.config.update(config)
    weights = weights_fingerprint(classifier.frozen_state)
    return frozen_key(frozen_weights=weights, config=classifier.config, prefix=classifier.prefix.to(dtype))


EXPECTED = key_of()


def test_frozen_key_is_the_same_for_the_same_inputs():
    assert key_of() == EXPECTED
    assert len(EXPECTED) == 64
    assert set(EXPECTED) <= set("0123456789abcdef")


def test_frozen_key_depends_on_the_format(monkeypatch):
    monkeypatch.setattr(keys, "FORMAT", keys.FORMAT + 1)
    assert key_of() != EXPECTED


def change_last_bit(part: str) -> Classifier:
    """Return a classifier with the smallest possible change of one number in one frozen weight."""
    classifier = toy_classifier()
    weight = classifier.frozen_state[part].view(-1)
    weight[7] = torch.nextafter(weight[7], torch.tensor(torch.inf))
    return classifier


@pytest.mark.parametrize("part", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.mlp.c_proj.weight"])
def test_frozen_key_depends_on_every_bit_of_the_frozen_weights(part):
    assert key_of(change_last_bit(part)) != EXPECTED


def test_frozen_key_depends_on_tf32_on_a_gpu_only(monkeypatch):
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
def test_frozen_key_depends_on_the_freeze_boundary(blocks):
    assert key_of(toy_classifier(trainable_blocks=blocks)) != EXPECTED


def test_frozen_key_depends_on_the_number_of_blocks():
    """The number is hashed by itself: the fingerprint of the weights alone need not name it."""
    prefixes = (toy_classifier(trainable_blocks=blocks).prefix for blocks in (1, 2))
    assert len({frozen_key(frozen_weights="same", config=toy_classifier().config, prefix=prefix) for prefix in prefixes}) == 2


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
def test_frozen_key_depends_on_config_fields_of_the_computation(name, value):
    assert getattr(toy_classifier().config, name) != value
    assert key_of(**{name: value}) != EXPECTED


def test_frozen_key_depends_on_the_type():
    assert key_of(dtype=torch.bfloat16) != EXPECTED


def test_frozen_key_depends_on_the_shape_of_the_calls(monkeypatch):
    """One call is one matrix product, so another size of calls moves the last bits."""
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 64)
    assert key_of() != EXPECTED


def test_frozen_key_depends_on_compiling():
    classifier = toy_classifier()
    classifier.prefix.compiled = True
    assert key_of(classifier) != EXPECTED


def piece_of(order: list[int], texts_S: list[int]) -> PieceIndex:
    table = TokenTable(ROWS, pad_id=0, device=torch.device("cpu"))
    texts = DistinctTexts({"toy": table}, one_row_per_text=False)
    numbers = np.array(order)
    return PieceIndex(texts.hashes_U[numbers], texts.rows_U[numbers], np.array(texts_S))


def test_piece_key_depends_on_the_frozen_part_the_texts_their_order_and_the_segments():
    pieces = [piece_of([3, 4, 5], [0, 1, 3]), piece_of([3, 5, 4], [0, 1, 3]), piece_of([3, 4, 5], [0, 2, 3])]
    pieces += [piece_of([3, 4], [0, 1, 2]), replace(pieces[0], rows_I=np.ones(3, np.int64))]
    assert len({piece_key(EXPECTED, piece) for piece in pieces} | {piece_key("0" * 64, pieces[0])}) == 6
    assert piece_key(EXPECTED, piece_of([3, 4, 5], [0, 1, 3])) == piece_key(EXPECTED, pieces[0])


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
def test_frozen_key_ignores_the_trainable_part_and_dropout(make):
    assert key_of(make()) == EXPECTED


def test_frozen_key_ignores_other_config_fields():
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
