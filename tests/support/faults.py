"""What happens to the ranks of a forked training, or is written down of them: functions for `ForkedJob(before=...)`.

Told by environment variables: on rank ON_RANK (default 0; `all`), at the beginning of its AT_STEPth step of this attempt (from
1), WHAT happens: a signal of that name, `vote` (for a stop after this very step), `hang` (it says so and waits for ever), or
`fill` (the disk of FILLED is full until step UNTIL). RECORD=DIR has every rank write down the examples of every step.
"""

import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path


def arrange() -> None:
    """Wrap the training step."""
    from agnews_dist.training import loop as training

    make_step, num_calls = training.train_step, 0
    rank, at_step = os.environ["RANK"], int(os.environ.get("AT_STEP", "0"))
    until = int(os.environ.get("UNTIL", "0"))
    is_meant, what = os.environ.get("ON_RANK", "0") in (rank, "all"), os.environ.get("WHAT", "")

    def train_step(engine, embed, wrapped, batches, **options):
        nonlocal num_calls
        num_calls += 1
        if "RECORD" in os.environ:
            record(Path(os.environ["RECORD"], f"rank{rank}.jsonl"), batches, options["dropout_key"])
        if num_calls == at_step and is_meant and what == "vote":
            options["stop"] = True
        elif num_calls == at_step and is_meant:
            happen(what)
        if num_calls == until and is_meant:
            Path(os.environ["FILLED"], "filling").unlink()
        return make_step(engine, embed, wrapped, batches, **options)

    training.train_step = train_step


def record(file: Path, batches, key: int) -> None:
    """A line for this rank's part of a global batch; `key`: equal for equal steps of equal seeds."""
    ids = [example for batch in batches.micro_batches for example in batch.ids_B[batch.weights_B > 0].tolist()]
    with file.open("a") as lines:
        lines.write(json.dumps({"key": key, "ids": ids}) + "\n")


def happen(what: str) -> None:
    """See the module's text."""
    if what == "hang":
        print("hangs", file=sys.stderr, flush=True)
        # Not interrupted by a Python-level handler, as a collective is not.
        lock = threading.Lock()
        lock.acquire()
        while True:
            lock.acquire()
    elif what == "fill":
        fill(Path(os.environ["FILLED"], "filling"))
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{what}"))


def fill(file: Path) -> None:
    """Take all the space there is."""
    with file.open("wb", buffering=0) as filling:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    filling.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def hang() -> None:
    """All ranks hang at step 30, where no vote is reached."""
    os.environ.update(AT_STEP="30", ON_RANK="all", WHAT="hang")
    arrange()


def fill_then_kill() -> None:
    """The disk is full from step 15 on, and at step 25 every rank is killed."""
    _fill_then("KILL")


def fill_then_stop() -> None:
    """The disk is full from step 15 on, and at step 25 rank 1 gets TERM."""
    _fill_then("TERM")


def _fill_then(what: str) -> None:
    os.environ.update(AT_STEP="15", WHAT="fill")
    arrange()
    os.environ.update(AT_STEP="25", WHAT=what, ON_RANK="all" if what == "KILL" else "1")
    arrange()
