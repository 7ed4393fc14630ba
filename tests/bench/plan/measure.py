"""What planning one epoch costs one rank, in a process of its own: seconds, and memory above what stood before.

    python measure.py LENGTHS.npy SAMPLER GLOBAL_BATCH NUM_RANKS OPTIONS_JSON

Prints one JSON object. compare.py runs it; `digest` lets it check that both saw the same batches of rank 0.
"""

import ctypes
import gc
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import peers

MAX_RUNS, ENOUGH_SECONDS = 3, 3.0
"""The best of so many runs counts; slow samplers run once or twice."""


def digest(batches: peers.Batches) -> str:
    """sha256 over the ids of the batches, in order."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(np.asarray(batch, dtype=np.int64).tobytes() + b"|")
    return found.hexdigest()


def memory(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most since `forget_peak`. Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(field)


def forget_peak() -> None:
    """Hand free memory back to the system and start the peak anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    lengths, name, global_batch, num_ranks, options = sys.argv[1:]
    kind, _ = peers.SAMPLERS[name]
    sampler = kind(np.load(lengths), int(global_batch), int(num_ranks), **json.loads(options))
    # A small job first, so that imports and first calls are paid.
    small = {"max_tokens": 500, "num_buckets": 2} if kind is peers.Lhotse else {}
    kind(np.arange(50, 306), 8, 2, **{**json.loads(options), **small}).rank(0, 0)
    forget_peak()
    before, seconds = memory("VmRSS"), []
    while len(seconds) < MAX_RUNS and sum(seconds) < ENOUGH_SECONDS:
        start = time.perf_counter()
        batches = sampler.rank(0, 0)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            peak = memory("VmHWM") - before
    print(json.dumps({"seconds": min(seconds), "peak_mib": peak, "digest": digest(batches)}))


if __name__ == "__main__":
    main()
