"""Does the fast path, or keeping features in bf16, change what is learned? On the shared real rows and small trained GPT-2.

    python tests/bench/fast_accuracy.py pairs LOG --output DIR [--rows N] [--seeds 0 1 ...] [--paths fast plain]
    python tests/bench/fast_accuracy.py no-dropout LOG --output DIR [--rows N]
    python tests/bench/fast_accuracy.py bf16 LOG --output DIR [--seeds 0 1 ...]
    python tests/bench/fast_accuracy.py table LOG

One JSON line per run is appended to LOG at once; what is in it already is not run again. `pairs`: `agnews_dist.train` as a
process of its own, default settings, once with kept features and once with `engine.fast_path false`; the same seed has the same
batches and the same initial head, but other dropout masks. `no-dropout`: one such pair of a checkpoint whose config has no
dropout, where trained weights and predictions must agree. `bf16`: a trained suffix on features rounded to bf16, or computed in
bf16, against fp32 ones; and training on rounded ones. `--rows` limits the training rows; default: all.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
PATHS = {"fast": ("--engine.feature_cache", "disk"), "plain": ("--engine.fast_path", "false")}
Row = dict[str, Any]


def shared() -> Path:
    return Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared"))


def train(path: str, *, seed: int, rows: int | None, model: Path, output: Path, name: str) -> Row:
    """One run of the package in a process of its own; its files stay in `output`/`name`."""
    command = [sys.executable, "-m", "agnews_dist.train", "--data.source", str(shared() / "data" / "ag_news")]
    command += ["--model.name", str(model), "--run.seed", str(seed), "--data.cache_dir", str(output / "cache")]
    command += [
        "--run.dir",
        str(output),
        "--run.name",
        name,
        "--run.overwrite",
        "true",
        *PATHS[path],
        "--report.write",
        "false",
    ]
    command += ["--data.limit_train", str(rows)] if rows else []
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    result = json.loads((output / name / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (output / name / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [event for event in events if event["event"] == "EvalDone"]
    return {
        "path": path,
        "seed": seed,
        "rows": rows,
        "accuracy": [event["accuracy"] for event in scored],
        "loss": [round(event["loss"], 6) for event in scored],
        "best_accuracy": result["splits"]["validation"]["accuracy"],
        "predictions": "".join(str(row["prediction"]) for row in predictions(output / name)),
        "seconds": result["seconds"],
    }


def predictions(run: Path) -> list[Row]:
    lines = (run / "predictions-validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pairs(seeds: Sequence[int], paths: Sequence[str], rows: int | None, output: Path, done: list[Row]) -> Iterator[Row]:
    """Both paths of a seed before the next seed, so that an interrupted sweep is still paired."""
    found = {(row["path"], row["seed"], row["rows"]) for row in done if row["what"] == "run"}
    for seed in seeds:
        for path in paths:
            if (path, seed, rows) not in found:
                model, name = shared() / "checkpoints" / "gpt2-mini", f"{path}-{seed}-{rows or 'all'}"
                yield {"what": "run", **train(path, seed=seed, rows=rows, model=model, output=output, name=name)}


def no_dropout(rows: int | None, output: Path, done: list[Row]) -> Iterator[Row]:
    """Without dropout nothing is left to chance: the two paths do the same sums in another order."""
    import torch
    from safetensors.torch import load_file

    if any(row["what"] == "no-dropout" for row in done):
        return
    model = output / "gpt2-mini-no-dropout"
    shutil.copytree(shared() / "checkpoints" / "gpt2-mini", model, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    runs = {path: train(path, seed=0, rows=rows, model=model, output=output, name=f"{path}-no-dropout") for path in PATHS}
    fast, plain = (predictions(output / f"{path}-no-dropout") for path in PATHS)
    weights = [load_file(output / f"{path}-no-dropout" / "model" / "model.safetensors") for path in PATHS]
    gaps = {}
    for name in weights[0].keys() & weights[1].keys():
        one, other = (side[name].float() for side in weights)
        if name.endswith("attn.c_attn.bias"):  # the key's bias has no effect, so rounding alone moves it
            one, other = (torch.cat([part for i, part in enumerate(bias.chunk(3)) if i != 1]) for bias in (one, other))
        gaps[name] = (one - other).abs().max().item()
    yield {
        "what": "no-dropout",
        "rows": rows,
        "seed": 0,
        "same_names": weights[0].keys() == weights[1].keys(),
        "flipped": sum(a["prediction"] != b["prediction"] for a, b in zip(fast, plain, strict=True)),
        "largest_probability_difference": max(
            abs(p - q)
            for a, b in zip(fast, plain, strict=True)
            for p, q in zip(probabilities(a), probabilities(b), strict=True)
        ),
        "largest_weight_difference": max(gaps.values()),
        "weight": max(gaps, key=lambda name: gaps[name]),
        "runs": [{key: run[key] for key in ("path", "accuracy", "loss", "seconds")} for run in runs.values()],
    }


def probabilities(row: Row) -> list[float]:
    return row["probabilities"]


def bf16(seeds: Sequence[int], output: Path, done: list[Row]) -> Iterator[Row]:
    """What storing, or computing, the features in bf16 changes; on all rows."""
    from fast_accuracy_bf16 import Rows

    scored = {(row["features"], row["split"]) for row in done if row["what"] == "scored"}
    trained = {(row["features"], row["seed"]) for row in done if row["what"] == "trained"}
    rows = Rows(shared(), output)
    for features, split in (("stored", "validation"), ("computed", "validation"), ("stored", "train")):
        if (features, split) not in scored:
            compared = rows.compare(output / "fast-0-all", features, split)
            yield {"what": "scored", "features": features, "split": split, **compared}
    for seed in seeds:
        for features in ("fp32", "stored"):
            if (features, seed) not in trained:
                yield {"what": "trained", "features": features, "seed": seed, **rows.train(features, seed)}


def tables(rows: list[Row]) -> Iterator[str]:
    """The tables of RESULTS.md, line by line."""
    runs = [row for row in rows if row["what"] == "run"]
    for limit in sorted({row["rows"] or 0 for row in runs}):
        by_path = {
            path: {row["seed"]: row for row in runs if (row["rows"] or 0, row["path"]) == (limit, path)} for path in PATHS
        }
        yield from compared_lines({f"{path}, {limit or 'all'} rows": found for path, found in by_path.items() if found})
    for row in (row for row in rows if row["what"] == "scored"):
        cells = [f"{row['features']} in bf16", row["split"], f"{row['num_rows']:,}"]
        cells += [f"{row[key]:.4f}" for key in ("largest_logit_difference", "mean_logit_difference")]
        yield line([*cells, str(row["flipped"]), f"{row['accuracy']:.4f}", f"{row['accuracy_fp32']:.4f}"])
    trained = [row for row in rows if row["what"] == "trained"]
    names = {"fp32": "fp32", "stored": "rounded to bf16"}
    yield from compared_lines(
        {name: {row["seed"]: row for row in trained if row["features"] == key} for key, name in names.items() if trained}
    )


def compared_lines(found: dict[str, dict[int, Row]]) -> Iterator[str]:
    """One line per side, the second with its difference to the first, seed by seed."""
    first: dict[int, Row] = {}
    for name, by_seed in found.items():
        first = first or by_seed
        cells = [name, str(len(by_seed))]
        for value in (best_accuracy, last_accuracy, last_loss):
            gaps = [value(row) - value(first[seed]) for seed, row in by_seed.items() if seed in first]
            cells += [mean_and_error([value(row) for row in by_seed.values()])]
            cells += ["" if by_seed is first else mean_and_error(gaps, "+")]
        yield line(cells)


def best_accuracy(row: Row) -> float:
    return max(row["accuracy"])


def last_accuracy(row: Row) -> float:
    return row["accuracy"][-1]


def last_loss(row: Row) -> float:
    return row["loss"][-1]


def mean_and_error(values: list[float], sign: str = "") -> str:
    """`mean +- standard error`; of a single value no error."""
    error = f" +- {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{error}"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs", "no-dropout", "bf16", "table"])
    parser.add_argument("log", type=Path)
    parser.add_argument("--output", type=Path, help="directory of the runs and of the caches")
    parser.add_argument("--rows", type=int, help="training rows; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    args = parser.parse_args()
    logged = [json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()] if args.log.exists() else []
    if args.what == "table":
        print("\n".join(tables(logged)))
        return
    if args.output is None:
        parser.error("--output is needed: runs and caches have to go somewhere")
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if args.what == "pairs":
        found = pairs(args.seeds, args.paths, args.rows, output, logged)
    elif args.what == "no-dropout":
        found = no_dropout(args.rows, output, logged)
    else:
        found = bf16(args.seeds, output, logged)
    start = time.perf_counter()
    for row in found:
        row["wall_seconds"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        print(json.dumps(row)[:400], flush=True)
        with args.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
