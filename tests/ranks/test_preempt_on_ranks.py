"""A stop or a failure of one rank ends all ranks, whatever their main threads do: real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import fork_server
from support.processes import REPOSITORY, environment, has_ended

WORKER = str(REPOSITORY / "tests" / "ranks" / "preempt_worker.py")
SOON = 80
"""Seconds within which ranks start or end; their own time limits are far above, or set by the test."""
END = 15 if "AGNEWS_MUTANT" in os.environ else SOON
"""With a mutant the ranks do not end."""


def wait_until(condition, seconds: float = SOON) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Job:
    """Ranks in the given states, started without torchrun; rank 0 hosts the store."""

    def __init__(self, directory: Path, *states: str, **environ: str) -> None:
        self.directory = directory
        streams = fork_server.Streams(directory / "log", directory / "log")
        command = [WORKER, str(directory), ",".join(states)]
        self._ranks = [
            fork_server.start(command, environment(**own, **environ), streams)
            for own in fork_server.rank_variables(len(states))
        ]
        mark = "started" if "imports" in states else "ready"
        marks = [directory / f"{rank}.{mark}" for rank in range(len(states))]
        try:
            assert wait_until(lambda: all(path.exists() for path in marks)), self.output
        except BaseException:
            self.kill()
            raise
        # Only a few instructions lie between that file and the state.
        time.sleep(0.3)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def touch(self, name: str) -> None:
        (self.directory / name).touch()

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    @property
    def output(self) -> str:
        log = self.directory / "log"
        return log.read_text() if log.exists() else ""

    @property
    def lines(self) -> list[str]:
        """Output lines of this package, without torch's own."""
        return [line for line in self.output.splitlines() if line.startswith("[rank ")]

    def reports(self) -> list[str]:
        """Return what `before_exit` was called with on each rank; empty if it was not."""
        files = [self.directory / f"{rank}.report" for rank in range(len(self.pids))]
        return [file.read_text().strip() if file.exists() else "" for file in files]

    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self._ranks]

    def wait(self, seconds: float = END, except_rank: int | None = None) -> list[int | None]:
        """Wait until all ranks but `except_rank` have ended by themselves; return their exit codes."""
        ended = wait_until(lambda: all(code is not None or r == except_rank for r, code in enumerate(self.codes())), seconds)
        codes = self.codes()
        self.kill()
        assert ended, f"after {seconds} s: {codes}\n{self.output[-5000:]}"
        return codes

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.join()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def begin(*states: str, **environ: str) -> Job:
        jobs.append(Job(tmp_path, *states, **environ))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_signal_to_one_rank_before_training_ends_all(start, rank):
    number = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)[rank]
    job = start("collective", "lock", "compute")
    job.send(rank, number)
    assert job.wait() == [75, 75, 75]
    assert job.reports() == [f"preempted: {signal.Signals(number).name}"] * 3
    assert job.output == "", "no rank failed"


@pytest.mark.parametrize("states", [("breaks", "collective"), ("collective", "breaks"), ("breaks", "breaks")])
def test_collective_that_a_stop_ends_is_not_reported_as_failed(start, states):
    job = start(*states)
    job.send(0, signal.SIGTERM)
    assert job.wait() == [75, 75], "not after the grace time"
    assert job.reports() == ["preempted: SIGTERM"] * 2
    assert job.output == ""


def test_error_of_a_rank_after_a_stop_is_printed_and_the_stop_remains(start):
    job = start("collective", "fails")
    job.send(0, signal.SIGTERM)
    assert job.wait() == [75, 75]
    assert job.reports() == ["preempted: SIGTERM"] * 2
    assert job.lines == ["[rank 1/2] error: ZeroDivisionError: a bug"]


def test_signal_during_training_stops_all_after_the_same_step(start):
    job = start("steps", "steps", "steps")
    job.send(2, signal.SIGUSR1)
    assert job.wait() == [75, 75, 75]
    assert len({(job.directory / f"{rank}.saved").read_text() for rank in range(3)}) == 1
    assert job.reports() == ["", "", ""], "all main threads ended by themselves"
    assert re.fullmatch(r"stopped after step \d+\n", job.output), "no other output"


def test_hanging_training_is_ended_after_the_grace_time(start):
    job = start("stuck", "stuck", GRACE_SECONDS="2")
    begin = time.monotonic()
    job.send(1, signal.SIGTERM)
    assert job.wait() == [75, 75]
    assert time.monotonic() - begin >= 2
    assert job.reports() == ["preempted: SIGTERM"] * 2


def test_second_signal_ends_all_at_once(start):
    job = start("stuck", "stuck")
    job.send(1, signal.SIGINT)
    time.sleep(0.5)
    job.send(1, signal.SIGINT)  # the same Ctrl-C, from the launcher
    time.sleep(2)
    assert job.codes() == [None, None]
    job.send(1, signal.SIGTERM)
    assert job.wait() == [75, 75]
    assert job.reports() == ["preempted: SIGINT"] * 2


def test_rank_that_agreed_to_exit_waits_while_another_trains(start):
    """Rank 0 trains already; rank 1 has agreed to exit without saving, and must not."""
    job = start("steps", "begins")
    job.send(1, signal.SIGTERM)
    time.sleep(1.5)
    assert job.codes() == [None, None]
    job.touch("begin")
    assert job.wait() == [75, 75]
    assert (job.directory / "0.saved").read_text() == (job.directory / "1.saved").read_text()


def test_ranks_that_all_agreed_to_exit_do_not_begin(start):
    job = start("begins", "begins", "lock")
    job.send(2, signal.SIGSTOP)
    job.send(0, signal.SIGTERM)
    time.sleep(1)
    job.touch("begin")
    time.sleep(0.5)
    job.send(2, signal.SIGCONT)
    assert job.wait() == [75, 75, 75]
    assert job.reports() == ["preempted: SIGTERM"] * 3
    assert list(job.directory.glob("*.begun")) == []


def test_rank_that_is_not_connected_fails_after_the_grace_time(start):
    job = start("imports", "imports", GRACE_SECONDS="2")
    job.send(0, signal.SIGTERM)
    assert wait_until(lambda: job.codes()[0] is not None)
    assert job.codes() == [1, None], "rank 1 cannot know of the stop"
    assert job.reports() == ["failed: SIGTERM", ""]


@pytest.mark.parametrize("stopped", [0, 1])
def test_silent_rank_is_named_and_ends_all(start, stopped):
    """Rank 0 hosts the store, so the others cannot use it if rank 0 is the silent one."""
    job = start("collective", "lock", "collective", TIMEOUT_SECONDS="3")
    begin = time.monotonic()
    job.send(stopped, signal.SIGSTOP)
    codes = job.wait(except_rank=stopped)
    assert time.monotonic() - begin >= 2
    assert codes == [None if rank == stopped else 1 for rank in range(3)]
    silence = rf"rank {stopped} has sent no heartbeat for \d+ s"
    form = rf"\[rank \d/3\] error: {silence}: a process or machine .*\. Check the last .*\.( \(Here it ended with .*\))?"
    errors = [line for line in job.lines if "error: " in line]
    assert errors
    assert all(re.fullmatch(form, line) for line in errors), errors
    if stopped == 1:
        assert len(errors) == 1
        assert errors[0].startswith("[rank 0/3]")
        assert all(re.fullmatch(rf"\[rank 2/3\] {silence}; this rank ended with it", line) for line in job.lines[1:])
    reports = [report for report in job.reports() if report]
    assert reports
    assert all(re.fullmatch(f"failed: {silence}", report) for report in reports)


def test_silent_rank_is_named_even_if_a_collective_fails_first(start):
    # Far apart, for a busy machine; half of the first is less than SILENCE_SECONDS.
    job = start("collective", "collective", "compute", TIMEOUT_SECONDS="5.9", COLLECTIVE_SECONDS="3")
    job.send(2, signal.SIGSTOP)
    assert job.wait(except_rank=2) == [1, 1, None]
    assert "Traceback" not in job.output, job.output
    (error,) = [line for line in job.lines if "error: " in line]
    assert re.search(r"error: rank 2 has sent no heartbeat for \d+ s: .*\(Here it ended with .*\)", error), error


def test_stop_does_not_wait_for_a_silent_rank(start):
    job = start("lock", "lock", TIMEOUT_SECONDS="600")
    job.send(1, signal.SIGSTOP)
    job.send(0, signal.SIGTERM)
    assert job.wait(except_rank=1) == [1, None]
    assert re.fullmatch(r"failed: rank 1 has sent no heartbeat for \d+ s", job.reports()[0])


def test_suspended_ranks_do_not_report_each_other(start):
    job = start("steps", "steps", TIMEOUT_SECONDS="2")
    for rank in (0, 1):
        job.send(rank, signal.SIGSTOP)
    time.sleep(3)
    for rank in (0, 1):
        job.send(rank, signal.SIGCONT)
    time.sleep(1)
    assert job.codes() == [None, None], job.output
    job.send(0, signal.SIGTERM)
    assert job.wait() == [75, 75]


def test_killed_rank_is_named_with_the_error_it_causes(start):
    job = start("collective", "compute")
    job.send(1, signal.SIGKILL)
    assert job.wait() == [1, -signal.SIGKILL]
    (line,) = job.lines
    assert re.fullmatch(r"\[rank 0/2\] error: rank 1 has sent no heartbeat for \d+ s: .* \(Here it ended with .*\)", line)


def test_end_of_rank_0_ends_a_rank_that_waits_for_a_file(start):
    job = start("compute", "lock")
    job.send(0, signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL, 1]
    (line,) = job.lines
    assert re.fullmatch(
        r"\[rank 1/2\] error: rank 0 exited without an error message: it was killed .*\. Check the last .*\.", line
    )
    assert job.reports() == ["", "failed: rank 0 exited without an error message"]


@pytest.mark.parametrize("failing", [0, 1])
def test_first_failure_is_printed_in_full_and_ends_all(start, failing):
    states = ["collective", "lock", "collective"]
    states[failing] = "crash"
    job = start(*states)
    job.touch("crash")
    assert wait_until(lambda: "ZeroDivisionError" in job.output), job.output
    # torchrun does the same to the other ranks.
    left = [rank for rank in range(3) if rank != failing]
    for rank in left:
        job.send(rank, signal.SIGTERM)
    codes = job.wait()
    assert codes[failing] == 1
    # A rank that already ends by itself has restored the signal handlers, and may die of the signal.
    assert {codes[rank] for rank in left} <= {1, -signal.SIGTERM}
    lines = job.lines
    assert lines[0] == f"[rank {failing}/3] Traceback (most recent call last):"
    consequences = [line for line in lines if not line.startswith(f"[rank {failing}/3]")]
    assert sorted(consequences) == [f"[rank {rank}/3] rank {failing} failed first; this rank ended with it" for rank in left]
    assert job.output.count("ZeroDivisionError: a bug on one rank") == 1
    assert {report for report in job.reports() if report} <= {f"failed: rank {failing}: ZeroDivisionError: a bug on one rank"}


def test_rank_that_has_ended_does_not_prevent_a_stop(start):
    job = start("lock", "ends", "lock")
    assert wait_until(lambda: job.codes()[1] == 0), job.output
    job.send(2, signal.SIGTERM)
    assert job.wait() == [75, 0, 75]


def test_normal_end_of_all_prints_nothing(start):
    job = start("ends", "ends", "ends")
    assert job.wait() == [0, 0, 0]
    assert job.output == ""


class Torchrun(Job):
    """Ranks started by torchrun."""

    def __init__(self, directory: Path, *states: str, options: tuple[str, ...] = (), **environ: str) -> None:
        self.directory, self._states = directory, states
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(states)}", *options]
        with (directory / "log").open("wb") as log:
            self.agent = subprocess.Popen(
                [sys.executable, *command, WORKER, str(directory), ",".join(states)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(**environ),
                cwd=REPOSITORY,
            )
        self._pids: list[int] = []

    @property
    def pids(self) -> list[int]:
        return self._pids

    def wait_until_ready(self) -> "Torchrun":
        marks = [self.directory / f"{rank}.ready" for rank in range(len(self._states))]
        assert wait_until(lambda: all(mark.exists() and mark.read_text().endswith("\n") for mark in marks)), self.output
        self._pids = [int(mark.read_text()) for mark in marks]
        time.sleep(0.3)
        return self

    def wait(self, seconds: float = END, except_rank: int | None = None) -> list[int | None]:
        """Wait for torchrun and its ranks; return its exit code."""
        ended = wait_until(lambda: self.agent.poll() is not None and not self._alive(), seconds)
        self.kill()
        assert ended, f"after {seconds} s\n{self.output[-5000:]}"
        return [self.agent.returncode]

    def _alive(self) -> list[int]:
        return [pid for pid in self.pids if not has_ended(pid)]

    def kill(self) -> None:
        self.agent.kill()
        self.agent.wait()
        for pid in self._alive():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Started together: most of their time goes to imports."""
    signals = ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2",)
    plans = {
        "worker": (("collective", "lock"), ()),
        "agent": (("collective", "compute"), signals),
        "orphans": (("collective", "lock"), ()),
    }
    jobs = {name: Torchrun(tmp_path_factory.mktemp(name), *states, options=o) for name, (states, o) in plans.items()}
    yield jobs
    for job in jobs.values():
        job.kill()


def test_stop_under_torchrun_exits_with_0(launched):
    job = launched["worker"].wait_until_ready()
    job.send(1, signal.SIGTERM)
    assert job.wait() == [0], "torchrun restarts the ranks at any other code"
    assert job.reports() == ["preempted: SIGTERM"] * 2


def test_signal_that_torchrun_forwards_stops_all(launched):
    job = launched["agent"].wait_until_ready()
    job.agent.send_signal(signal.SIGUSR1)
    job.wait()
    assert job.reports() == ["preempted: SIGUSR1"] * 2


def test_ranks_stop_when_their_launcher_is_gone(launched):
    job = launched["orphans"].wait_until_ready()
    job.agent.kill()
    job.wait()
    assert job.reports() == ["preempted: the launcher is gone"] * 2
