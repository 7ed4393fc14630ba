"""Ensembles and distilled members against single ones, on a test split that neither trains nor selects anything.

    OMP_NUM_THREADS=1 python tests/bench/ensembles.py --output DIR [--groups 5] [--size 5]

Every group of seeds is one `agnews-dist sweep --distil` on the shared real rows and checkpoint (held_out.py), with the settings
of accuracy.py. Groups have no seed in common. One JSON line per group goes to DIR/log.jsonl, tests over the groups end it. A
command that was killed continues: finished groups are read, members of an unfinished one are kept.

"best, temperature" is the best single member with a temperature fitted on validation, as a distilled member has one.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from held_out import append, common_settings, run_command, write_rows
from scipy.stats import permutation_test, ttest_rel

from agnews_dist.evaluation.calibration import apply_temperature, calibration_curve, expected_calibration_error, fit_temperature
from agnews_dist.evaluation.paired import mcnemar_exact

METRICS = {"accuracy": "accuracy", "calibration_error": "ECE", "loss": "loss"}
BASE = "mean single"


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return labels_N and probabilities_NC of a file of predictions."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array([line["label"] for line in lines]), np.array([line["probabilities"] for line in lines])


def score(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """Return the metrics of some probabilities."""
    predictions_N = probabilities_NC.argmax(axis=1)
    curve = calibration_curve(labels_N, predictions_N, probabilities_NC.max(axis=1))
    own_N = probabilities_NC[np.arange(len(labels_N)), labels_N]
    return {
        "accuracy": float(np.mean(predictions_N == labels_N)),
        "calibration_error": float(expected_calibration_error(curve)),
        "loss": float(-np.log(own_N.clip(1e-12)).mean()),
    }


def measure(group: int, size: int, rows: Path, output: Path) -> dict[str, Any]:
    """Run the sweep of one group; return its line of the log."""
    name, seeds = f"group-{group}", f"{group * size}..{group * size + size - 1}"
    path = output / "runs" / name
    if not (path / "sweep.json").exists():
        run_command("sweep", *common_settings(rows, output), "--run.name", name, "--run.seed", seeds, "--distil")
    report = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    found = {row["name"]: {key: row["test"][key] for key in METRICS} for row in report["ensemble"]}
    temperature = fit_temperature(*read_predictions(path / "best" / "predictions-validation.jsonl"))
    labels_N, best_NC = read_predictions(path / "best" / "predictions-test.jsonl")
    found["best, temperature"] = score(labels_N, apply_temperature(best_NC, temperature))
    _, distilled_NC = read_predictions(path / "distilled" / "predictions-test.jsonl")
    paired = mcnemar_exact(labels_N, best_NC.argmax(axis=1), distilled_NC.argmax(axis=1))
    return {
        "group": group,
        "seeds": seeds,
        "num_test": len(labels_N),
        "test": found,
        "singles": report["selected"]["test"]["accuracy"]["values"],
        "temperature": report["ensemble"][-1]["temperature"],
        "best_temperature": temperature,
        "distilled_against_best": paired._asdict(),
        "versions": report["versions"],
    }


def compare(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every kind with the mean single member of its group: a paired t-test, and all sign flips."""
    tests = []
    for name in [name for name in groups[0]["test"] if name != BASE]:
        for metric in METRICS:
            ours, base = ([group["test"][kind][metric] for group in groups] for kind in (name, BASE))
            differences = np.subtract(ours, base)
            flips = permutation_test((ours, base), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples")
            tests.append({
                "name": name,
                "metric": metric,
                "difference": float(differences.mean()),
                "deviation": float(differences.std(ddof=1)),
                "p_t": float(ttest_rel(ours, base).pvalue),
                "p_flips": float(flips.pvalue),
            })  # fmt: skip
    return tests


def print_tables(groups: list[dict[str, Any]], tests: list[dict[str, Any]]) -> None:
    """Print the means over the groups, and the tests, as RESULTS.md has them."""
    print("| what | accuracy | ECE | loss |\n|---|---|---|---|")
    for name in groups[0]["test"]:
        cells = []
        for metric in METRICS:
            values = [group["test"][name][metric] for group in groups]
            cells.append(f"{mean(values):.4f} +- {stdev(values):.4f}")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n| against the {BASE} | score | difference | p, t-test | p, sign flips |\n|---|---|---|---|---|")
    for test in tests:
        difference = f"{test['difference']:+.4f} +- {test['deviation']:.4f}"
        print(f"| {test['name']} | {METRICS[test['metric']]} | {difference} | {test['p_t']:.4f} | {test['p_flips']:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--size", type=int, default=5, help="seeds of a group")
    args = parser.parse_args()
    output = args.output.resolve()
    rows = write_rows(output / "rows")
    (output / "log.jsonl").unlink(missing_ok=True)
    groups = []
    for number in range(args.groups):
        groups.append(measure(number, args.size, rows, output))
        append(output / "log.jsonl", groups[-1])
    tests = compare(groups)
    for test in tests:
        append(output / "log.jsonl", test)
    print_tables(groups, tests)


if __name__ == "__main__":
    main()
