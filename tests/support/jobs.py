"""Trainings of several ranks that a test can signal while they run: forked ranks, or ranks under torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from support import fork_server
from support.processes import REPOSITORY, TIMEOUT, environment, without_report

NUM_RANKS = 2
TRAIN = """
import importlib, sys

fault, *arguments = sys.argv[1:]
if fault:
    module, function = fault.split(":")
    getattr(importlib.import_module(module), function)()
from agnews_dist.__main__ import main

sys.exit(main(["train", *arguments]))
"""


class ForkedJob:
    """Ranks as `srun` starts them: siblings without an agent; rank 0 hosts the store."""

    def __init__(
        self, arguments: Sequence[str], log: Path, num_ranks: int = NUM_RANKS, *, fault: str = "", **environ: str
    ) -> None:
        """`fault`: `module:function` that every rank calls first; `environ`: variables of all ranks."""
        shared = environment(**environ)
        self._ranks = [
            fork_server.start(["-c", TRAIN, fault, *arguments], {**shared, **own}, fork_server.Streams(log, log))
            for own in fork_server.rank_variables(num_ranks)
        ]
        self.pids = [process.pid for process in self._ranks]

    def signal(self, target: str, number: int) -> list[int]:
        """Send signal `number` to 'rank N' or 'all'; return the processes that got it."""
        pids = self.pids if target == "all" else [self.pids[int(target.split()[1])]]
        for pid in pids:
            os.kill(pid, number)
        return pids

    def has_ended(self, except_pids: Sequence[int] = ()) -> bool:
        """Return whether every process has ended; those of `except_pids` are suspended and do not count."""
        return not [rank for rank in self._ranks if rank.pid not in except_pids and rank.exitcode is None]

    def codes(self) -> list[int | None]:
        """Return exit codes by rank; negative: ended by that signal; None: still running."""
        return [rank.exitcode for rank in self._ranks]

    def kill(self, *, with_stacks: bool = False) -> None:
        """End what still runs; `with_stacks`: it writes the stacks of its threads into the log first."""
        for rank in self._ranks:
            if with_stacks:
                fork_server.abort(rank)
            elif rank.exitcode is None:
                rank.kill()
            rank.join()


class TorchrunJob:
    """A training as users start it; the agent can be signalled as well."""

    def __init__(self, arguments: Sequence[str], log: Path, num_ranks: int = NUM_RANKS) -> None:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        agent.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")
        with log.open("ab") as file:
            self._agent = subprocess.Popen(
                [*agent, *without_report(["-m", "agnews_dist.train", *arguments])],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self._num_ranks = num_ranks
        self._workers: list[psutil.Process] = []

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the ranks in rank order; empty before torchrun has started all."""
        if not self._workers and self._agent.poll() is None:
            children = psutil.Process(self._agent.pid).children()
            if len(children) >= self._num_ranks:
                self._workers = sorted(children, key=lambda child: child.pid)
        return self._workers

    def signal(self, target: str, number: int) -> list[int]:
        """Send signal `number` to 'agent', 'rank N' or 'all'; return the processes that got it."""
        workers = [worker.pid for worker in self.workers()]
        groups = {"agent": [self._agent.pid], "all": [self._agent.pid, *workers]}
        found: list[int] = []
        for pid in groups[target] if target in groups else workers[int(target.split()[1]) :][:1]:
            # A rank may end before the agent does.
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                found.append(pid)
        return found

    def has_ended(self, except_pids: Sequence[int] = ()) -> bool:
        """Return whether every process has ended; those of `except_pids` are suspended and do not count."""
        agent_ended = self._agent.poll() is not None or self._agent.pid in except_pids
        return agent_ended and not [
            worker for worker in self.workers() if worker.pid not in except_pids and _is_running(worker)
        ]

    def codes(self) -> list[int | None]:
        """Return the agent's exit code."""
        return [self._agent.returncode]

    def kill(self) -> None:
        """End what still runs."""
        agent = [psutil.Process(self._agent.pid)] if self._agent.poll() is None else []
        for process in [*self.workers(), *agent]:
            if _is_running(process):
                process.kill()
        self._agent.wait(timeout=TIMEOUT)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
