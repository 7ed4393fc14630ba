"""How fast this machine multiplies the matrices of a GPT-2 block, nothing else; one JSON line.

    python products.py JOB [--seconds 0.5]

Each call is a block's four products, in fp32, with outputs that are there already, over and over. Two ways: every product split
among the threads, and as many products at once as there are threads. The best of all row counts and ways, best of several
rounds, is what the machine can sustain.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import job as jobs
import torch

NUM_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 3


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    """Inputs x outputs of a block's four matrices."""
    return (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)


def sustained(num_rows: int, width: int, seconds: float, barrier: Barrier | None = None) -> float:
    """FLOP/s of a block's products on `num_rows` rows, in the calling thread's own way."""
    generator = torch.Generator().manual_seed(0)
    products = [
        (
            torch.randn(num_rows, inputs, generator=generator),
            torch.randn(inputs, outputs, generator=generator),
            torch.empty(num_rows, outputs),
        )
        for inputs, outputs in shapes(width)
    ]

    def block() -> None:
        for rows, weight, out in products:
            torch.mm(rows, weight, out=out)

    block()
    if barrier is not None:
        barrier.wait()
    num_blocks, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        block()
        num_blocks += 1
    return num_blocks * 24 * num_rows * width**2 / elapsed


def side_by_side(num_rows: int, width: int, seconds: float) -> float:
    """FLOP/s of as many single-threaded workers as there are threads, together."""
    num_threads = torch.get_num_threads()
    barrier = Barrier(num_threads)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            work = [pool.submit(sustained, num_rows, width, seconds, barrier) for _ in range(num_threads)]
            return sum(done.result() for done in work)
    finally:
        torch.set_num_threads(num_threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round, way and number of rows")
    args = parser.parse_args()
    job, known = jobs.load(args.job), set(sys.modules)
    rates = {"split": dict.fromkeys(NUM_ROWS, 0.0), "side_by_side": dict.fromkeys(NUM_ROWS, 0.0)}
    for _ in range(ROUNDS):
        for num_rows in NUM_ROWS:
            for way, measure in (("split", sustained), ("side_by_side", side_by_side)):
                rates[way][num_rows] = max(rates[way][num_rows], measure(num_rows, job["width"], args.seconds))
    gigaflops = {way: {rows: round(rate / 1e9, 1) for rows, rate in found.items()} for way, found in rates.items()}
    best = max(rate for found in gigaflops.values() for rate in found.values())
    jobs.report(job, known, contestant="products", gigaflops=best, by_way_and_rows=gigaflops)


if __name__ == "__main__":
    main()
