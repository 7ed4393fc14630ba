"""Faults injected into the ranks of a forked training: functions for `ForkedJob(fault="support.faults:NAME")`.

`inject` reads environment variables. FAULT happens on rank ON_RANK (default 0; `all`) at the beginning of step AT_STEP of this
attempt, from 1. With RECORD=DIR every rank writes the examples of each step to a file. Values of FAULT:

    TERM, KILL, ...  the rank gets this signal
    vote             the rank votes to stop after this step
    hang             it prints "hangs" and waits forever
    fill             the file system at FILLED is full until step UNTIL
    flip             the lowest bit of one of its weights flips
    move             the directory FROM gets the name TO; without TO it is removed
    cut              the file CUT gets the length 0, its mapped pages are gone
"""

import errno
import importlib.abc
import json
import os
import shutil
import signal
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch


def inject() -> None:
    """Wrap the training step."""
    from agnews_dist.training import loop

    make_step, num_calls = loop.train_step, 0
    rank, at_step = os.environ["RANK"], int(os.environ.get("AT_STEP", "0"))
    until = int(os.environ.get("UNTIL", "0"))
    is_target, fault = os.environ.get("ON_RANK", "0") in (rank, "all"), os.environ.get("FAULT", "")

    def train_step(engine, embed, wrapped, batches, **options):
        nonlocal num_calls
        num_calls += 1
        if "RECORD" in os.environ:
            _record(Path(os.environ["RECORD"], f"rank{rank}.jsonl"), batches, options["dropout_key"])
        if num_calls == at_step and is_target and fault == "vote":
            options["stop"] = True
        elif num_calls == at_step and is_target and fault == "flip":
            next(wrapped.suffix.parameters()).detach().view(-1).view(torch.uint8)[0] ^= 1
        elif num_calls == at_step and is_target:
            _cause(fault)
        if num_calls == until and is_target:
            Path(os.environ["FILLED"], "filling").unlink()
        return make_step(engine, embed, wrapped, batches, **options)

    loop.train_step = train_step


def hang() -> None:
    """Let all ranks hang at step 30."""
    os.environ.update(AT_STEP="30", ON_RANK="all", FAULT="hang")
    inject()


def slow_disk() -> None:
    """Let the first fsync within each of the functions SLOW_IN take SLOW_SECONDS on rank 0."""
    fsync, pending = os.fsync, set(os.environ["SLOW_IN"].split())

    def slow_fsync(handle: int) -> None:
        frame = sys._getframe(1)
        while frame is not None and pending:
            if frame.f_code.co_name in pending:
                pending.remove(frame.f_code.co_name)
                print(f"slow fsync in {frame.f_code.co_name}", file=sys.stderr, flush=True)
                time.sleep(float(os.environ["SLOW_SECONDS"]))
            frame = frame.f_back
        fsync(handle)

    if os.environ["RANK"] == "0":
        os.fsync = slow_fsync


def fill_then_kill() -> None:
    """Fill the disk at step 15 and kill every rank at step 25."""
    _fill_then("KILL")


def fill_then_stop() -> None:
    """Fill the disk at step 15 and send TERM to rank 1 at step 25."""
    _fill_then("TERM")


def _fill_then(fault: str) -> None:
    os.environ.update(AT_STEP="15", FAULT="fill")
    inject()
    os.environ.update(AT_STEP="25", FAULT=fault, ON_RANK="all" if fault == "KILL" else "1")
    inject()


def _record(file: Path, batches, key: int) -> None:
    """Append this rank's part of a global batch; `key` is equal for equal steps of equal seeds."""
    ids = [example for batch in batches.micro_batches for example in batch.ids_B[batch.weights_B > 0].tolist()]
    with file.open("a") as lines:
        lines.write(json.dumps({"key": key, "ids": ids}) + "\n")


def _cause(fault: str) -> None:
    if fault == "hang":
        print("hangs", file=sys.stderr, flush=True)
        # Like a collective, a lock is not interrupted by a handler in Python.
        lock = threading.Lock()
        lock.acquire()
        while True:
            lock.acquire()
    elif fault == "move":
        if "TO" in os.environ:
            Path(os.environ["FROM"]).rename(os.environ["TO"])
        else:
            # Again: meanwhile the run may write or rename a file in it.
            while Path(os.environ["FROM"]).exists():
                shutil.rmtree(os.environ["FROM"], ignore_errors=True)
    elif fault == "cut":
        os.truncate(os.environ["CUT"], 0)
    elif fault == "fill":
        _fill(Path(os.environ["FILLED"], "filling"))
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{fault}"))


def _fill(file: Path) -> None:
    """Write until the file system has no space left."""
    with file.open("wb", buffering=0) as filling:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    filling.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def hide_wandb() -> None:
    """Let no import find the package `wandb`."""

    class Hidden(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            return ModuleSpec(name, None, origin=None) if name == "wandb" else None

    sys.meta_path.insert(0, Hidden())
