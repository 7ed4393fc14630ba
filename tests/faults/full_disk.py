"""Saves onto the small file system at argv[1] until it is full, and read-only; what came of it, as JSON, on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from agnews_dist.run.resume import read_newest_usable
from agnews_dist.training.checkpoint import prune, sweep, write_checkpoint

MEGABYTE = 2**20


def attempt(folder: Path, step: int, megabytes: int) -> int | None:
    """Save a checkpoint of that size; the error's number, or None."""
    tensors = {"weights": {"w": torch.full((megabytes * MEGABYTE // 4,), float(step))}}
    try:
        write_checkpoint(folder / f"step-{step:08d}", tensors, {"step": step, "best": None})
    except OSError as error:
        return error.errno
    return None


def seen(disk: Path) -> dict[str, object]:
    """What is there for the next start, and beside it."""
    folder = disk / "run" / "checkpoints"
    checkpoint, _, warnings = read_newest_usable(folder)
    first = checkpoint.tensors["weights"]["w"][[0, -1]].tolist() if checkpoint else None
    return {"first and last": first, "warnings": warnings, "names": sorted(path.name for path in folder.iterdir())}


def main(disk: Path) -> None:
    """On 16 MB."""
    folder = disk / "run" / "checkpoints"
    folder.mkdir(parents=True)
    told = [("first", attempt(folder, 1, 6), seen(disk))]
    told.append(("too large", attempt(folder, 2, 11), seen(disk)))
    told.append(("beside it", attempt(folder, 3, 6), seen(disk)))
    told.append(("full", attempt(folder, 4, 6), seen(disk)))
    told.append(("replacing what is there", attempt(folder, 3, 6), seen(disk)))
    prune(folder, 1, also=())
    told.append(("after space is freed", attempt(folder, 5, 6), seen(disk)))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    told.append(("read-only", attempt(folder, 6, 1), seen(disk)))
    # None of these may raise.
    prune(folder, 1, also=())
    sweep(folder)
    told.append(("still read-only", attempt(folder, 6, 1), seen(disk)))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    prune(folder, 1, also=())
    told.append(("writable again", attempt(folder, 6, 6), seen(disk)))
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
