"""Command `predict` on one and two ranks: the same bytes, one output, and an end for both if one fails."""

import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import fork_server
from support.saved_model import save_classifier

from agnews_dist.data.synthetic import CLASS_NAMES, generate
from agnews_dist.evaluation.predictor import TEXTS_PER_CHUNK

# Two chunks; the first has texts of many lengths, so that both ranks have batches.
TEXTS = [text for text, _ in generate(400, 3, "test")] + [f"text {i}" for i in range(TEXTS_PER_CHUNK)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    save_classifier(folder / "model", max_length=60)
    pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_parquet(folder / "texts.parquet")
    return folder


def run_predict(num_ranks: int, folder: Path, *arguments: object, check: bool = True):
    words = ["-m", "agnews_dist", "predict", "--model.name", str(folder / "model"), "--engine.device", "cpu"]
    words += map(str, arguments)
    if num_ranks == 1:
        return fork_server.run_python(*words, check=check)
    return fork_server.run_ranks(num_ranks, *words, check=check)


def test_any_number_of_ranks_gives_the_same_answers(folder: Path) -> None:
    outputs = []
    for num_ranks in (1, 2):
        output = folder / f"{num_ranks}.parquet"
        done = run_predict(num_ranks, folder, "--file", folder / "texts.parquet", "--output", output, "--top_k", "all")
        assert done.stdout == ""
        assert "warning: 140 of 5400 texts were truncated to 60 tokens." in done.stderr
        # On a slow machine also lines of progress.
        assert len([line for line in done.stderr.splitlines() if " classify: " not in line]) == 1
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    answers = pd.read_parquet(folder / "1.parquet")
    assert answers["text"].tolist() == TEXTS
    assert answers["prediction"].nunique() > 1
    printed = run_predict(2, folder, "--file", folder / "texts.parquet").stdout
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["id"] for row in rows] == list(range(len(TEXTS)))
    columns = [answers[f"probability_{name}"].tolist() for name in CLASS_NAMES]
    assert [tuple(map(np.float32, row["probabilities"].values())) for row in rows] == list(zip(*columns, strict=True))


def test_texts_that_come_slowly_are_waited_for_beyond_the_limit_of_a_collective(folder: Path) -> None:
    os.mkfifo(folder / "slow.txt")

    def write() -> None:
        with (folder / "slow.txt").open("w") as pipe:
            pipe.write("a\n" * 2 * TEXTS_PER_CHUNK)
            pipe.flush()
            time.sleep(14)
            pipe.write("b\n")

    writer = threading.Thread(target=write)
    writer.start()
    done = run_predict(2, folder, "--file", folder / "slow.txt", "--engine.timeout_seconds", 8)
    writer.join()
    assert len(done.stdout.splitlines()) == 2 * TEXTS_PER_CHUNK + 1
    waits = re.findall(r"\[rank 1/2\] waits [5-9] s so far: rank 0 .*texts.*; no time limit while it lives", done.stderr)
    assert len(waits) == 1


def test_a_failure_of_rank_0_ends_both_ranks(folder: Path) -> None:
    """Check a bad row before the first answer, and a bad line of a pipe after it."""
    (folder / "bad.csv").write_text('text\na\n\n" "\n')
    done = run_predict(2, folder, "--file", folder / "bad.csv", "--output", folder / "bad.parquet", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("[rank 0/2] error: text is empty or only white space in 1 row (bad.csv row 2)")
    os.mkfifo(folder / "pipe.txt")
    content = "a\n" * 2 * TEXTS_PER_CHUNK + "\n"
    writer = threading.Thread(target=(folder / "pipe.txt").write_text, args=(content,))
    writer.start()
    done = run_predict(2, folder, "--file", folder / "pipe.txt", "--output", folder / "bad.parquet", check=False)
    writer.join()
    assert done.returncode == 1
    assert f"pipe.txt line {2 * TEXTS_PER_CHUNK + 1})" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir() if "bad.parquet" in path.name] == []
