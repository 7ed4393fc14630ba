"""An update with dropout is the same under every engine, on any number of ranks, with any micro-batches: Hugging Face's, in one
process and one batch, under numpy's masks."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server
from support.dropout_reference import reference_keys, reference_with_dropout
from support.processes import REPOSITORY

LENGTHS = [int(length) for length in np.random.default_rng(4).integers(1, 31, 23)]
ENGINES = ["ddp", "fsdp", "zero2", "zero3"]
P, SEED, STEP = 0.2, 5, 41
RELATIVE = 2e-5
"""Of the largest element of a weight's gradient, in fp32."""


def differences(moved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert moved.keys() == expected.keys()
    return max(float((moved[name] - e).abs().max() / e.abs().max()) for name, e in expected.items())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_update_with_dropout_knows_no_ranks_no_micro_batches_and_no_engine(tmp_path, num_ranks) -> None:
    told = {
        "engines": ENGINES,
        "lengths": LENGTHS,
        "global_batch_size": len(LENGTHS),
        "p": P,
        "seed": SEED,
        "step": STEP,
    }
    worker = REPOSITORY / "tests" / "ranks" / "dropout_worker.py"
    fork_server.run_ranks(
        num_ranks, str(worker), str(tmp_path), json.dumps(told), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")
    )
    num_micro_batches = json.loads((tmp_path / "micro_batches.json").read_text())
    ids = list(range(len(LENGTHS)))
    _, expected = reference_with_dropout(LENGTHS, reference_keys(SEED, STEP, ids), P, torch.float64)
    _, another = reference_with_dropout(LENGTHS, reference_keys(SEED, STEP + 1, ids), P, torch.float64)
    assert differences(another, expected) > 0.1, "the control: the masks count"
    for name in ENGINES:
        assert num_micro_batches[f"{name}-one"] == 1 < num_micro_batches[f"{name}-several"]
        for what in ("one", "several", "again"):
            moved = load_file(tmp_path / f"{name}-{what}.safetensors")
            assert differences(moved, expected) < RELATIVE, f"{name}, {what}"
