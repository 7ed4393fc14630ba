"""A slow builder of one feature file with known rows, run by test_feature_builders.py.

Arguments: directory, number of segments, seconds per segment, threads, log file. Each computed segment adds the line
`<pid> <segment>` to the log.
"""

import os
import sys
import threading
import time
from pathlib import Path

import torch

from agnews_dist.features.store import FeatureFile

ROWS_PER_SEGMENT, WIDTH = 7, 24
KEY = "a" * 64


def rows_of(segment: int) -> torch.Tensor:
    """Return the rows of a segment: consecutive numbers over all segments."""
    begin = segment * ROWS_PER_SEGMENT * WIDTH
    return torch.arange(begin, begin + ROWS_PER_SEGMENT * WIDTH, dtype=torch.float32).view(-1, WIDTH)


def feature_file(directory: Path, num_segments: int, key: str = KEY) -> FeatureFile:
    bounds_S = [ROWS_PER_SEGMENT * segment for segment in range(num_segments + 1)]
    about = {"model": "toy", "texts": 1, "tokens": 1}
    return FeatureFile(directory, key=key, bounds_S=bounds_S, width=WIDTH, dtype=torch.float32, about=about)


def expected(num_segments: int) -> torch.Tensor:
    return torch.cat([rows_of(segment) for segment in range(num_segments)])


def main() -> None:
    directory, num_segments, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    num_threads, log = int(sys.argv[4]), Path(sys.argv[5])
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def compute(segment: int) -> torch.Tensor:
        time.sleep(seconds)
        os.write(handle, f"{os.getpid()} {segment}\n".encode())
        return rows_of(segment)

    file = feature_file(directory, num_segments)
    file.allocate()
    worker = file.make_worker(compute)
    threads = [threading.Thread(target=worker) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(file.map_rows(), expected(num_segments))


if __name__ == "__main__":
    main()
