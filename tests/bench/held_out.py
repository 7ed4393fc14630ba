"""The shared real rows with a test split: 2,000 of the training rows, which neither train nor select anything.

    python tests/bench/held_out.py --output DIR

DIR gets train, validation and test in parquet files, as a source for `--data.source DIR`. Other benchmarks import this module.
The shared rows (AGNEWS_SHARED, else ../shared) have no test split: their 12,423 training rows become 10,423 and 2,000, drawn
with a fixed seed. The shared checkpoint was trained as a language model on all 12,423 texts, without labels.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from accuracy import REPOSITORY, SETTINGS

SHARED = Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared")).resolve()
CHECKPOINT = SHARED / "checkpoints" / "gpt2-mini"
NUM_TEST = 2_000
SEED = 20_261_130


def write_rows(directory: Path) -> Path:
    """Write the three splits; return the directory. Files that are there already are replaced by the same ones."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = parquet.read_table(SHARED / "data" / "ag_news" / "train-00000-of-00001.parquet")
    is_test_N = np.zeros(len(rows), bool)
    is_test_N[np.random.default_rng(SEED).permutation(len(rows))[:NUM_TEST]] = True
    validation = parquet.read_table(SHARED / "data" / "ag_news" / "validation-00000-of-00001.parquet")
    for name, table in {"train": rows.filter(~is_test_N), "validation": validation, "test": rows.filter(is_test_N)}.items():
        parquet.write_table(table, directory / f"{name}.parquet")
    return directory


def common_settings(rows: Path, output: Path) -> list[str]:
    """Return the settings of every command on these rows: those of accuracy.py, on the shared checkpoint."""
    settings = {"model.name": CHECKPOINT, "data.source": rows, "data.cache_dir": output / "cache", "run.dir": output / "runs"}
    return [str(part) for key, value in {**settings, **SETTINGS}.items() for part in (f"--{key}", value)]


def run_command(*words: str) -> None:
    """Run a command of the package in a process of its own; its standard output goes to the error stream."""
    subprocess.run([sys.executable, "-m", "agnews_dist", *words], check=True, cwd=REPOSITORY, stdout=sys.stderr)


def append(log: Path, row: dict[str, Any]) -> None:
    """Add a line to the log, and print it."""
    text = json.dumps(row, allow_nan=False)
    with log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    print(write_rows(parser.parse_args().output))


if __name__ == "__main__":
    main()
