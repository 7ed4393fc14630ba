"""Ours and other samplers on the same lengths: padding, balance, repeated and lost examples, planning time and memory.

    python tests/bench/plan/compare.py --output DIR

Needs the packages of requirements.txt beside those of the project. Writes DIR/log.jsonl (raw figures), DIR/table.md (for
RESULTS.md) and DIR/plot.png. Everything but seconds and memory is the same in every run.

What counts: a batch of n rows costs n x its longest row, padding included. Every step is as slow as its most expensive rank.
Real tokens are those of all examples in the batches, repeated ones included, which favours the samplers that repeat.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import peers  # noqa: E402
from lengths import all_lengths  # noqa: E402
from measure import digest  # noqa: E402
from table import table  # noqa: E402

CASES = ((256, 8), (4096, 64), (64, 2))
"""(global batch, ranks)"""
WORLD_SIZES = (2, 4, 8)
PACKAGES = ("torch", "transformers", "accelerate", "lhotse", "numpy")


def step_figures(lengths_N: NDArray[np.int64], ranks: list[peers.Batches]) -> dict[str, Any]:
    """Efficiency, and what happened to the examples, counted from the batches themselves."""
    real = padded = slowest = 0
    sizes: list[int] = []
    for step in zip_longest(*ranks, fillvalue=()):
        rows = [lengths_N[np.asarray(ids, dtype=np.int64)] for ids in step]
        costs = [len(row) * int(row.max()) if len(row) else 0 for row in rows]
        real, padded = real + sum(int(row.sum()) for row in rows), padded + sum(costs)
        slowest += max(costs) * len(ranks)
        sizes.append(sum(map(len, rows)))
    seen_N = np.bincount(np.concatenate([ids for rank in ranks for ids in rank]).astype(np.int64), minlength=len(lengths_N))
    return {
        "padding": real / padded,
        "critical_path": real / slowest,
        "rank_balance": padded / slowest,
        "repeated": int(np.maximum(seen_N - 1, 0).sum()),
        "lost": int((seen_N == 0).sum()),
        # Without the last step, which holds the remainder.
        "batch_min": min(sizes[:-1]),
        "batch_max": max(sizes[:-1]),
        "steps_min": min(map(len, ranks)),
        "steps_max": max(map(len, ranks)),
    }


def global_batches(ranks: list[peers.Batches]) -> list[list[int]]:
    """The ids of all ranks' batches, step by step."""
    return [[int(i) for ids in step for i in ids] for step in zip_longest(*ranks, fillvalue=())]


def same_batches(by_world_size: list[list[peers.Batches]]) -> float:
    """Share of the steps whose global batch is one and the same set of examples for every number of ranks."""
    steps = list(zip_longest(*(map(frozenset, global_batches(ranks)) for ranks in by_world_size)))
    return sum(len(set(step)) == 1 for step in steps) / len(steps)


def mates_kept(first: list[peers.Batches], second: list[peers.Batches]) -> float:
    """Of the pairs of examples that share a global batch in one epoch, how many do so in the next."""
    batch_of = {i: step for step, ids in enumerate(global_batches(second)) for i in ids}
    kept = total = 0
    for ids in global_batches(first):
        total += len(ids) * (len(ids) - 1)
        kept += sum(n * (n - 1) for n in Counter(batch_of.get(i, -1 - i) for i in ids).values())
    return kept / total


def calibrated(kind: type[peers.Sampler], lengths_N: NDArray[np.int64], batch: int, num_ranks: int, options: dict[str, Any]):
    """`options` with the token budget per rank that gives as many steps as `batch` examples per step do, within 2.5 %."""
    wanted = -(-len(lengths_N) // batch)
    tokens = batch / num_ranks * lengths_N.mean()
    for _ in range(5):
        tried = {**options, "max_tokens": round(tokens)}
        steps = len(kind(lengths_N, batch, num_ranks, **tried).all_ranks(0)[0])
        if abs(steps / wanted - 1) < 0.025 or abs(steps - wanted) == 1:
            return tried
        tokens *= steps / wanted
    raise RuntimeError(f"no budget found: {steps} steps instead of {wanted}")


def planning_cost(path: Path, name: str, batch: int, num_ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak MiB of planning one rank's epoch, from a fresh process."""
    command = [sys.executable, str(HERE / "measure.py"), str(path), name, str(batch), str(num_ranks), json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measured(data: str, lengths_N: NDArray[np.int64], output: Path) -> Iterator[dict[str, Any]]:
    """One row per case and sampler. The costs and what depends on the epoch or the ranks are taken on AG News only."""
    path = output / "lengths.npy"
    np.save(path, lengths_N)
    for batch, num_ranks in CASES:
        for name, (kind, options) in peers.SAMPLERS.items():
            if kind is peers.Lhotse:
                options = calibrated(kind, lengths_N, batch, num_ranks, options)
            sampler = kind(lengths_N, batch, num_ranks, **options)
            ranks = sampler.all_ranks(0)
            row: dict[str, Any] = {"data": data, "global_batch": batch, "num_ranks": num_ranks, "sampler": name}
            row |= {"options": options, **step_figures(lengths_N, ranks)}
            if data == "AG News":
                cost = planning_cost(path, name, batch, num_ranks, options)
                if cost.pop("digest") != digest(ranks[0]):
                    raise RuntimeError(f"{name}: rank 0 by itself has other batches than among all ranks")
                row |= cost
            if data == "AG News" and (batch, num_ranks) == CASES[0]:
                row["mates_kept"] = mates_kept(ranks, sampler.all_ranks(1))
                row["same_batches"] = same_batches(
                    [at_world_size(kind, lengths_N, batch, n, num_ranks, options) for n in WORLD_SIZES]
                )
            yield row
    path.unlink()


def at_world_size(
    kind: type[peers.Sampler], lengths_N: NDArray[np.int64], batch: int, n: int, num_ranks: int, options: dict[str, Any]
):
    """All ranks' batches on `n` ranks instead of `num_ranks`, with the same global batch or global token budget."""
    if "max_tokens" in options:
        options = {**options, "max_tokens": options["max_tokens"] * num_ranks // n}
    return kind(lengths_N, batch, n, **options).all_ranks(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    about = {name: version(name) for name in PACKAGES}
    rows: list[dict[str, Any]] = [{"python": platform.python_version(), "cpus": os.cpu_count(), "packages": about}]
    with (output / "log.jsonl").open("w", encoding="utf-8") as log:
        print(json.dumps(rows[0]), file=log)
        for data, lengths_N in all_lengths().items():
            for row in measured(data, lengths_N, output):
                rows.append(row)
                print(json.dumps(row), file=log, flush=True)
                print(
                    f"{time.perf_counter() - start:6.1f} s  {data} {row['global_batch']}/{row['num_ranks']} "
                    f"{row['sampler']}: {row['critical_path']:.4f}",
                    flush=True,
                )
    (output / "table.md").write_text(table(rows[1:]), encoding="utf-8")
    from plot import plot

    plot(rows[1:], output / "plot.png")


if __name__ == "__main__":
    main()
