"""Ensembles, soft targets and temperatures, against numpy and torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split
from torch.nn import functional

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.evaluator import compute_rank_logits, evaluate_split, evaluate_together, score_logits
from agnews_dist.experiments import ensemble
from agnews_dist.model.gpt2 import Classifier, copy_untrained
from agnews_dist.training.losses import StepSettings, example_losses

LENGTHS = [int(length) for length in np.random.default_rng(5).integers(1, 30, 40)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


def make_table() -> TokenTable:
    return TokenTable(toy_split(LENGTHS), pad_id=0, device=torch.device("cpu"))


def make_classifiers(number: int = 3) -> list[Classifier]:
    """Return classifiers that share a frozen part and differ in their heads."""
    first = toy_classifier()
    made = [copy_untrained(first, seed) for seed in range(number)]
    with torch.no_grad():
        for classifier in made:
            classifier.suffix.out_head.weight.mul_(20)
    return made


def probabilities_of(classifier: Classifier, engine: Engine) -> np.ndarray:
    """Return the softmax of the logits in float64, in file order."""
    ids, logits = compute_rank_logits(classifier, make_table(), engine)
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True))[np.argsort(ids)]


def test_copies_have_heads_of_their_seeds_and_one_frozen_part() -> None:
    first = toy_classifier()
    with torch.no_grad():
        again, other = copy_untrained(first, 0), copy_untrained(first, 1)
    assert again.prefix is first.prefix
    assert torch.equal(again.suffix.out_head.weight, copy_untrained(first, 0).suffix.out_head.weight)
    assert not torch.equal(again.suffix.out_head.weight, other.suffix.out_head.weight)
    kept = copy_untrained(replace(first, has_drawn_head=False), 1)
    assert torch.equal(kept.suffix.out_head.weight, first.suffix.out_head.weight)
    with torch.no_grad():
        other.suffix.ln_f.weight.add_(1)
    assert not torch.equal(other.suffix.ln_f.weight, first.suffix.ln_f.weight), "a copy, not a reference"


def test_ensemble_has_the_mean_probabilities(engine: Engine) -> None:
    classifiers, table = make_classifiers(), make_table()
    means = ensemble.MeanProbabilities(len(table), classifiers[0].suffix.out_head.out_features)
    means.add(classifiers, table, engine)
    found = score_logits(means.log_NC, table.labels_N, seconds=0.0)
    expected = np.mean([probabilities_of(each, engine) for each in classifiers], axis=0)
    np.testing.assert_allclose(found.probabilities_NK, expected, atol=1e-6)
    assert (found.predictions_N == expected.argmax(axis=1)).all()


def test_scores_together_are_those_of_each_alone(engine: Engine) -> None:
    classifiers = make_classifiers()
    together = evaluate_together(classifiers, make_table(), engine)
    for found, classifier in zip(together, classifiers, strict=True):
        alone = evaluate_split(classifier, make_table(), engine)
        assert found.scores == alone.scores
        assert np.array_equal(found.probabilities_NK, alone.probabilities_NK)


@pytest.mark.parametrize("parts", [(1, 1, 1), (2, 1), (1, 2)])
def test_mean_probabilities_do_not_depend_on_the_parts(engine: Engine, parts: tuple[int, ...]) -> None:
    classifiers, begin = make_classifiers(), 0
    means = ensemble.MeanProbabilities(len(LENGTHS), classifiers[0].suffix.out_head.out_features)
    for number in parts:
        means.add(classifiers[begin : begin + number], make_table(), engine)
        begin += number
    expected = np.mean([probabilities_of(each, engine) for each in classifiers], axis=0)
    np.testing.assert_allclose(np.exp(means.log_NC), expected, atol=1e-6)
    assert means.log_NC.dtype == np.float32


def test_soft_targets_replace_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC, targets_NC = torch.randn(4, 3, generator=generator), torch.rand(9, 3, generator=generator)
    targets_NC /= targets_NC.sum(dim=1, keepdim=True)
    ids_B, ones = torch.tensor([7, 2, 0, -1]), torch.ones(4, dtype=torch.int64)
    batch = Batch(ones[:, None], ones, torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 1.0, 1.0, 0.0]), ids_B)
    losses_B = example_losses(logits_BC, batch, StepSettings(targets_NC=targets_NC))
    expected = [-(targets_NC[row] * functional.log_softmax(logits_BC[i], dim=0)).sum() for i, row in enumerate((7, 2, 0))]
    torch.testing.assert_close(losses_B[:3], torch.stack(expected))
    assert losses_B[3] == 0
    weights_C = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    weighted_B = example_losses(logits_BC, batch, StepSettings(targets_NC=targets_NC, class_weights_C=weights_C))
    torch.testing.assert_close(weighted_B[:3].double(), losses_B[:3].double() * weights_C)


def test_temperature_folds_into_the_head(engine: Engine) -> None:
    classifier = make_classifiers(1)[0]
    weights = {name: value.detach().clone() for name, value in classifier.suffix.named_parameters()}
    before = compute_rank_logits(classifier, make_table(), engine)[1]
    classifier.suffix.load_state_dict(ensemble.fold_temperature(weights, 2.5))
    after = compute_rank_logits(classifier, make_table(), engine)[1]
    np.testing.assert_allclose(after, before / 2.5, atol=1e-5)
