"""Gradient of a global batch: equal to Hugging Face's to 1e-12 on 1, 2 and 3 ranks with 1, 2 and 4 micro-batches."""

from pathlib import Path

import pytest
import torch
from gradient_worker import DROPOUT, R_DROP, SEED, STEP
from safetensors.torch import load_file
from support import fork_server
from support.dropout_reference import reference_keys, reference_r_drop, second_pass_keys
from support.processes import REPOSITORY
from support.toy import CLASS_WEIGHTS, reference_gradients

# A few long texts and many short ones, so that ranks have different numbers of examples.
LENGTHS = [30, 30, 28, 28, 27, 26, 25, 25, 24, 20, 20, 18, 17, 16, 12, 9, 8, 7, 7, 5, 5, 4, 3, 3, 2, 1, 1, 1, 1, 1]
ACCUMULATIONS = (1, 2, 4)
WEIGHTS_C = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": WEIGHTS_C},
    "both": {"weight": WEIGHTS_C, "label_smoothing": 0.1},
}
"""Loss of the worker -> arguments of torch's `cross_entropy`."""
R_DROP_LOSSES = {"r_drop": None, "weighted_r_drop": WEIGHTS_C}
"""Loss of the worker -> class weights."""


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert len(found) >= 14
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.fixture(scope="module", params=[1, 2, 3])
def saved(request, tmp_path_factory) -> tuple[int, Path]:
    directory = tmp_path_factory.mktemp(f"ranks{request.param}")
    worker = REPOSITORY / "tests" / "ranks" / "gradient_worker.py"
    fork_server.run_ranks(request.param, str(worker), str(directory), ",".join(map(str, LENGTHS)))
    return request.param, directory


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return reference_gradients(LENGTHS)


def gradients_of(loss: str, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Return the gradients of a reference without code of this package."""
    if loss in LOSSES:
        return reference_gradients(lengths, **LOSSES[loss])
    passes = [keys(SEED, STEP, range(len(lengths))) for keys in (reference_keys, second_pass_keys)]
    return reference_r_drop(lengths, passes, DROPOUT, R_DROP, R_DROP_LOSSES[loss])


@pytest.mark.parametrize("loss", [*LOSSES, *R_DROP_LOSSES])
def test_gradient_equals_the_reference(saved, reference, loss):
    num_ranks, directory = saved
    files = sorted(directory.glob(f"{loss}-accumulation*.safetensors"))
    assert len(files) == num_ranks * len(ACCUMULATIONS)
    expected = gradients_of(loss, LENGTHS)
    for file in files:
        assert relative_error(load_file(file), expected) < 1e-12, file.name
    assert loss == "plain" or relative_error(expected, reference) > 1e-2, "the losses differ"


@pytest.mark.parametrize("loss", [*LOSSES, *R_DROP_LOSSES])
def test_ranks_without_an_example_add_nothing(saved, loss):
    num_ranks, directory = saved
    expected = gradients_of(loss, LENGTHS[:1])
    for rank in range(num_ranks):
        found = load_file(directory / f"{loss}-one_example-rank{rank}of{num_ranks}.safetensors")
        assert relative_error(found, expected) < 1e-12


def test_mean_of_means_has_another_gradient(saved, reference):
    """Check the negative control: with several ranks the usual loss has another gradient."""
    num_ranks, directory = saved
    error = relative_error(load_file(directory / f"mean_of_means-rank0of{num_ranks}.safetensors"), reference)
    assert error < 1e-12 if num_ranks == 1 else error > 1e-2


def test_clipped_update_is_the_scaled_reference_gradient(saved, reference):
    num_ranks, directory = saved
    norm = float(torch.stack([value.square().sum() for value in reference.values()]).sum().sqrt())
    for rank in range(num_ranks):
        update = load_file(directory / f"clipped-rank{rank}of{num_ranks}.safetensors")
        update.pop("loss")
        assert float(update.pop("grad_norm")) == pytest.approx(norm, rel=1e-10)
        assert norm > 0.1
        expected = {name: value * (0.1 / (norm + 1e-6)) for name, value in reference.items()}
        assert relative_error(update, expected) < 1e-9
