"""What planning and sharing cost as data sets grow: in memory up to 100 million lengths, block-wise up to a billion.

    python tests/bench/plan/growth.py --output DIR

Every size runs in a fresh process and appends one line to DIR/log.jsonl. Lengths are those of the shared AG News rows: drawn
with a seed where they are held in memory (two bytes each), else computed from the example's id by an integer hash, so that they
need no memory at any size. Every example is counted: the sums of the ids, of their squares and of their cubes (mod 2^64) must
be those of 0 .. N - 1.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

from measure import forget_peak, memory  # noqa: E402

from agnews_dist.data.batching.epoch_plan import plan  # noqa: E402
from agnews_dist.data.batching.settings import PlanSettings  # noqa: E402
from agnews_dist.data.batching.shares import Tally, share_batch  # noqa: E402

IN_MEMORY = {"global_batch_size": 256}, 8, (120_000, 1_000_000, 10_000_000, 100_000_000)
BLOCK_WISE = (
    {"global_batch_size": 131_072, "bucket_window": 64, "block_size": 65_536},
    4096,
    (10_000_000, 100_000_000, 1_000_000_000),
)
"""Settings, ranks, numbers of examples."""


class Virtual:
    """Lengths of any number of examples, from a table of real ones."""

    def __init__(self, table: NDArray[np.int64], num_examples: int) -> None:
        self._table, self._num_examples = table.astype(np.uint16), num_examples

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: Any) -> NDArray[np.uint16]:
        ids = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return self._table[(mixed >> np.uint64(33)) % np.uint64(len(self._table))]


def sums_of(num_examples: int) -> list[int]:
    """Of 0 .. N - 1, their squares and their cubes, mod 2^64."""
    last = num_examples - 1
    triangle = last * num_examples // 2
    return [value % 2**64 for value in (triangle, last * num_examples * (2 * last + 1) // 6, triangle**2)]


def run(table_file: str, num_examples: int, num_ranks: int, named: dict[str, Any]) -> dict[str, Any]:
    """Plan an epoch, then plan and share it again, counting; then only one of its last steps."""
    table, settings = np.load(table_file), PlanSettings(**named)
    if settings.block_size > 1:
        lengths: Any = Virtual(table, num_examples)
    else:
        drawn = np.random.default_rng(0).integers(0, len(table), num_examples, dtype=np.uint16)
        lengths = table.astype(np.uint16)[drawn]
        del drawn
    forget_peak()
    before, start = memory("VmRSS"), time.perf_counter()
    num_steps = sum(1 for _ in plan(lengths, settings, epoch=0).global_batches())
    planned = time.perf_counter() - start
    tally, sums, shared = Tally(), np.zeros(3, np.uint64), 0.0
    for ids in plan(lengths, settings, epoch=0).global_batches():
        lengths_B, start = lengths[ids], time.perf_counter()
        tally.add(share_batch(lengths_B, num_ranks=num_ranks))
        shared += time.perf_counter() - start
        whole = ids.astype(np.uint64)
        sums += np.array([whole.sum(), (whole * whole).sum(), (whole * whole * whole).sum()])
    peak = memory("VmHWM") - before
    if sums.tolist() != sums_of(num_examples):
        raise RuntimeError(f"{num_examples} examples: some are lost or repeated")
    start = time.perf_counter()
    plan(lengths, settings, epoch=0).global_batch(num_steps - 3)
    return {
        **named,
        "num_examples": num_examples,
        "num_ranks": num_ranks,
        "num_steps": num_steps,
        "plan_seconds": planned,
        "share_seconds": shared,
        "resume_seconds": time.perf_counter() - start,
        "peak_mib": peak,
        "lengths_mib": 0 if settings.block_size > 1 else lengths.nbytes / 2**20,
        "critical_path": tally.efficiency.critical_path,
        "counted_once": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    table = args.output / "rows.npy"
    if args.one:
        print(json.dumps(run(str(table), *json.loads(args.one))))
        return
    from lengths import ag_news_rows

    args.output.mkdir(parents=True, exist_ok=True)
    np.save(table, ag_news_rows())
    for settings, num_ranks, sizes in (IN_MEMORY, BLOCK_WISE):
        for num_examples in sizes:
            one = json.dumps([num_examples, num_ranks, settings])
            command = [sys.executable, __file__, "--output", str(args.output), "--one", one]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(line, end="", flush=True)
            with (args.output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(line)
    table.unlink()


if __name__ == "__main__":
    main()
