"""An update with dropout is the same under every engine, on any number of ranks, with any micro-batches.

The reference is Hugging Face's classifier in one process and one batch, under numpy's masks.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server
from support.dropout_reference import reference_keys, reference_r_drop, reference_with_dropout, second_pass_keys
from support.processes import REPOSITORY

LENGTHS = [int(length) for length in np.random.default_rng(4).integers(1, 31, 23)]
ENGINES = ["ddp", "fsdp", "zero2", "zero3"]
P, R_DROP, SEED, STEP = 0.2, 0.7, 5, 41
RELATIVE = 2e-5
"""Tolerance relative to the largest element of a weight's gradient, in fp32."""


def differences(change: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert change.keys() == expected.keys()
    return max(float((change[name] - e).abs().max() / e.abs().max()) for name, e in expected.items())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_update_with_dropout_is_the_same_for_all_engines_ranks_and_micro_batches(tmp_path, num_ranks) -> None:
    arguments = {"engines": ENGINES, "lengths": LENGTHS, "global_batch_size": len(LENGTHS), "p": P, "seed": SEED, "step": STEP}
    arguments["r_drop"] = R_DROP
    worker = REPOSITORY / "tests" / "ranks" / "dropout_worker.py"
    fork_server.run_ranks(
        num_ranks, str(worker), str(tmp_path), json.dumps(arguments), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")
    )
    num_micro_batches = json.loads((tmp_path / "micro_batches.json").read_text())
    ids = list(range(len(LENGTHS)))
    _, expected = reference_with_dropout(LENGTHS, reference_keys(SEED, STEP, ids), P, torch.float64)
    _, another = reference_with_dropout(LENGTHS, reference_keys(SEED, STEP + 1, ids), P, torch.float64)
    assert differences(another, expected) > 0.1, "control: other masks give another update"
    for name in ENGINES:
        assert num_micro_batches[f"{name}-one"] == 1 < num_micro_batches[f"{name}-several"]
        for what in ("one", "several", "again"):
            change = load_file(tmp_path / f"{name}-{what}.safetensors")
            assert differences(change, expected) < RELATIVE, f"{name}, {what}"
    passes = [keys(SEED, STEP, ids) for keys in (reference_keys, second_pass_keys)]
    expected = reference_r_drop(LENGTHS, passes, P, R_DROP)
    for name in ENGINES:
        assert differences(load_file(tmp_path / f"{name}-r_drop.safetensors"), expected) < RELATIVE, f"{name}, R-Drop"
