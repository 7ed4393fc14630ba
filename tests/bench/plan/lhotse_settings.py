"""Which settings of lhotse's sampler are its best on AG News? Those that compare.py uses were chosen from this.

    python tests/bench/plan/lhotse_settings.py --output DIR

Appends one line per case, number of buckets and buffer to DIR/lhotse.jsonl.
"""

import argparse
import json
from pathlib import Path

import peers
from compare import CASES, calibrated, step_figures
from lengths import all_lengths

NUM_BUCKETS = (10, 30, 100, 200, 400)
BUFFERS = (20_000, None)
"""lhotse's default, and all examples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    lengths_N = all_lengths()["AG News"]
    with (output / "lhotse.jsonl").open("w", encoding="utf-8") as log:
        for batch, num_ranks in CASES:
            for num_buckets in NUM_BUCKETS:
                for buffer in BUFFERS:
                    options = {"num_buckets": num_buckets, "buffer": buffer}
                    options = calibrated(peers.Lhotse, lengths_N, batch, num_ranks, options)
                    figures = step_figures(lengths_N, peers.Lhotse(lengths_N, batch, num_ranks, **options).all_ranks(0))
                    row = {"global_batch": batch, "num_ranks": num_ranks, **options, **figures}
                    print(json.dumps(row), file=log, flush=True)
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
