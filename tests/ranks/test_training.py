"""One, two and three ranks train the weights that a plain loop trains with Hugging Face's model on the same global batches.

SGD, not Adam: the true gradient of the key bias is zero, and Adam would scale its rounding noise up to a full step.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server
from support.processes import REPOSITORY
from support.toy import our_name, toy_reference_model, toy_split

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings

LENGTHS = np.random.default_rng(7).integers(1, 31, 64).tolist()
RANKS = (1, 2, 3)
CASES = {
    # 64 = 9 x 7 + 1: one batch leaves ranks without a row. The limits make some steps take several micro-batches.
    "examples": {"settings": {"global_batch_size": 7, "bucket_window": 3, "seed": 5}, "max_tokens_per_rank": 45},
    "tokens": {"settings": {"global_token_budget": 90, "bucket_window": 2, "seed": 6}, "max_tokens_per_rank": 40},
}
EPOCHS, LR = 2, 0.5


def case_for_worker(name: str) -> dict:
    return {"name": name, "epochs": EPOCHS, "lr": LR, **CASES[name]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("training")
    task = json.dumps({"lengths": LENGTHS, "cases": [case_for_worker(name) for name in CASES]})
    for num_ranks in RANKS:
        fork_server.run_ranks(num_ranks, str(REPOSITORY / "tests" / "ranks" / "training_worker.py"), str(directory), task)
    return directory


def global_batches(name: str) -> list[list[int]]:
    settings = PlanSettings(**CASES[name]["settings"])
    return [ids.tolist() for epoch in range(EPOCHS) for ids in plan(np.array(LENGTHS), settings, epoch=epoch).global_batches()]


def train_reference(batches: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train Hugging Face's classifier: attention mask, whole global batches, mean loss, clipping at 1, SGD."""
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS)
    labels_N = torch.from_numpy(toy_split(LENGTHS).labels)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=LR), []
    for ids in batches:
        logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_N[ids])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return {our_name(name): value.detach() for name, value in trained.items()}, losses


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a weight."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("name", CASES)
def test_ranks_see_the_same_global_batches(saved, name):
    expected = [sorted(ids) for ids in global_batches(name)]
    num_micro_batches, num_empty = set(), 0
    for num_ranks in RANKS:
        seen = json.loads((saved / f"{name}-rank0of{num_ranks}.json").read_text())["seen"]
        found = [[row for rank in step for micro in rank for row in micro] for step in seen]
        assert [sorted(ids) for ids in found] == expected
        for step in seen:
            assert len({len(rank) for rank in step}) == 1
            num_micro_batches.add(len(step[0]))
            num_empty += sum(not any(rank) for rank in step)
    assert len(num_micro_batches) > 1, "the case has steps of one and of several micro-batches"
    assert num_empty > 0 or name != "examples", "the case has ranks without a row"


@pytest.mark.parametrize("name", CASES)
def test_trained_weights_equal_the_reference(saved, name):
    batches = global_batches(name)
    expected, losses = train_reference(batches)
    assert len(losses) >= 20
    for num_ranks in RANKS:
        for rank in range(num_ranks):
            file = saved / f"{name}-rank{rank}of{num_ranks}"
            assert distance(load_file(f"{file}.safetensors"), expected) < 2e-5
            assert json.loads(Path(f"{file}.json").read_text())["losses"] == pytest.approx(losses, abs=1e-5)
    # The negative controls: training moved the weights far more, and the order of the batches shows in them.
    untrained, _ = train_reference([])
    assert distance(untrained, expected) > 1e-2
    swapped, _ = train_reference([*batches[1:], batches[0]])
    assert distance(swapped, expected) > 1e-3
