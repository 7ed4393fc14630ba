"""One optimiser step in one process, with several micro-batches, against Hugging Face's gradient of the whole batch.

tests/ranks has the same with several ranks.
"""

import math

import numpy as np
import pytest
import torch
from support.toy import CLASS_WEIGHTS, reference_gradients, toy_classifier, toy_reference_logits, toy_split

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import StepBatches, TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.model.dropout import step_key
from agnews_dist.model.prefix import Features, uncached_features
from agnews_dist.training.losses import StepSettings
from agnews_dist.training.step import NonFiniteError, train_step

LENGTHS = [int(length) for length in np.random.default_rng(1).integers(1, 31, 24)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return reference_gradients(LENGTHS)


def one_step(max_tokens: int, class_weights_C: np.ndarray | None = None) -> StepBatches:
    """Return all examples as one global batch."""
    table = TokenTable(toy_split(LENGTHS), pad_id=0, device=torch.device("cpu"))
    settings = PlanSettings(global_batch_size=len(LENGTHS))
    loader = TrainLoader(
        table, World(), settings, max_tokens_per_rank=max_tokens, quadratic=0.0, class_weights_C=class_weights_C
    )
    (batches,) = loader.steps(0)
    return batches


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1, 1e6], ids=["unclipped", "clipped", "below the limit"])
@pytest.mark.parametrize("max_tokens", [10_000, 80])
def test_update_equals_the_reference_for_any_micro_batches(engine, reference, max_tokens, max_grad_norm):
    classifier, batches = toy_classifier(), one_step(max_tokens)
    num_micro_batches = len(batches.micro_batches)
    assert num_micro_batches == 1 if max_tokens == 10_000 else num_micro_batches > 3
    prefix, suffix = classifier.prefix.double(), classifier.suffix.double().eval()
    before = {name: value.detach().clone() for name, value in suffix.named_parameters()}
    optimizer = torch.optim.SGD(suffix.parameters(), lr=1.0)
    strategy = engine.prepare(suffix, optimizer, max_grad_norm=max_grad_norm)
    result = train_step(engine, uncached_features(prefix), strategy, batches)

    norm = math.sqrt(sum(float(value.square().sum()) for value in reference.values()))
    assert norm > 0.2
    assert result.grad_norm == pytest.approx(norm, rel=1e-10)
    factor = 0.1 / (norm + 1e-6) if max_grad_norm == 0.1 else 1.0
    assert before.keys() == reference.keys()
    for name, value in suffix.named_parameters():
        torch.testing.assert_close(before[name] - value.detach(), factor * reference[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_changes_neither_parameters_nor_moments(engine, bad):
    classifier, batches = toy_classifier(), one_step(10_000)
    suffix = classifier.suffix
    optimizer = torch.optim.AdamW(suffix.parameters())
    strategy = engine.prepare(suffix, optimizer, max_grad_norm=1.0)
    train_step(engine, uncached_features(classifier.prefix), strategy, batches)
    moments = [state[key] for state in optimizer.state.values() for key in ("step", "exp_avg", "exp_avg_sq")]
    assert len(moments) == 3 * 16
    watched = [*(value.detach() for value in suffix.parameters()), *moments]
    before = [value.clone() for value in watched]

    def poisoned(batch: Batch) -> Features:
        hidden_BTD, lengths_B = uncached_features(classifier.prefix)(batch)
        return Features(hidden_BTD * bad, lengths_B)

    (batch,) = batches.micro_batches
    with pytest.raises(
        NonFiniteError, match=r"non-finite loss on rank\(s\) 0, of examples 0, 1, .*: no rank updated its weights\."
    ) as raised:
        train_step(engine, poisoned, strategy, batches)
    assert raised.value.ids == tuple(sorted(batch.ids_B.tolist()))
    assert all(torch.equal(value, old) for value, old in zip(watched, before, strict=True))
    result = train_step(engine, poisoned, strategy, batches, settings=StepSettings(nonfinite="skip"))
    assert (math.isnan(result.loss), result.grad_norm, result.bad_ids) == (True, None, raised.value.ids)
    assert all(torch.equal(value, old) for value, old in zip(watched, before, strict=True))
    train_step(engine, uncached_features(classifier.prefix), strategy, batches)
    assert not any(torch.equal(value, old) for value, old in zip(watched[:16], before, strict=False))


def test_skipped_update_names_the_example_with_a_non_finite_loss(engine):
    classifier, batches = toy_classifier(), one_step(80)
    strategy = engine.prepare(classifier.suffix, torch.optim.AdamW(classifier.suffix.parameters()), max_grad_norm=1.0)

    def poisoned(batch: Batch) -> Features:
        hidden_BTD, lengths_B = uncached_features(classifier.prefix)(batch)
        return Features(hidden_BTD.masked_fill((batch.ids_B == 5)[:, None, None], math.nan), lengths_B)

    assert len(batches.micro_batches) > 3
    assert train_step(engine, poisoned, strategy, batches, settings=StepSettings(nonfinite="skip")).bad_ids == (5,)


@pytest.mark.parametrize(("stop", "save"), [(False, False), (True, False), (False, True)])
def test_step_carries_the_requests_to_stop_and_to_save(engine, stop, save):
    classifier = toy_classifier()
    optimizer = torch.optim.AdamW(classifier.suffix.parameters())
    strategy = engine.prepare(classifier.suffix, optimizer, max_grad_norm=1.0)
    result = train_step(engine, uncached_features(classifier.prefix), strategy, one_step(10_000), stop=stop, save=save)
    assert (result.stop, result.save) == (stop, save)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("max_tokens", [10_000, 80])
def test_reported_loss_is_torchs_weighted_and_smoothed_mean(engine, max_tokens, label_smoothing):
    batches, weights_C = one_step(max_tokens, np.array(CLASS_WEIGHTS)), torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    labels_N = torch.from_numpy(toy_split(LENGTHS).labels)
    assert batches.loss_divisor == pytest.approx(float(weights_C[labels_N].sum()), rel=1e-15)
    classifier = toy_classifier()
    strategy = engine.prepare(classifier.suffix.eval(), torch.optim.SGD(classifier.suffix.parameters()), max_grad_norm=0.0)
    settings = StepSettings(label_smoothing=label_smoothing, class_weights_C=weights_C)
    result = train_step(engine, uncached_features(classifier.prefix), strategy, batches, settings=settings)
    expected = torch.nn.functional.cross_entropy(
        toy_reference_logits(LENGTHS), labels_N, weights_C.float(), label_smoothing=label_smoothing
    )
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_r_drop_without_dropout_is_the_plain_loss(engine, label_smoothing):
    batches, weights_C = one_step(80, np.array(CLASS_WEIGHTS)), torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    losses = []
    for r_drop in (0.0, 5.0):
        classifier = toy_classifier()
        strategy = engine.prepare(classifier.suffix.train(), torch.optim.SGD(classifier.suffix.parameters()), max_grad_norm=0.0)
        settings = StepSettings(label_smoothing=label_smoothing, class_weights_C=weights_C, r_drop=r_drop)
        embed = uncached_features(classifier.prefix)
        result = train_step(engine, embed, strategy, batches, dropout_key=step_key(0, 0), settings=settings)
        losses.append((result.loss, result.grad_norm))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
