"""One, two, three and eight ranks give the same bits, also with fewer texts than ranks, many classes and no labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from support import fork_server
from support.processes import REPOSITORY

RANKS = (1, 2, 3, 8)
LENGTHS = np.random.default_rng(3).integers(1, 31, 41).tolist()


def make_case(num_classes: int, lengths: list[int], *, is_labelled: bool = True) -> dict[str, Any]:
    labels = np.random.default_rng(4).integers(0, num_classes, len(lengths)) if is_labelled else np.full(len(lengths), -1)
    return {"num_classes": num_classes, "lengths": lengths, "labels": labels.tolist()}


CASES = {
    "two-classes": make_case(2, LENGTHS),
    "many-classes": make_case(300, LENGTHS),
    "one-row": make_case(3, [5]),
    "fewer-rows-than-ranks": make_case(257, [40, 50, 60]),
    "no-labels": make_case(300, LENGTHS, is_labelled=False),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    for num_ranks in RANKS:
        worker = REPOSITORY / "tests" / "ranks" / "evaluation_worker.py"
        fork_server.run_ranks(num_ranks, str(worker), str(directory), json.dumps(CASES))
    return directory


@pytest.mark.parametrize("name", CASES)
def test_scores_and_predictions_have_the_same_bits_on_any_number_of_ranks(saved: Path, name: str) -> None:
    case = CASES[name]
    expected, scores = (
        load_file(saved / f"{name}-rank0of1.safetensors"),
        json.loads((saved / f"{name}-rank0of1.json").read_text()),
    )
    for num_ranks in RANKS:
        for rank in range(num_ranks):
            path = saved / f"{name}-rank{rank}of{num_ranks}"
            found = load_file(path.with_suffix(".safetensors"))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), path.name
            assert json.loads(path.with_suffix(".json").read_text()) == scores, path.name
    labels, predictions = np.array(case["labels"]), expected["predictions"].numpy()
    assert expected["labels"].tolist() == case["labels"]
    assert ("classes" in expected) == (case["num_classes"] > 256)
    if case["labels"][0] == -1:
        assert scores is None
        return
    assert scores["num_correct"] == int((labels == predictions).sum())
    assert scores["macro_f1"] == f1_score(labels, predictions, average="macro", zero_division=0)
