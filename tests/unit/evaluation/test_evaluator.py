"""evaluate_split against Hugging Face and scikit-learn: probabilities in file order, scores, loss."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss
from support.toy import CLASSES, toy_classifier, toy_reference_logits, toy_split

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.evaluator import evaluate_split, log_softmax_NC

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 60, 83)]


@pytest.fixture(scope="module")
def engine():
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


@pytest.mark.parametrize("budget", [60, 500, 100_000])
def test_scores_equal_hugging_face_and_scikit_learn(engine, monkeypatch, budget):
    monkeypatch.setattr("agnews_dist.data.batching.loader.EVALUATION_TOKENS", budget)
    classifier, rows = toy_classifier(dropout=0.3), toy_split(LENGTHS)
    classifier.suffix.train()
    table = TokenTable(rows, pad_id=0, device=torch.device("cpu"))
    found = evaluate_split(classifier, table, engine)
    assert classifier.suffix.training, "evaluation restores the mode"

    expected = torch.softmax(toy_reference_logits(LENGTHS), dim=1).numpy()
    assert found.probabilities_NC == pytest.approx(expected, abs=1e-5)
    assert found.labels_N.tolist() == rows.labels.tolist()
    assert found.predictions_N.tolist() == expected.argmax(axis=1).tolist()
    scores = found.scores
    assert np.array_equal(scores.confusion, confusion_matrix(rows.labels, expected.argmax(axis=1), labels=range(CLASSES)))
    assert scores.num_correct == int((expected.argmax(axis=1) == rows.labels).sum())
    assert scores.loss == pytest.approx(log_loss(rows.labels, expected, labels=range(CLASSES)), abs=1e-5)
    assert scores.macro_f1 == pytest.approx(f1_score(rows.labels, expected.argmax(axis=1), average="macro"))


def test_log_softmax_does_not_overflow():
    logits = np.array([[1e4, 0.0], [-1e4, 1e4]], dtype=np.float32)
    assert np.allclose(np.exp(log_softmax_NC(logits)), [[1, 0], [0, 1]])
