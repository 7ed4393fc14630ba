"""A solved and standardised head from the command line: equal on one and two ranks, and exported as a plain classifier."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agnews_dist.training.checkpoint import list_checkpoints, read_checkpoint

ARGUMENTS = ("--model.trainable_blocks", "0", "--model.standardize", "true", "--optim.solver", "lbfgs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the directories of the same run on one and on two ranks."""
    directories = [tmp_path_factory.mktemp(f"ranks{num_ranks}") for num_ranks in (1, 2)]
    return [small_run.finish(path, *ARGUMENTS, num_ranks=number) for number, path in enumerate(directories, start=1)]


def read_probabilities(run: Path, split: str) -> np.ndarray:
    lines = (run / f"predictions-{split}.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["probabilities"] for line in lines])


def test_solution_is_the_same_on_two_ranks(runs: list[Path]) -> None:
    one, two = ([read_checkpoint(path).state for path in list_checkpoints(run / "checkpoints")] for run in runs)
    assert one[0]["standard"] == two[0]["standard"], "the same bits"
    assert len(one) == len(two) == 1, "one checkpoint, at the end"
    for split in ("validation", "test"):
        np.testing.assert_allclose(read_probabilities(runs[1], split), read_probabilities(runs[0], split), rtol=0, atol=1e-4)
    result = json.loads((runs[0] / "result.json").read_text())
    assert result["num_steps"] == one[0]["step"] > 3


def test_hugging_face_computes_the_folded_head(runs: list[Path]) -> None:
    rows = (small_run.write_inputs() / "rows" / "test.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(runs[0] / "model").eval()
    encoded = AutoTokenizer.from_pretrained(runs[0] / "model")(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found_NC = model(**encoded).logits.softmax(dim=-1).numpy()
    np.testing.assert_allclose(found_NC, read_probabilities(runs[0], "test"), rtol=0, atol=1e-5)
