"""Saves to the small file system at argv[1] while it is full and read-only; prints the outcomes as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from agnews_dist.run.resume import read_newest_usable
from agnews_dist.training.checkpoint import prune, sweep, write_checkpoint

MEGABYTE = 2**20


def attempt(folder: Path, step: int, megabytes: int) -> int | None:
    """Save a checkpoint of that size; return the number of the error, or None."""
    tensors = {"weights": {"w": torch.full((megabytes * MEGABYTE // 4,), float(step))}}
    try:
        write_checkpoint(folder / f"step-{step:08d}", tensors, {"step": step, "best": None})
    except OSError as error:
        return error.errno
    return None


def look_at(disk: Path) -> dict[str, object]:
    """Return what the next start would find, and the names of all entries."""
    folder = disk / "run" / "checkpoints"
    checkpoint, _, warnings = read_newest_usable(folder)
    first = checkpoint.tensors["weights"]["w"][[0, -1]].tolist() if checkpoint else None
    return {"first and last": first, "warnings": warnings, "names": sorted(path.name for path in folder.iterdir())}


def main(disk: Path) -> None:
    """Save with too little space, then on a read-only disk, then on a writable one; `disk` has 16 MB."""
    folder = disk / "run" / "checkpoints"
    folder.mkdir(parents=True)
    outcomes = [("first", attempt(folder, 1, 6), look_at(disk))]
    outcomes.append(("too large", attempt(folder, 2, 11), look_at(disk)))
    outcomes.append(("second", attempt(folder, 3, 6), look_at(disk)))
    outcomes.append(("full", attempt(folder, 4, 6), look_at(disk)))
    outcomes.append(("replacing an existing one", attempt(folder, 3, 6), look_at(disk)))
    prune(folder, 1, also=())
    outcomes.append(("after space is freed", attempt(folder, 5, 6), look_at(disk)))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    outcomes.append(("read-only", attempt(folder, 6, 1), look_at(disk)))
    # None of these may raise.
    prune(folder, 1, also=())
    sweep(folder)
    outcomes.append(("still read-only", attempt(folder, 6, 1), look_at(disk)))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    prune(folder, 1, also=())
    outcomes.append(("writable again", attempt(folder, 6, 6), look_at(disk)))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
