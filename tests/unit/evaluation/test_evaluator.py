"""evaluate_split against Hugging Face, numpy and scikit-learn: probabilities in file order, scores, loss, memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from support.toy import CLASSES, toy_classifier, toy_model, toy_reference_logits, toy_split
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation import evaluator
from agnews_dist.evaluation.evaluator import compute_rank_logits, evaluate_split, log_softmax_NC
from agnews_dist.events import EvalDone, Predicted
from agnews_dist.model.gpt2 import Classifier

LENGTHS = [int(length) for length in np.random.default_rng(0).integers(1, 60, 83)]


@pytest.fixture(scope="module")
def engine():
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


def make_table(rows: TokenSplit) -> TokenTable:
    return TokenTable(rows, pad_id=0, device=torch.device("cpu"))


def make_classifier(num_classes: int) -> Classifier:
    """Return a classifier whose predictions differ and are not ties."""
    classifier = toy_classifier(num_classes=num_classes)
    with torch.no_grad():
        classifier.suffix.out_head.weight.mul_(20)
    return classifier


def compute_logits(classifier: Classifier, rows: TokenSplit) -> torch.Tensor:
    """Return logits_NC of Hugging Face's GPT-2 with the classifier's head."""
    texts = np.split(np.asarray(rows.tokens).astype(np.int64), rows.offsets[1:-1])
    tokens_NT = pad_sequence([torch.from_numpy(text) for text in texts], batch_first=True)
    lengths_N, head = torch.from_numpy(rows.lengths), classifier.suffix.out_head
    mask_NT = (torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]).long()
    with torch.no_grad():
        hidden_NTD = toy_model()(input_ids=tokens_NT, attention_mask=mask_NT).last_hidden_state
        return torch.nn.functional.linear(hidden_NTD[torch.arange(len(rows)), lengths_N - 1], head.weight, head.bias)


@pytest.mark.parametrize("budget", [60, 500, 100_000])
def test_scores_equal_hugging_face_and_scikit_learn(engine, monkeypatch, budget):
    monkeypatch.setattr("agnews_dist.data.batching.loader.EVALUATION_TOKENS", budget)
    classifier, rows = toy_classifier(dropout=0.3), toy_split(LENGTHS)
    classifier.suffix.train()
    found = evaluate_split(classifier, make_table(rows), engine)
    assert classifier.suffix.training, "evaluation restores the mode"

    expected = torch.softmax(toy_reference_logits(LENGTHS), dim=1).numpy()
    assert found.probabilities_NK == pytest.approx(expected, abs=1e-5)
    assert found.probabilities_NK.dtype == np.float32
    assert found.classes_NK is None
    assert found.labels_N.tolist() == rows.labels.tolist()
    assert found.predictions_N.tolist() == expected.argmax(axis=1).tolist()
    scores = found.scores
    assert scores is not None
    assert np.array_equal(scores.confusion, confusion_matrix(rows.labels, expected.argmax(axis=1), labels=range(CLASSES)))
    assert scores.num_correct == int((expected.argmax(axis=1) == rows.labels).sum())
    assert scores.loss == pytest.approx(log_loss(rows.labels, expected, labels=range(CLASSES)), abs=1e-5)
    assert scores.macro_f1 == pytest.approx(f1_score(rows.labels, expected.argmax(axis=1), average="macro"))


@pytest.mark.parametrize("num_classes", [2, 7, 256])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_reduced_batches_give_the_bits_of_the_whole_matrix(engine, monkeypatch, num_classes, block):
    monkeypatch.setattr(evaluator, "MAX_REDUCED_LOGITS", block)
    monkeypatch.setattr("agnews_dist.data.batching.loader.EVALUATION_TOKENS", 300)
    classifier, rows = make_classifier(num_classes), replace(toy_split(LENGTHS), labels=np.arange(83) % num_classes)
    table = make_table(rows)
    found = evaluate_split(classifier, table, engine)
    ids_N, logits_NC = compute_rank_logits(classifier, table, engine)
    wide_NC = logits_NC[np.argsort(ids_N)].astype(np.float64)
    wide_NC -= wide_NC.max(axis=1, keepdims=True)
    log_NC = wide_NC - np.log(np.exp(wide_NC).sum(axis=1, keepdims=True))
    assert np.array_equal(found.probabilities_NK, np.exp(log_NC).astype(np.float32))
    assert found.scores is not None
    assert found.scores.loss == float((-log_NC[np.arange(83), rows.labels]).sum()) / 83


@pytest.mark.parametrize("num_rows", [1, 83])
def test_of_many_classes_the_most_probable_are_kept(engine, num_rows):
    lengths, num_classes = LENGTHS[:num_rows], 300
    classifier = make_classifier(num_classes)
    rows = replace(toy_split(lengths), labels=np.random.default_rng(1).integers(0, num_classes, num_rows))
    found = evaluate_split(classifier, make_table(rows), engine)
    logits_NC = compute_logits(classifier, rows).double()
    values_NK, classes_NK = torch.softmax(logits_NC, dim=1).topk(5)
    assert found.probabilities_NK == pytest.approx(values_NK.numpy(), abs=1e-5)
    assert np.array_equal(found.classes_NK, classes_NK.numpy())
    predictions_N = logits_NC.argmax(dim=1).numpy()
    assert np.array_equal(found.predictions_N, predictions_N)
    scores = found.scores
    assert scores is not None
    assert scores.confusion is None
    assert scores.accuracy == accuracy_score(rows.labels, predictions_N)
    assert scores.macro_f1 == f1_score(rows.labels, predictions_N, average="macro", zero_division=0)
    assert scores.loss == pytest.approx(cross_entropy(logits_NC, torch.from_numpy(rows.labels)).item(), rel=1e-5)


def test_equal_logits_keep_the_first_classes(engine):
    classifier = toy_classifier(num_classes=300)
    with torch.no_grad():
        for parameter in classifier.suffix.out_head.parameters():
            parameter.zero_()
    found = evaluate_split(classifier, make_table(toy_split([3, 2])), engine)
    assert found.classes_NK is not None
    assert found.classes_NK.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert found.predictions_N.tolist() == [0, 0]
    assert np.array_equal(found.probabilities_NK, np.full((2, 5), np.float32(1 / 300)))


def test_ten_thousand_classes_of_one_row_each_need_little_memory(engine):
    """Check scores against PyTorch and scikit-learn. A float32 matrix of all logits alone would take 400 MB."""
    num_classes = 10_000
    classifier = make_classifier(num_classes)
    rows = replace(toy_split([7] * num_classes), labels=np.random.default_rng(1).permutation(num_classes))
    table = make_table(rows)
    tracemalloc.start()
    try:
        found = evaluate_split(classifier, table, engine)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()
    ids = torch.from_numpy(np.asarray(rows.tokens).astype(np.int64)).view(num_classes, 7)
    with torch.no_grad():
        last_ND = torch.cat([toy_model()(input_ids=part).last_hidden_state[:, -1] for part in ids.split(1000)])
    head, labels_N, losses, predictions = classifier.suffix.out_head, torch.from_numpy(rows.labels), [], []
    for hidden_BD, labels_B in zip(last_ND.split(500), labels_N.split(500), strict=True):
        logits_BC = torch.nn.functional.linear(hidden_BD, head.weight, head.bias).detach().double()
        losses.append(cross_entropy(logits_BC, labels_B, reduction="none"))
        predictions.append(logits_BC.argmax(dim=1))
    predictions_N = torch.cat(predictions).numpy()
    assert np.mean(found.predictions_N == predictions_N) > 0.9999, "ties to 1e-6 may differ"
    scores = found.scores
    assert scores is not None
    assert scores.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert scores.num_correct == int((found.predictions_N == rows.labels).sum())
    assert scores.macro_f1 == f1_score(rows.labels, found.predictions_N, average="macro", zero_division=0)


@pytest.mark.parametrize("num_classes", [CLASSES, 300])
def test_a_split_without_labels_is_predicted_and_not_scored(engine, num_classes):
    classifier, rows = make_classifier(num_classes), toy_split(LENGTHS)
    labelled = evaluate_split(classifier, make_table(rows), engine)
    found = evaluate_split(classifier, make_table(replace(rows, labels=np.full(83, -1))), engine)
    assert found.scores is None
    assert found.labels_N.tolist() == [-1] * 83
    assert np.array_equal(found.predictions_N, compute_logits(classifier, rows).argmax(dim=1).numpy())
    assert np.array_equal(found.probabilities_NK, labelled.probabilities_NK)
    names = tuple(map(str, range(num_classes)))
    assert found.to_event("test", 3, names) == Predicted(split="test", num_examples=83, seconds=found.seconds)
    assert isinstance(labelled.to_event("test", 3, names), EvalDone)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_outside_the_classes_is_refused_before_any_batch(engine, label):
    rows = toy_split([3, 4, 5])
    table = make_table(replace(rows, labels=np.array([0, label, 1])))
    with pytest.raises(ValueError, match=f"label {label} outside the 4 classes"):
        evaluate_split(toy_classifier(), table, engine, is_stopping=lambda: pytest.fail("a batch was computed"))


def test_log_softmax_does_not_overflow():
    logits = np.array([[1e4, 0.0], [-1e4, 1e4]], dtype=np.float32)
    assert np.allclose(np.exp(log_softmax_NC(logits)), [[1, 0], [0, 1]])
