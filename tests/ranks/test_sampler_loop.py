"""Training loop of the batch sampler's docstring on real ranks, compared with plain training on global batches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sampler_worker import LEARNING_RATE, MAX_TOKENS_PER_RANK, NUM_EPOCHS, NUM_EXAMPLES, SETTINGS, BagOfTokens, make_examples
from support import fork_server
from support.processes import REPOSITORY

from agnews_dist.data.batching import LengthBucketedBatchSampler, plan

LENGTHS = [len(tokens) for tokens, _ in make_examples()]


def micro_batches(num_ranks: int) -> list[list]:
    """List the micro-batches of the first epoch, by rank."""
    options = {"num_ranks": num_ranks, "settings": SETTINGS, "max_tokens_per_rank": MAX_TOKENS_PER_RANK}
    return [list(LengthBucketedBatchSampler(LENGTHS, rank=rank, **options).micro_batches()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradient of the first global batch and last weights, computed one example at a time without padding or sampler."""
    model, dataset, first = BagOfTokens(), make_examples(), {}
    for epoch in range(NUM_EPOCHS):
        for ids in plan(torch.tensor(LENGTHS).numpy(), SETTINGS, epoch=epoch).global_batches():
            losses = []
            for tokens_T, label in (dataset[i] for i in ids):
                logits_C = model(tokens_T[None], torch.tensor([len(tokens_T)]))[0]
                losses.append(torch.logsumexp(logits_C, 0) - logits_C[label])
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(torch.stack(losses).mean(), list(parameters.values()))
            first = first or dict(zip(parameters, gradients, strict=True))
            with torch.no_grad():
                for value, gradient in zip(parameters.values(), gradients, strict=True):
                    value -= LEARNING_RATE * gradient
    return first, {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture(scope="module", params=[1, 2, 3])
def saved(request, tmp_path_factory) -> tuple[int, Path]:
    directory = tmp_path_factory.mktemp(f"ranks{request.param}")
    fork_server.run_ranks(request.param, str(REPOSITORY / "tests" / "ranks" / "sampler_worker.py"), str(directory))
    return request.param, directory


def largest_difference(saved: tuple[int, Path], name: str, expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference over all ranks and values."""
    num_ranks, directory = saved
    found = [load_file(directory / f"{name}-rank{rank}of{num_ranks}.safetensors") for rank in range(num_ranks)]
    assert all(values.keys() == expected.keys() for values in found)
    return max(float((values[key] - expected[key]).abs().max()) for values in found for key in expected)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_case_has_unequal_and_empty_shares(num_ranks):
    by_rank = micro_batches(num_ranks)
    assert len({len(micros[0].ids) for micros in by_rank}) > 1, "equal shares of the first batch"
    assert any(not micro.ids for micros in by_rank for micro in micros)
    assert any(not micro.is_last for micro in by_rank[0]), "no step has several micro-batches"
    assert sum(len(micro.ids) for micros in by_rank for micro in micros) == NUM_EXAMPLES


def test_documented_loop_computes_the_gradient_of_the_global_batch(saved, reference):
    gradient, _ = reference
    assert max(float(value.abs().max()) for value in gradient.values()) > 1e-2
    assert largest_difference(saved, "documented-gradient", gradient) < 1e-12


def test_documented_loop_computes_the_weights_after_two_epochs(saved, reference):
    assert largest_difference(saved, "documented-weights", reference[1]) < 1e-12


def test_documented_loop_resumes_exactly(saved, reference):
    assert largest_difference(saved, "resumed-weights", reference[1]) < 1e-12


def test_gradient_check_fails_a_mean_of_means(saved, reference):
    """Negative control: with unequal micro-batches the usual loss has another gradient."""
    steps = [micro.step for micro in micro_batches(saved[0])[0]]
    means = {name: steps.count(0) * value for name, value in reference[0].items()}
    error = largest_difference(saved, "mean_of_means-gradient", means)
    assert error < 1e-12 if saved[0] * steps.count(0) == 1 else error > 1e-3
