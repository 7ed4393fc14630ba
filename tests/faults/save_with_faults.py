"""Saves or reads checkpoints under the library of fail_calls.c: one `Order` per line of JSON on stdin, one `Answer` on stdout.

An order with a fault runs in a forked child that needs no imports, so hundreds of orders take seconds.
"""

import ctypes
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agnews_dist.errors import UserError
from agnews_dist.storage.atomic import discard
from agnews_dist.training.checkpoint import list_checkpoints, prune, read_checkpoint, sweep, write_checkpoint

KINDS = "open mkdir write fsync close rename unlink rmdir look read list"
"""Names of the calls that fail_calls.c counts."""
KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL, SHORT = 1, 2, 3, 4, 5
FOREVER = 2**31 - 1


@dataclass(frozen=True)
class Order:
    """An operation and the fault that is injected into it."""

    what: str
    """Name of a function of this module."""
    folder: str
    step: int = 0
    call: int = 0
    until: int = 0
    mode: int = 0
    error: int = 0
    only: str = KINDS
    reads: bool = False
    """True if calls that only read count too."""


@dataclass(frozen=True)
class Answer:
    """The outcome of an order."""

    status: int
    """Exit code; -9: killed."""
    raised: str = ""
    error: int | None = None
    trace: tuple[tuple[str, ...], ...] = ()
    """(call, path) or (call, path, path) of every counted call."""


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return two groups of tensors that differ at every step."""
    random_bits = torch.Generator().manual_seed(step)
    return {
        "weights": {"a": torch.randn(40, generator=random_bits), "b": torch.randn(3, 5, generator=random_bits)},
        "moments": {"a": torch.randn(80, generator=random_bits), "count": torch.tensor(step)},
    }


def state_of(step: int) -> dict[str, Any]:
    """Return the state of a checkpoint, which names the best epoch saved with it."""
    return {"step": step, "best": {"name": f"best-{step:08d}"}}


def save(folder: Path, step: int) -> None:
    """Save as a training does: a best epoch, a checkpoint that names it, then remove older ones."""
    best = f"best-{step:08d}"
    write_checkpoint(folder / best, {"weights": tensors_of(-step)["weights"]}, {"best": None})
    write_checkpoint(folder / f"step-{step:08d}", tensors_of(step), state_of(step))
    prune(folder, 1, also={best})


def start_and_save(folder: Path, step: int) -> None:
    """Save as the first save of an attempt, after a sweep."""
    sweep(folder)
    save(folder, step)


def read(folder: Path, step: int) -> None:
    """Read a checkpoint."""
    read_checkpoint(folder / f"step-{step:08d}")


def tidy(folder: Path, step: int) -> None:
    """Remove leftovers; no error here may stop a training."""
    sweep(folder)
    prune(folder, 1, also=())
    discard([folder / f"step-{step:08d}"])


def list_folder(folder: Path, step: int) -> None:
    """List the checkpoints."""
    list_checkpoints(folder)


def obey(library: ctypes.CDLL, order: Order) -> Answer:
    """Run an order, in a child that may be killed or in this process."""
    raised, error = "", None
    # Watch two levels up: where the folder is created, its parent must be fsynced too.
    library.fault_below(os.fsencode(Path(order.folder).parent.parent))
    library.fault_reads(order.reads)
    library.fault_arm(order.call, order.until, order.mode, order.error, order.only.encode())
    try:
        globals()[order.what](Path(order.folder), order.step)
    except (OSError, UserError) as caught:
        raised, error = type(caught).__name__, getattr(caught, "errno", None)
    library.fault_arm(0, 0, 0, 0, b"")
    library.fault_trace.restype = ctypes.c_char_p
    lines = library.fault_trace().decode().splitlines()
    return Answer(0, raised, error, tuple(tuple(line.split("\t")) for line in lines))


def main() -> None:
    """Answer orders until stdin ends."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    torch.randn(1)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        print(answer_of_child(library, order) if order.mode else encode(obey(library, order)), flush=True)


def encode(answer: Answer) -> str:
    """Return an answer as a line of JSON."""
    return json.dumps(asdict(answer))


def answer_of_child(library: ctypes.CDLL, order: Order) -> str:
    """Run an order in a child; return its answer, or its exit code as one if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with os.fdopen(writing, "w") as pipe:
                pipe.write(encode(obey(library, order)))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if status == 0 else encode(Answer(status))


if __name__ == "__main__":
    main()
