"""Features of the frozen model against Hugging Face's hidden states, within a time, and without harm to the run."""

import copy

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_model, toy_split
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation import frozen_features
from agnews_dist.evaluation.frozen_features import FrozenFeatures, compute_frozen_features
from agnews_dist.model.prefix import uncached_features

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 60, 83)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


def compute(engine: Engine, suffix: nn.Module | None = None, *, max_seconds: float = 60.0, owner_N: np.ndarray | None = None):
    classifier = toy_classifier(dropout=0.3)
    if suffix is None:
        suffix = copy.deepcopy(classifier.suffix).eval()
        suffix.add_module("out_head", nn.Identity())
    rows = toy_split(LENGTHS)
    tables = {name: TokenTable(rows, pad_id=0, device=torch.device("cpu")) for name in ("train", "test")}
    source = uncached_features(classifier.prefix)
    return compute_frozen_features(suffix, tables, engine, lambda _: source, owner_N=owner_N, seed=0, max_seconds=max_seconds)


def expected() -> np.ndarray:
    """Hugging Face's hidden states of the last real token, after the final norm."""
    rows = toy_split(LENGTHS)
    texts = np.split(np.asarray(rows.tokens).astype(np.int64), rows.offsets[1:-1])
    tokens_NT = pad_sequence([torch.from_numpy(text) for text in texts], batch_first=True)
    lengths_N = torch.from_numpy(rows.lengths)
    mask_NT = (torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]).long()
    with torch.no_grad():
        hidden_NTD = toy_model()(input_ids=tokens_NT, attention_mask=mask_NT).last_hidden_state
    return hidden_NTD[torch.arange(len(rows)), lengths_N - 1].numpy()


def test_features_equal_hugging_face_in_file_order(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_features, "BATCH_TOKENS", 200)
    found = compute(engine)
    assert isinstance(found, FrozenFeatures)
    np.testing.assert_allclose(found.splits["test"], expected(), atol=2e-5)
    assert found.train_rows_N.tolist() == list(range(len(LENGTHS)))
    np.testing.assert_allclose(found.train_NH, expected(), atol=2e-5)


def test_training_rows_are_chosen_and_limited(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_features, "MAX_TRAIN_ROWS", 20)
    monkeypatch.setattr(frozen_features, "MAX_SCORED_ROWS", 20)
    found = compute(engine)
    assert isinstance(found, FrozenFeatures)
    assert len(set(found.train_rows_N.tolist())) == 20
    assert found.train_rows_N.tolist() == sorted(found.train_rows_N.tolist())
    np.testing.assert_allclose(found.train_NH, expected()[found.train_rows_N], atol=2e-5)
    assert found.splits == {}


def test_rows_of_other_ranks_are_left_to_them(engine: Engine) -> None:
    owner_N = np.arange(len(LENGTHS)) % 2
    found = compute(engine, owner_N=owner_N)
    assert isinstance(found, FrozenFeatures)
    assert found.train_rows_N.tolist() == np.flatnonzero(owner_N == 0).tolist()


def test_features_without_time_are_left_out(engine: Engine) -> None:
    found = compute(engine, max_seconds=-1.0)
    assert isinstance(found, FrozenFeatures)
    assert (len(found.train_rows_N), len(found.train_NH), found.splits) == (0, 0, {})


class Failing(nn.Module):
    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory\nwith details")


def test_failure_is_a_reason_and_no_exception(engine: Engine) -> None:
    assert compute(engine, Failing()) == "RuntimeError: CUDA out of memory"
