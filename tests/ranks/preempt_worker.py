"""Ranks that wait, each in its own way, for `test_preempt_on_ranks.py`: `preempt_worker.py DIRECTORY STATE,STATE...`, one each.

Before its state a rank joins the process group and meets the others; then it leaves DIRECTORY/RANK.ready with its process id.

imports     it never meets the others
collective  in a collective that the others do not join
lock        for a file that is locked (DIRECTORY/lock, or the test's)
compute     in Python
crash       it raises an exception once DIRECTORY/crash is there
steps       it trains: a vote at every step, then an orderly end
begins      as `steps`, but it begins only once DIRECTORY/begin is there
stuck       it trains and hangs
ends        nothing: its work is done

`preempt_worker.py serve` forks such ranks, for who cannot wait for imports: see `serve`.
"""

import fcntl
import json
import os
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from agnews_dist.commands.command import run_command
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.errors import Stopped


def run(world, loaded, *, watch: PreemptionHandler, directory: Path, state: str) -> None:
    watch.last_words = lambda how, why: say(directory / f"{world.rank}.words", f"{how}: {why}")
    say(directory / f"{world.rank}.started", str(os.getpid()))
    if state == "imports":
        pause()
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ.get("COLLECTIVE_SECONDS", "60"))))
    timeout = float(os.environ.get("TIMEOUT_SECONDS", "60"))
    watch.meet(collectives.side_channel(timeout), world.rank, world.num_ranks, timeout)
    dist.barrier()
    if state in ("steps", "stuck"):
        watch.saves_from_now()
    say(directory / f"{world.rank}.ready", str(os.getpid()))
    if state == "collective":
        dist.all_reduce(torch.zeros(1))
    elif state == "lock":
        with (directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.flock(os.open(directory / "lock", os.O_RDWR), fcntl.LOCK_EX)
    elif state == "compute":
        while True:
            sum(range(1000))
    elif state == "crash":
        wait_for(directory / "crash")
        raise ZeroDivisionError("a bug on one rank")
    elif state == "stuck":
        pause()
    elif state == "begins":
        wait_for(directory / "begin")
        watch.saves_from_now()
        say(directory / f"{world.rank}.begun", "")
    if state in ("steps", "begins"):
        train(watch, world, directory)


def train(watch: PreemptionHandler, world, directory: Path) -> None:
    num_steps = 0
    while True:
        time.sleep(0.02)
        votes = torch.tensor(float(watch.is_stopping))
        dist.all_reduce(votes)
        num_steps += 1
        if votes > 0:
            watch.leaving()
            say(directory / f"{world.rank}.saved", str(num_steps))
            raise Stopped(f"stopped after step {num_steps}")


def pause() -> None:
    """For ever, where no signal handler is run."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def say(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text + "\n")


def be_rank(directory: str, states: str) -> int:
    watch = PreemptionHandler(os.environ, grace_seconds=float(os.environ.get("GRACE_SECONDS", "25")))
    state = states.split(",")[int(os.environ["RANK"])]
    return run_command("train", [], partial(run, watch=watch, directory=Path(directory), state=state), watch=watch)


def serve() -> None:
    """A line of JSON in, one out: `{"environs": [...], "words": [...], "log": FILE}` starts a rank per environment and answers
    their process ids; `{}` answers [process id, exit code] of all that have ended.
    """
    ended: list[tuple[int, int]] = []
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for environ in asked.get("environs", []):
            pid = os.fork()
            if pid == 0:
                be_fork(environ, asked)
            pids.append(pid)
        try:
            while not asked:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                ended.append((pid, os.waitstatus_to_exitcode(status)))
        except ChildProcessError:
            pass
        print(json.dumps(pids or ended), flush=True)


def be_fork(environ: dict[str, str], asked: dict) -> None:
    code = 99
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environ)
        code = be_rank(*asked["words"])
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "serve" else be_rank(*sys.argv[1:]))
