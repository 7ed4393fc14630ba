"""Two-rank training jobs that can be hit: forked from a process that has imported everything, or through torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from support import fork_server as warm
from support.processes import REPOSITORY, environment

NUM_RANKS = 2
TRAIN = """
import importlib, sys

before, *arguments = sys.argv[1:]
if before:
    module, function = before.split(":")
    getattr(importlib.import_module(module), function)()
from agnews_dist.commands import train

sys.exit(train.main(arguments))
"""


class ForkedJob:
    """Ranks as `srun` would start them: siblings, of which nobody takes care; rank 0 hosts the store."""

    kind = "forked"

    def __init__(
        self, arguments: Sequence[str], log: Path, num_ranks: int = NUM_RANKS, *, before: str = "", **environ: str
    ) -> None:
        """`before`: `module:function` that every rank calls first; `environ`: what is set for all."""
        shared = environment(**environ)
        self._ranks = [
            warm.start(["-c", TRAIN, before, *arguments], {**shared, **own}, out=log, err=log)
            for own in warm.rank_variables(num_ranks)
        ]
        self.pids = [process.pid for process in self._ranks]

    def hit(self, target: str, number: int) -> list[int]:
        """Send signal `number` to 'rank N' or 'all'; the processes that were hit."""
        hit = self.pids if target == "all" else [self.pids[int(target.split()[1])]]
        for pid in hit:
            os.kill(pid, number)
        return hit

    def ended(self, besides: Sequence[int] = ()) -> bool:
        """Whether every process, `besides` stopped ones, has ended."""
        return not [rank for rank in self._ranks if rank.pid not in besides and rank.exitcode is None]

    def codes(self) -> list[int | None]:
        """Exit codes by rank; negative: ended by that signal; None: not ended."""
        return [rank.exitcode for rank in self._ranks]

    def say_where(self) -> None:
        """Let those that are left write where they are into the log, and end."""
        for rank in self._ranks:
            if rank.exitcode is None:
                os.kill(rank.pid, signal.SIGABRT)
                rank.join(5)

    def kill(self) -> None:
        """End whatever is left."""
        for rank in self._ranks:
            if rank.exitcode is None:
                rank.kill()
            rank.join()


class TorchrunJob:
    """The job as users start it; the agent may be hit as well."""

    kind = "torchrun"

    def __init__(
        self, arguments: Sequence[str], log: Path, num_ranks: int = NUM_RANKS, *, options: Sequence[str] = ()
    ) -> None:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        agent += ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2", *options]
        with log.open("ab") as file:
            self._agent = subprocess.Popen(
                [*agent, "-m", "agnews_dist.train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self._workers: list[psutil.Process] = []

    def workers(self) -> list[psutil.Process]:
        """The ranks' processes, in their order, as soon as there are any."""
        if not self._workers and self._agent.poll() is None:
            children = psutil.Process(self._agent.pid).children()
            if len(children) >= NUM_RANKS:
                self._workers = sorted(children, key=lambda child: child.pid)
        return self._workers

    def hit(self, target: str, number: int) -> list[int]:
        """Send signal `number` to 'agent', 'rank 0', 'rank 1' or 'all'; the processes that were hit."""
        workers = [worker.pid for worker in self.workers()]
        pids = {"agent": [self._agent.pid], "all": [self._agent.pid, *workers]}
        hit = pids[target] if target in pids else workers[int(target.split()[1]) :][:1]
        for pid in hit:
            os.kill(pid, number)
        return hit

    def ended(self, besides: Sequence[int] = ()) -> bool:
        """Whether every process, `besides` stopped ones, has ended."""
        agent_ended = self._agent.poll() is not None or self._agent.pid in besides
        return agent_ended and not [worker for worker in self.workers() if worker.pid not in besides and _lives(worker)]

    def codes(self) -> list[int | None]:
        """The agent's exit code."""
        return [self._agent.returncode]

    def kill(self) -> None:
        """End whatever is left."""
        for process in (
            [*self.workers(), psutil.Process(self._agent.pid)] if self._agent.poll() is None else self.workers()
        ):
            if _lives(process):
                process.kill()
        self._agent.wait(timeout=30)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, timeout: float, every: float = 0.002) -> bool:
    """Whether `condition()` became true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True
