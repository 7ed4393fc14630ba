"""Saves, or reads, with the library of cut.c below it, once for every line of JSON on stdin; an answer for each.

What is to be cut is done by a forked child, whose imports lie behind it, so that hundreds of them take seconds. What is in a
line: see `Order`.
"""

import ctypes
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agnews_dist.storage.atomic import discard
from agnews_dist.training.checkpoint import (
    DamagedError,
    checkpoints,
    prune,
    read_checkpoint,
    sweep,
    write_checkpoint,
)

KINDS = "open mkdir write fsync close rename unlink rmdir look read list"
"""The names of the calls that cut.c counts."""
KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL, SHORT = 1, 2, 3, 4, 5
FOR_EVER = 2**31 - 1


@dataclass(frozen=True)
class Order:
    """What is to be done, and what happens to it meanwhile."""

    what: str
    """A function of this module."""
    folder: str
    step: int = 0
    call: int = 0
    until: int = 0
    mode: int = 0
    error: int = 0
    only: str = KINDS
    reads: bool = False
    """Whether calls that only read count too."""


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    status: int
    """-9: killed."""
    raised: str = ""
    error: int | None = None
    trace: tuple[tuple[str, ...], ...] = ()
    """(call, path) or (call, path, path)."""


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Of two groups; nothing in them is as it is at another step."""
    random_bits = torch.Generator().manual_seed(step)
    return {
        "weights": {"a": torch.randn(40, generator=random_bits), "b": torch.randn(3, 5, generator=random_bits)},
        "moments": {"a": torch.randn(80, generator=random_bits), "count": torch.tensor(step)},
    }


def state_of(step: int) -> dict[str, Any]:
    """Refers to the best epoch that was saved with it."""
    return {"step": step, "best": {"name": f"best-{step:08d}"}}


def save(folder: Path, step: int) -> None:
    """As a training does: a best epoch, a checkpoint that refers to it, and what is older goes."""
    best = f"best-{step:08d}"
    write_checkpoint(folder / best, {"weights": tensors_of(-step)["weights"]}, {"best": None})
    write_checkpoint(folder / f"step-{step:08d}", tensors_of(step), state_of(step))
    prune(folder, 1, also={best})


def start_and_save(folder: Path, step: int) -> None:
    """The same at the beginning of an attempt."""
    sweep(folder)
    save(folder, step)


def read(folder: Path, step: int) -> None:
    """Read one."""
    read_checkpoint(folder / f"step-{step:08d}")


def tidy(folder: Path, step: int) -> None:
    """What must not stop a training."""
    sweep(folder)
    prune(folder, 1, also=())
    discard([folder / f"step-{step:08d}"])


def list_them(folder: Path, step: int) -> None:
    """See what is there."""
    checkpoints(folder)


def obey(library: ctypes.CDLL, order: Order) -> Answer:
    """Do it, in the child that may be killed or in a process that nothing happens to."""
    raised, error = "", None
    # Two levels up: where the folder is made, its parent must be fsynced too.
    library.cut_below(os.fsencode(Path(order.folder).parent.parent))
    library.cut_reads(order.reads)
    library.cut_arm(order.call, order.until, order.mode, order.error, order.only.encode())
    try:
        globals()[order.what](Path(order.folder), order.step)
    except (OSError, DamagedError) as caught:
        raised, error = type(caught).__name__, getattr(caught, "errno", None)
    library.cut_arm(0, 0, 0, 0, b"")
    library.cut_trace.restype = ctypes.c_char_p
    lines = library.cut_trace().decode().splitlines()
    return Answer(0, raised, error, tuple(tuple(line.split("\t")) for line in lines))


def main() -> None:
    """Do what is asked, and answer; until stdin ends."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    torch.randn(1)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        print(said_by_child(library, order) if order.mode else said(obey(library, order)), flush=True)


def said(answer: Answer) -> str:
    return json.dumps(asdict(answer))


def said_by_child(library: ctypes.CDLL, order: Order) -> str:
    """What a child says at its end; said for it if it has come to another one."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with os.fdopen(writing, "w") as pipe:
                pipe.write(said(obey(library, order)))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        words = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return words if status == 0 else said(Answer(status))


if __name__ == "__main__":
    main()
