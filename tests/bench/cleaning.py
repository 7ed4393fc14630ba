"""Planted label errors: how many of them `agnews-dist clean` finds, what leaving rows out changes, and what it costs.

    OMP_NUM_THREADS=1 python tests/bench/cleaning.py quality --output DIR [--seeds 0 1 2]
    OMP_NUM_THREADS=2 python tests/bench/cleaning.py cost --output DIR [--rounds 2] [--quick]

`quality`: 2 % of the training rows of held_out.py get another class, all equally likely; validation and test keep theirs.
Precision and recall are those of the first rows of label_issues.csv. Two trainings are the limits: on true labels, and without
exactly the planted rows. `cost`: seconds of `train` and of `clean` with the same settings, each a process with an empty cache.
Two jobs: that of sweep.py (GPT-2 small's shape, 256 texts), and the shared checkpoint with all rows.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from held_out import append, common_settings, run_command, write_rows
from sweep import BENCH, arguments, child_environment, cpu_model, measure, save_weights

from agnews_dist.report.result_files import versions

PLANTED = 0.02
SHARES = {"as estimated": (), "2 %": ("--share", "0.02"), "4 %": ("--share", "0.04")}


def plant(rows: Path, seed: int) -> np.ndarray:
    """Give 2 % of the training rows another class; return their numbers."""
    table = parquet.read_table(rows / "train.parquet")
    labels_N, random = table["label"].to_numpy().copy(), np.random.default_rng(seed)
    planted_P = np.sort(random.permutation(len(table))[: round(PLANTED * len(table))])
    num_classes = int(labels_N.max()) + 1
    labels_N[planted_P] = (labels_N[planted_P] + random.integers(1, num_classes, len(planted_P))) % num_classes
    parquet.write_table(pa.table({"text": table["text"], "label": labels_N}), rows / "train.parquet")
    return planted_P


def score_list(path: Path, planted_P: np.ndarray, num_rows: int) -> dict[str, dict[str, float]]:
    """Return precision and recall of the first 2 and 4 % of the training rows' list."""
    with path.open(encoding="utf-8", newline="") as file:
        ranked = [int(row["row"]) for row in csv.DictReader(file) if row["split"] == "train"]
    found = {}
    for share in (0.02, 0.04):
        first = ranked[: round(share * num_rows)]
        hits = len(np.intersect1d(first, planted_P))
        found[f"{share:.0%}"] = {"precision": hits / len(first), "recall": hits / len(planted_P)}
    return found


def train(name: str, rows: Path, output: Path, *words: str) -> float:
    """Train once; return the accuracy on the test split."""
    run_command(
        "train", *common_settings(rows, output), "--run.name", name, "--run.overwrite", "--report.write", "false", *words
    )
    return json.loads((output / "runs" / name / "result.json").read_text(encoding="utf-8"))["splits"]["test"]["accuracy"]


def measure_quality(seed: int, output: Path) -> None:
    """Plant errors with a seed, clean with several shares, and train the two limits."""
    rows = write_rows(output / f"rows-{seed}")
    true = train(f"true-{seed}", rows, output)
    planted_P = plant(rows, seed)
    names = output / f"planted-{seed}.txt"
    names.write_text("".join(f"train.parquet row {row}\n" for row in planted_P), encoding="utf-8")
    limits = {"true labels": true, "without the planted": train(f"planted-{seed}", rows, output, "--data.exclude", str(names))}
    append(output / "log.jsonl", {"what": "limits", "seed": seed, "planted": len(planted_P), "test_accuracy": limits})
    for share, words in SHARES.items():
        path = output / f"clean-{seed}"
        run_command("clean", *common_settings(rows, output), "--output", str(path), "--run.overwrite", *words)
        report = json.loads((path / "clean.json").read_text(encoding="utf-8"))
        issues = score_list(path / "label_issues.csv", planted_P, report["rows"])
        with (path / "exclude.csv").open(encoding="utf-8", newline="") as file:
            hits = sum(int(row["row"]) in set(planted_P.tolist()) for row in csv.DictReader(file))
        kept = {key: report[key] for key in ("rows", "estimated_errors", "excluded", "comparison")}
        fields = {"what": "clean", "seed": seed, "share": share, "list": issues, "planted_excluded": hits}
        append(output / "log.jsonl", {**fields, **kept})


def measure_cost(name: str, settings: list[str], output: Path, threads: int) -> None:
    """Measure `train` and `clean` with the same settings, each from an empty cache."""
    seconds, cache = {}, output / "cost-cache"
    for command in ("train", "clean"):
        shutil.rmtree(cache, ignore_errors=True)
        words = [command, *settings, "--data.cache_dir", str(cache), "--run.overwrite"]
        words += ["--run.name", name, "--report.write", "false"]
        seconds[command], _, _ = measure([sys.executable, "-m", "agnews_dist", *words], child_environment(threads))
    parts = json.loads((output / "runs" / f"{name}-clean" / "clean.json").read_text(encoding="utf-8"))["seconds"]
    extra = (seconds["clean"] - seconds["train"]) / seconds["train"]
    append(output / "log.jsonl", {"what": "cost", "job": name, **seconds, "parts": parts, "extra_cost": round(extra, 3)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "cost"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the planted errors")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of cost")
    parser.add_argument("--quick", action="store_true", help="cost of a tiny model on few texts, to see that it works")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"what": "job", "command": " ".join(sys.argv), "cpu": cpu_model(), "versions": versions()}
    append(output / "log.jsonl", facts)
    if args.what == "quality":
        for seed in args.seeds:
            measure_quality(seed, output)
        return
    job = output / "job"
    quick = ["--quick"] if args.quick else []
    subprocess.run([sys.executable, str(BENCH / "fast_path/job.py"), str(job), *quick], env=child_environment(2), check=True)
    save_weights(job / "model")
    work = {"small": arguments(job, output / "runs", output / "cost-cache", "small")}
    if not args.quick:
        work["mini"] = common_settings(write_rows(output / "rows"), output)
    for _ in range(args.rounds):
        for name, settings in work.items():
            measure_cost(name, settings, output, args.threads)


if __name__ == "__main__":
    main()
