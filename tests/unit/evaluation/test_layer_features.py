"""Pooled features of every layer against Hugging Face's hidden states."""

import math

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_model, toy_split
from torch.nn.utils.rnn import pad_sequence

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ModelError
from agnews_dist.evaluation import layer_features
from agnews_dist.evaluation.layer_features import gather_view, list_views, pool_layers
from agnews_dist.events import Event, Progress, ignore_event

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 60, 83)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


def make_table() -> TokenTable:
    return TokenTable(toy_split(LENGTHS), pad_id=0, device=torch.device("cpu"))


def reference_views() -> list[np.ndarray]:
    """Return Hugging Face's hidden states by view, in float64, on a batch padded to 60 tokens."""
    rows, model = toy_split(LENGTHS), toy_model().double()
    texts = np.split(np.asarray(rows.tokens).astype(np.int64), rows.offsets[1:-1])
    tokens_NT = pad_sequence([torch.from_numpy(text) for text in texts], batch_first=True, padding_value=5)
    lengths_N = torch.from_numpy(rows.lengths)
    is_real_NT = torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]
    # hidden_states lacks the last block's own output: the final norm follows at once.
    before_norm: list[torch.Tensor] = []
    model.ln_f.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        found = model(input_ids=tokens_NT, attention_mask=is_real_NT.long(), output_hidden_states=True).hidden_states
    views: list[np.ndarray] = []
    for hidden_NTD in (*found[:-1], before_norm[0], found[-1]):
        views.append(hidden_NTD[torch.arange(len(rows)), lengths_N - 1].numpy())
        views.append(((hidden_NTD * is_real_NT[..., None]).sum(1) / lengths_N[:, None]).numpy())
    return views


@pytest.mark.parametrize("budget", [100, 16_384])
def test_every_layer_equals_hugging_face(engine: Engine, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(layer_features, "BATCH_TOKENS", budget)
    classifier = toy_classifier(trainable_blocks=0, dropout=0.3)
    seen: list[Event] = []
    part = pool_layers(classifier, make_table(), np.arange(len(LENGTHS)), engine, emit=seen.append)
    expected = reference_views()
    assert len(expected) == len(list_views(3)) == len(part.values_LND) == 10
    for number, values_ND in enumerate(expected):
        np.testing.assert_allclose(gather_view(part, number), values_ND, atol=1e-5)
    reports = [event for event in seen if isinstance(event, Progress)]
    assert (reports[0].done, reports[-1].done, reports[-1].total) == (0, len(LENGTHS), len(LENGTHS))


def test_chosen_rows_are_returned_in_ascending_order(engine: Engine) -> None:
    rows_N = np.array([2, 3, 40, 41, 80])
    part = pool_layers(toy_classifier(trainable_blocks=0), make_table(), rows_N, engine, emit=ignore_event)
    np.testing.assert_allclose(gather_view(part, 7), reference_views()[7][rows_N], atol=1e-5)


def test_values_that_are_not_finite_are_an_error(engine: Engine) -> None:
    classifier = toy_classifier(trainable_blocks=0)
    with torch.no_grad():
        classifier.prefix.h["1"].mlp.c_proj.bias[0] = math.inf
    with pytest.raises(ModelError, match=r"engine.precision fp32: layer 2 has values that are not finite"):
        pool_layers(classifier, make_table(), np.arange(5), engine, emit=ignore_event)
