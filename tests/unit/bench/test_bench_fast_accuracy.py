"""The benchmark of the fast path's accuracy: its tables are the log's, its sums are right, its bf16 features are rounded."""

import importlib
import itertools
import json

import numpy as np
import pytest
import torch
from support.processes import REPOSITORY

from agnews_dist.model.prefix import Features

BENCH = REPOSITORY / "tests" / "bench"
LOG = BENCH / "logs" / "2026-11-22-fast-accuracy.jsonl"
SEEDS = {0, 1, 2, 3, 4}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def logged():
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]


def results():
    return (BENCH / "RESULTS.md").read_text(encoding="utf-8")


def cell(values, sign=""):
    return f"{values.mean():{sign}.4f} +- {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def assert_compared(first, second, name):
    """`first`, `second`: seed to row. The line of the second is in RESULTS.md, with differences seed by seed."""
    assert first.keys() == second.keys() == SEEDS
    one, other = (
        np.array([[max(row["accuracy"]), row["accuracy"][-1], row["loss"][-1]] for _, row in sorted(side.items())])
        for side in (first, second)
    )
    cells = [cell(values, sign) for column in range(3) for values, sign in both(one, other, column)]
    assert f"| {name} | 5 | {' | '.join(cells)} |" in results()


def both(one, other, column):
    return (other[:, column], ""), ((other - one)[:, column], "+")


def test_every_run_was_made_once_and_its_best_epoch_is_that_of_its_predictions():
    runs = [row for row in logged() if row["what"] == "run"]
    assert len({(row["path"], row["seed"], row["rows"]) for row in runs}) == len(runs)
    assert all(row["best_accuracy"] in row["accuracy"] and len(row["predictions"]) == 1000 for row in runs)


def test_the_table_of_the_two_paths_is_what_the_log_says():
    runs = [row for row in logged() if row["what"] == "run" and row["rows"] == 1000]
    fast, plain = ({row["seed"]: row for row in runs if row["path"] == path} for path in ("fast", "plain"))
    assert_compared(fast, plain, "plain, 1000 rows")


def test_the_run_without_dropout_is_what_the_text_says():
    (row,) = (row for row in logged() if row["what"] == "no-dropout")
    assert row["same_names"]
    reading = " ".join(results().split())
    said = f"{row['flipped']} of 1,000 predictions differ, probabilities by at most {row['largest_probability_difference']:.1e}"
    assert said in reading
    assert f"weights by at most {row['largest_weight_difference']:.1e}" in reading


def test_the_tables_of_bf16_features_are_what_the_log_says():
    rows = logged()
    scored = [row for row in rows if row["what"] == "scored"]
    assert len(scored) == 3
    for row in scored:
        cells = [f"{row[key]:.4f}" for key in ("largest_logit_difference", "mean_logit_difference")]
        cells += [str(row["flipped"]), f"{row['accuracy']:.4f}", f"{row['accuracy_fp32']:.4f}"]
        assert (
            f"| {row['features']} in bf16 | {row['split']} | {row['num_rows']:,} | {' | '.join(cells)} |" in results()
        )
    trained = [row for row in rows if row["what"] == "trained"]
    assert len(trained) == 2 * len(SEEDS)
    fp32, stored = ({row["seed"]: row for row in trained if row["features"] == kind} for kind in ("fp32", "stored"))
    assert_compared(fp32, stored, "rounded to bf16")


def test_the_counts_of_differing_predictions_are_what_the_log_says():
    rows, reading = logged(), " ".join(results().split())
    fast, plain = (
        {row["seed"]: row for row in rows if row["what"] == "run" and (row["path"], row["rows"]) == (path, 1000)}
        for path in ("fast", "plain")
    )
    fp32, stored = (
        {row["seed"]: row for row in rows if row["what"] == "trained" and row["features"] == kind}
        for kind in ("fp32", "stored")
    )
    between = f"{differing(fast, plain)} of 1,000 predictions differ between the paths at the same seed"
    assert f"{between}, {differing(fast)} between two seeds of the fast path" in reading
    rounded = f"{differing(fp32, stored)} of 1,000 predictions of the last epoch differ at the same seed"
    assert f"{rounded}, {differing(fp32)} between seeds" in reading


def differing(first, second=None):
    """Fewest and most predictions that differ between two sides at the same seed, or between two seeds of one side."""
    pairs = itertools.combinations(first.values(), 2)
    compared = pairs if second is None else ((first[seed], second[seed]) for seed in first)
    counts = [
        sum(a != b for a, b in zip(one["predictions"], other["predictions"], strict=True)) for one, other in compared
    ]
    return f"{min(counts)} to {max(counts)}"


def test_the_loop_of_the_bf16_comparison_is_the_training_of_the_package():
    rows = logged()
    (ours,) = (row for row in rows if row["what"] == "trained" and (row["features"], row["seed"]) == ("fp32", 0))
    (run,) = (row for row in rows if row["what"] == "run" and (row["path"], row["rows"]) == ("fast", None))
    assert run["seed"] == 0
    assert (ours["accuracy"], ours["loss"]) == (run["accuracy"], run["loss"])


def test_the_table_is_paired_seed_by_seed(module):
    def row(path, seed, accuracy, loss):
        return {"what": "run", "path": path, "seed": seed, "rows": 9, "accuracy": accuracy, "loss": loss}

    lines = list(
        module("fast_accuracy").tables(
            [
                row("fast", 0, [0.8, 0.7], [0.4, 0.5]),
                row("fast", 1, [0.6, 0.6], [0.5, 0.6]),
                row("plain", 1, [0.7, 0.7], [0.5, 0.6]),  # in another order than the other side's
                row("plain", 0, [0.8, 0.8], [0.4, 0.4]),
            ]
        )
    )
    assert lines == [
        "| fast, 9 rows | 2 | 0.7000 +- 0.1000 |  | 0.6500 +- 0.0500 |  | 0.5500 +- 0.0500 |  |",
        "| plain, 9 rows | 2 | 0.7500 +- 0.0500 | +0.0500 +- 0.0500 | 0.7500 +- 0.0500 | +0.1000 +- 0.0000 "
        "| 0.5000 +- 0.1000 | -0.0500 +- 0.0500 |",
    ]


def test_what_the_log_holds_is_not_run_again(module, tmp_path):
    done = [{"what": "run", "path": path, "seed": seed, "rows": 5} for path in ("fast", "plain") for seed in (0, 1)]
    left = module("fast_accuracy").pairs([0, 1], ["fast", "plain"], 5, tmp_path, done)
    assert list(left) == []
    assert list(module("fast_accuracy").no_dropout(5, tmp_path, [{"what": "no-dropout"}])) == []


def test_rounded_features_are_bf16_of_the_kept_ones(module):
    hidden_BTD, lengths_B = torch.tensor([[[1.0, 1.001, -3.14159]]]), torch.tensor([1])
    found = module("fast_accuracy_bf16").rounded(lambda batch: Features(hidden_BTD, lengths_B), None)
    assert found.hidden_BTD.dtype == torch.bfloat16
    assert found.hidden_BTD.float().tolist() == [[[1.0, 1.0, -3.140625]]]
    assert found.lengths_B is lengths_B
