"""Ranks that are busy in different ways, for `test_preempt_on_ranks.py`: `preempt_worker.py DIRECTORY STATE,STATE...`.

Each rank takes the state at its position. It joins the process group, connects to the other ranks, and then leaves
DIRECTORY/RANK.ready with its process id. Time limits are far beyond the tests' own, unless variables set them.

imports     does not connect to the others
collective  waits in a collective that the others do not join
lock        waits for a locked file (DIRECTORY/lock, or the test's)
compute     runs Python code
crash       raises an exception once DIRECTORY/crash exists
breaks      raises what a collective raises once a stop is known
fails       raises an error of its own once a stop is known
steps       trains: votes at every step, then exits
begins      as `steps`, from when DIRECTORY/begin exists
stuck       trains and hangs
ends        ends at once
"""

import fcntl
import os
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from agnews_dist.commands.arguments import Command
from agnews_dist.commands.command import run_command
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.errors import Stopped


def run(world, _, *, handler: PreemptionHandler, directory: Path, state: str) -> None:
    def write_report(end: str, reason: str) -> None:
        write(directory / f"{world.rank}.report", f"{end}: {reason}")

    handler.before_exit = write_report
    write(directory / f"{world.rank}.started", str(os.getpid()))
    if state == "imports":
        block()
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ.get("COLLECTIVE_SECONDS", "600"))))
    timeout = float(os.environ.get("TIMEOUT_SECONDS", "600"))
    handler.connect(collectives.connect_store(timeout), world.rank, world.num_ranks, timeout)
    dist.barrier()
    if state in ("steps", "stuck"):
        handler.begin_training()
    write(directory / f"{world.rank}.ready", str(os.getpid()))
    if state == "collective":
        dist.all_reduce(torch.zeros(1))
    elif state == "lock":
        with (directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.flock(os.open(directory / "lock", os.O_RDWR), fcntl.LOCK_EX)
    elif state == "compute":
        while True:  # with pauses, as other tests need the core as well
            sum(range(1000))
            time.sleep(0.001)
    elif state == "crash":
        wait_for(directory / "crash")
        raise ZeroDivisionError("a bug on one rank")
    elif state in ("breaks", "fails"):
        while not handler.is_stopping:
            time.sleep(0.001)
        raise RuntimeError("Connection closed by peer") if state == "breaks" else ZeroDivisionError("a bug")
    elif state == "stuck":
        block()
    elif state == "begins":
        wait_for(directory / "begin")
        handler.begin_training()
        write(directory / f"{world.rank}.begun", "")
    if state in ("steps", "begins"):
        train(handler, world, directory)


def train(handler: PreemptionHandler, world, directory: Path) -> None:
    num_steps = 0
    while True:
        time.sleep(0.02)
        votes = torch.tensor(float(handler.is_stopping))
        dist.all_reduce(votes)
        num_steps += 1
        if votes > 0:
            handler.begin_exit()
            write(directory / f"{world.rank}.saved", str(num_steps))
            raise Stopped(f"stopped after step {num_steps}")


def block() -> None:
    """Block in C code, where Python runs no signal handler."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def write(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text + "\n")


def main(directory: str, states: str) -> int:
    handler = PreemptionHandler(os.environ, grace_seconds=float(os.environ.get("GRACE_SECONDS", "600")))
    state = states.split(",")[int(os.environ["RANK"])]
    body = partial(run, handler=handler, directory=Path(directory), state=state)
    return run_command(Command("train", "Train.", ()), [], body, preemption=handler)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
