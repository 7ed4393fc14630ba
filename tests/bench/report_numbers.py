"""Trust in the numbers of the report: planted label errors, intervals, equal runs that are called different.

    PYTHONPATH=tests python tests/bench/report_numbers.py --shared ../shared > LOG.jsonl

One JSON object per line. The last lines are the time of the report of the 12,423 rows, part by part.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet
from sklearn.metrics import f1_score

from agnews_dist.evaluation.baselines import tfidf_baseline
from agnews_dist.evaluation.intervals import bootstrap_macro_f1, wilson_interval
from agnews_dist.evaluation.label_errors import find_near_duplicates, probabilities_out_of_fold, rank_label_issues
from agnews_dist.evaluation.paired import mcnemar_exact

PLENTY = {"max_rows": 10**6, "max_seconds": 600.0}
POPULATIONS = [(4, 40, 0.95), (4, 1_000, 0.86), (4, 7_600, 0.94), (50, 250, 0.9), (100, 500, 0.7), (300, 3_000, 0.8)]
"""(classes, texts, accuracy)"""


def plant_errors(texts: list[str], labels_N: np.ndarray, seeds: int) -> Iterator[dict[str, Any]]:
    """Give 2 % of the rows another class, and look for them in the first 4 % of the list."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(labels_N), int(0.02 * len(labels_N)), replace=False)
        wrong_N = labels_N.copy()
        wrong_N[rows] = (labels_N[rows] + rng.integers(1, 4, len(rows))) % 4
        begin = time.perf_counter()
        found = probabilities_out_of_fold(texts, wrong_N, 4, **PLENTY)
        issues = rank_label_issues(wrong_N[found.rows_N], found.probabilities_NC, limit=int(0.04 * len(labels_N)))
        listed = found.rows_N[[issue.row for issue in issues]]
        share = float(np.isin(rows, listed).mean())
        yield {"what": "label errors", "seed": seed, "found": share, "seconds": time.perf_counter() - begin}


def cover(num_splits: int) -> Iterator[dict[str, Any]]:
    """Count how often an interval holds the true value: the score of a split 100 times as large."""
    for num_classes, num_rows, accuracy in POPULATIONS:
        rng = np.random.default_rng(0)

        def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
            labels_N = rng.integers(0, num_classes, number)  # noqa: B023
            others_N = (labels_N + rng.integers(1, num_classes, number)) % num_classes  # noqa: B023
            return labels_N, np.where(rng.random(number) < accuracy, labels_N, others_N)  # noqa: B023

        truth = f1_score(*draw(100 * num_rows), average="macro")
        held, shown, held_accuracy = 0, 0, 0
        for _ in range(num_splits):
            labels_N, predictions_N = draw(num_rows)
            if (interval := bootstrap_macro_f1(labels_N, predictions_N, num_samples=400)) is not None:
                shown += 1
                held += interval.low <= truth <= interval.high
            wilson = wilson_interval(int((labels_N == predictions_N).sum()), num_rows)
            held_accuracy += wilson.low <= accuracy <= wilson.high
        population = {"classes": num_classes, "texts": num_rows, "accuracy": accuracy, "splits": num_splits}
        shares = {"macro_f1": held / max(1, shown), "shown": shown / num_splits, "wilson": held_accuracy / num_splits}
        yield {"what": "coverage", **population, **shares}


def compare(runs: list[Path]) -> Iterator[dict[str, Any]]:
    """Compare every pair of runs that differ in their seeds only."""
    rows = [[json.loads(line) for line in (run / "predictions-validation.jsonl").open()] for run in runs]
    labels_N = np.array([row["label"] for row in rows[0]])
    predictions = [np.array([row["prediction"] for row in each]) for each in rows]
    for one, other in combinations(range(len(runs)), 2):
        test = mcnemar_exact(labels_N, predictions[one], predictions[other])
        yield {"what": "seeds", "pair": [runs[one].name, runs[other].name], "p": test.p_value}


def measure_parts(texts: list[str], labels_N: np.ndarray) -> Iterator[dict[str, Any]]:
    """Measure the parts of an analysis of all rows."""
    begin = time.perf_counter()
    result = tfidf_baseline(texts[1000:], labels_N[1000:], {"test": texts[:1000]}, {"test": labels_N[:1000]}, **PLENTY)
    yield {
        "what": "time",
        "part": "tf-idf baseline",
        "seconds": time.perf_counter() - begin,
        "accuracy": result.scores["test"].accuracy,
    }
    begin = time.perf_counter()
    find_near_duplicates(texts, range(50))
    yield {"what": "time", "part": "near-duplicates of 50 rows", "seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--splits", type=int, default=300)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="runs of one setting with different seeds")
    options = parser.parse_args()
    table = parquet.read_table(options.shared / "data" / "ag_news" / "train-00000-of-00001.parquet")
    texts, labels_N = table["text"].to_pylist(), table["label"].to_numpy()
    for rows in (
        plant_errors(texts, labels_N, options.seeds),
        cover(options.splits),
        compare(options.runs),
        measure_parts(texts, labels_N),
    ):
        for row in rows:
            print(json.dumps(row, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
