"""Saved state of every engine: equal to that of one process, and loadable by any engine on any number of ranks.

The worker checks that resuming on the same number of ranks is exact. Here its files are compared with a reference.
"""

import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server
from support.processes import REPOSITORY
from support.toy import our_name, toy_reference_groups, toy_reference_model, toy_split
from test_engines import BATCH, LENGTHS, LR, PARTS, TOLERANCE, WEIGHT_DECAY, drop_key_bias, global_batches
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

BROKEN = "AGNEWS_MUTANT" in os.environ
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
CROSSED = ("ddp", "zero2", "zero3", "fsdp")
RING = dict(zip(CROSSED, (*CROSSED[1:], CROSSED[0]), strict=True))
"""Engine -> the engine that resumes from it. All write one format, so this need not be every pair."""
HALF, BLOCKS, FIRST_AVERAGED = 4, 2, 2
# Relative to the largest moment; measured: 7e-7.
MOMENT_TOLERANCE = 2e-5
WORKER = REPOSITORY / "tests" / "ranks" / "optimizer_state_worker.py"


def launch(num_ranks: int, directory: Path, **changes: object) -> Path:
    """Run the worker on a number of ranks; return the directory of its files."""
    path = directory / "settings.json"
    settings = {
        "lengths": LENGTHS,
        "global_batch_size": BATCH,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "trainable_blocks": BLOCKS,
        "max_tokens": PARTS,
        "dropout": 0.0,
        "crossed": [],
        "refusals": False,
        "scales": [],
    }
    path.write_text(json.dumps(settings | changes))
    fork_server.run_ranks(num_ranks, str(WORKER), str(directory), str(path))
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Files of two ranks: the state of every engine, and each engine resumed from another."""
    directory = tmp_path_factory.mktemp("two")
    if BROKEN:
        return launch(2, directory, resumed=[name for name in CROSSED if f"[{name}]" in os.environ["AGNEWS_MUTANT"]])
    crossed = [
        (engine, str(directory / f"{source}-half.safetensors"), f"{source}-in-{engine}") for source, engine in RING.items()
    ]
    return launch(2, directory, resumed=ENGINES, crossed=crossed, refusals=True, scales=["ddp", "zero2", "zero3"])


@pytest.fixture(scope="module")
def other_ranks(request, tmp_path_factory) -> Path:
    """Files of one or three ranks, resumed from the states of two; three ranks with dropout also from their own."""
    num_ranks, crossed = request.param, []
    if not BROKEN:
        two = request.getfixturevalue("two")
        crossed = [(engine, str(two / f"{engine}-half.safetensors"), f"2-in-{engine}") for engine in CROSSED]
    resumed = [] if num_ranks == 1 else ["ddp"] if BROKEN else ["ddp", "fsdp", "zero2", "zero3-pieces"]
    directory = tmp_path_factory.mktemp(f"ranks{num_ranks}")
    return launch(num_ranks, directory, resumed=resumed, crossed=crossed, dropout=0.2)


def read(path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Read (final state, losses of the last steps)."""
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())["losses"]


@pytest.fixture(scope="module")
def reference() -> dict:
    """State of Hugging Face's module and torch's AdamW in one process, after half of the steps and after all."""
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS, BLOCKS, torch.float32)
    labels_N = torch.from_numpy(toy_split(LENGTHS).labels)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(toy_reference_groups(trained, WEIGHT_DECAY, {}), lr=LR, fused=True)
    losses, states = [], []
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    for step, ids in enumerate(global_batches()[: 2 * HALF], start=1):
        optimizer.zero_grad()
        logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_N[ids])
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(trained.values(), 1.0) > 1, "every step is clipped"
        losses.append(loss.item())
        optimizer.step()
        if step > FIRST_AVERAGED:
            averaged.update_parameters(model)
        if step % HALF == 0:
            state = {f"weight.{our_name(name)}": weight.detach().clone() for name, weight in trained.items()}
            for kind in ("exp_avg", "exp_avg_sq"):
                moments = {name: optimizer.state[weight][kind].clone() for name, weight in trained.items()}
                state |= {f"{kind}.{our_name(name)}": moment for name, moment in moments.items()}
            averages = {name: weight.detach().clone() for name, weight in averaged.module.named_parameters()}
            state |= {f"average.{our_name(name)}": averages[name] for name in trained}
            states.append(state)
    return {"losses": losses, "half": states[0], "done": states[1]}


def measure_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest error of each kind: absolute for weights and averages, relative to the largest moment for moments."""
    assert found.keys() == expected.keys()
    errors = {"weight": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "average": 0.0}
    for key, value in found.items():
        kind, _, name = key.partition(".")
        error = float(drop_key_bias(name, value - expected[key]).abs().max())
        errors[kind] = max(errors[kind], error)
    for kind in ("exp_avg", "exp_avg_sq"):
        errors[kind] /= max(float(value.abs().max()) for key, value in expected.items() if key.startswith(f"{kind}."))
    return errors


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    errors = measure_errors(found, expected)
    assert max(errors["weight"], errors["average"]) < TOLERANCE
    assert max(errors["exp_avg"], errors["exp_avg_sq"]) < MOMENT_TOLERANCE


@pytest.mark.parametrize("name", ENGINES)
def test_saved_state_equals_that_of_one_process(two, reference, name):
    check_close(load_file(two / f"{name}-half.safetensors"), reference["half"])
    check_close(load_file(two / f"{name}-done.safetensors"), reference["done"])
    facts = json.loads((two / f"{name}.json").read_text())
    np.testing.assert_allclose(facts["losses"], reference["losses"], rtol=1e-5)
    # Control: the gathered state was sharded.
    assert facts["optimizer"] == "AdamW"
    assert facts["local_moments"] == pytest.approx(1.0 if name == "ddp" else 0.5, rel=0.05)
    assert facts["local_weights"] == pytest.approx(0.5 if name == "fsdp" or "zero3" in name else 1.0, rel=0.05)


def test_the_tolerances_detect_another_state(reference):
    """Compare the state after half of the steps with the final one."""
    errors = measure_errors(reference["half"], reference["done"])
    assert min(errors["weight"], errors["average"]) > 20 * TOLERANCE
    assert min(errors["exp_avg"], errors["exp_avg_sq"]) > 100 * MOMENT_TOLERANCE


@pytest.mark.parametrize(("source", "engine"), RING.items())
def test_an_engine_resumes_from_another_engine(two, reference, source, engine):
    state, losses = read(two / f"{source}-in-{engine}")
    check_close(state, reference["done"])
    np.testing.assert_allclose(losses, reference["losses"][HALF:], rtol=1e-5)


@pytest.mark.parametrize("other_ranks", [1, 3], indirect=True)
def test_other_numbers_of_ranks_resume_from_two(other_ranks, reference):
    found = sorted(other_ranks.glob("2-in-*.safetensors"))
    assert len(found) == len(CROSSED)
    for path in found:
        state, losses = read(path)
        check_close(state, reference["done"])
        np.testing.assert_allclose(losses, reference["losses"][HALF:], rtol=1e-5)


@pytest.mark.parametrize("other_ranks", [3], indirect=True)
def test_three_ranks_resume_bit_for_bit_with_dropout(other_ranks):
    """Check three ranks: sums depend on their order, and the last shards are shorter or empty."""
    for name in ("ddp",) if BROKEN else ("ddp", "fsdp", "zero2", "zero3-pieces"):
        facts = json.loads((other_ranks / f"{name}.json").read_text())
        assert facts["local_moments"] == pytest.approx(1.0 if name == "ddp" else 1 / 3, rel=0.05)
        assert all(math.isfinite(loss) for loss in facts["losses"])


def test_round_robin_gradients_are_refused(two):
    message = json.loads((two / "refused.json").read_text())["message"]
    assert re.search(r"zero_optimization.round_robin_gradients true: checkpoints would hold .* Remove the key\.$", message)


def test_the_loss_scale_is_the_same_under_every_engine(two):
    """Check the halving, and the growth after as many clean steps as in torch's GradScaler, which DDP uses."""
    found = json.loads((two / "scales.json").read_text())
    ddp = found["ddp"]
    assert all(theirs == ddp for theirs in found.values())
    assert ddp["first"][:3] == [[2.0**16, 0], [2.0**24, 1], [2.0**23, 0]], "the first, one loaded, one overflow"
    first = [scale for scale, _ in ddp["first"][1:]]
    overflows = sum(after < before for before, after in itertools.pairwise(first))
    rises = sum(after > before for before, after in itertools.pairwise(first))
    assert ddp["updates"] == ddp["steps"] - overflows, "an overflow is not an update"
    assert min(overflows, rises) > 2, "it rose and fell"
    assert {clean for _, clean in ddp["first"]} == {0, 1, 2}
