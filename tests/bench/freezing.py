"""Freezing schedules against fixed numbers of trained blocks: accuracy and training time, over seeds, on the shared real rows.

    python tests/bench/freezing.py --output DIR [--seeds 0 1 2 3 4] [--what 2 2,1] [--vary optim.epochs=4 ...]

Every run is a process of its own on the shared small GPT-2, with the settings of accuracy.py. `2,1` trains two blocks in the
first epoch and one in the others. Features are kept in memory, so every run computes its own: `train` counts that, and so does
`features`. Evaluations run all blocks that are trained in the first epoch. The order of the runs changes with the seed. One
JSON line per run goes to DIR/log.jsonl and to the screen, and a table of means and standard errors ends it. Differences are
paired by seed.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy

SCHEDULES = ("1", "2", "3", "2,1", "3,2,1")


def measure(shared: Path, output: Path, schedule: str, seed: int, settings: dict[str, str], ranks: int) -> dict[str, Any]:
    """Train once; return scores and seconds."""
    blocks = {"model.trainable_blocks": schedule.split(",")[0]}
    blocks |= {"model.freeze_schedule": schedule} if "," in schedule else {}
    places = {"engine.feature_cache": "host", "data.cache_dir": str(output / "cache")}
    begin = time.perf_counter()
    found = accuracy.ours(shared, output / schedule, "pretrained", seed, ranks, settings | blocks | places)
    result = json.loads((output / schedule / f"pretrained-{seed}" / "result.json").read_text(encoding="utf-8"))
    scores = {name: split["accuracy"] for name, split in result["splits"].items()}
    wall = round(time.perf_counter() - begin, 1)
    return {"schedule": schedule, "seed": seed, "accuracy": scores, "seconds": found["seconds"], "wall_seconds": wall}


def format_mean(values: Sequence[float], digits: int) -> str:
    """Format a mean with its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} +- {error:.{digits}f}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row per schedule; differences are to one block, seed by seed."""
    of = {(row["schedule"], row["seed"]): row for row in rows}
    schedules, seeds = list(dict.fromkeys(row["schedule"] for row in rows)), sorted({row["seed"] for row in rows})
    splits = list(rows[0]["accuracy"])
    print(
        "| schedule | "
        + " | ".join(f"{name} accuracy | gain over {schedules[0]}" for name in splits)
        + " | train s | features s | evaluation s |"
    )
    print("|---" * (2 * len(splits) + 4) + "|")
    for schedule in sorted(schedules, key=schedules.index):
        cells = [schedule]
        for name in splits:
            own, base = ([of[each, seed]["accuracy"][name] for seed in seeds] for each in (schedule, schedules[0]))
            cells += [format_mean(own, 4), format_mean([a - b for a, b in zip(own, base, strict=True)], 4)]
        for stage in ("train", "prefix", "eval"):
            cells.append(format_mean([of[schedule, seed]["seconds"][stage] for seed in seeds], 2))
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--what", nargs="+", default=list(SCHEDULES), help="schedules; the first is the base of differences")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--vary", nargs="*", default=[], metavar="KEY=VALUE", help="settings that differ")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    shared = Path(os.environ.get("AGNEWS_SHARED", accuracy.REPOSITORY.parent / "shared"))
    args.output.mkdir(parents=True, exist_ok=True)
    settings = accuracy.SETTINGS | dict(pair.split("=", 1) for pair in args.vary)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        # Another one is first with every seed: a machine may slow down with time.
        begin = args.seeds.index(seed) % len(args.what)
        for schedule in (*args.what[begin:], *args.what[:begin]):
            rows.append(
                {"varied": args.vary, "ranks": args.ranks, **measure(shared, args.output, schedule, seed, settings, args.ranks)}
            )
            print(json.dumps(rows[-1], allow_nan=False), flush=True)
            with (args.output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(rows[-1], allow_nan=False) + "\n")
    print_table(sorted(rows, key=lambda row: args.what.index(row["schedule"])))


if __name__ == "__main__":
    main()
