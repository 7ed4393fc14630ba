"""A stop, or a failure, of one rank is known to all and ends all, whatever their main threads are doing: on real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.processes import REPOSITORY, environment

from agnews_dist.distributed.node_resources import free_port

WORKER = str(REPOSITORY / "tests" / "ranks" / "preempt_worker.py")
HANG = 40


def wait_until(condition, seconds: float = HANG) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Server:
    """Forks ranks from a process that has imported torch."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, WORKER, "serve"], stdin=pipe, stdout=pipe, text=True, env=environment(), cwd=REPOSITORY
        )

    def ask(self, **asked) -> list:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=HANG)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


class Job:
    """Ranks in the states that are named, as a scheduler without torchrun starts them: siblings, rank 0 hosts the store."""

    def __init__(self, directory: Path, server: Server, *states: str, **environ: str) -> None:
        self.directory, self._server = directory, server
        size, port = str(len(states)), str(free_port())
        environs = [
            {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environ},
            }
            for rank in range(len(states))
        ]
        self.pids = server.ask(environs=environs, words=[str(directory), ",".join(states)], log=str(directory / "log"))
        marks = [(rank, "started" if "imports" in states else "ready") for rank in range(len(states))]
        try:
            assert wait_until(lambda: all((directory / f"{rank}.{mark}").exists() for rank, mark in marks)), self.told
        except BaseException:
            self.kill()
            raise
        # What follows that mark is a few instructions.
        time.sleep(0.3)

    def hit(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def touch(self, name: str) -> None:
        (self.directory / name).touch()

    @property
    def told(self) -> str:
        log = self.directory / "log"
        return log.read_text() if log.exists() else ""

    @property
    def lines(self) -> list[str]:
        """Of ours, without what torch logs."""
        return [line for line in self.told.splitlines() if line.startswith("[rank ")]

    def words(self) -> list[str]:
        """The last words of every rank, by rank; empty: none."""
        files = [self.directory / f"{rank}.words" for rank in range(len(self.pids))]
        return [file.read_text().strip() if file.exists() else "" for file in files]

    def codes(self) -> list[int | None]:
        ended = dict(map(tuple, self._server.ask()))
        return [ended.get(pid) for pid in self.pids]

    def end(self, seconds: float = HANG, besides: int | None = None) -> list[int | None]:
        """Wait until all ranks, `besides` one, have ended by themselves; their exit codes."""
        done = wait_until(lambda: all(code is not None or r == besides for r, code in enumerate(self.codes())), seconds)
        codes = self.codes()
        self.kill()
        assert done, f"after {seconds} s: {codes}\n{self.told[-5000:]}"
        return codes

    def kill(self) -> None:
        for pid, code in zip(self.pids, self.codes(), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path, server):
    jobs = []

    def begin(*states: str, **environ: str) -> Job:
        jobs.append(Job(tmp_path, server, *states, **environ))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_rank_is_told_before_training_ends_all_wherever_they_are(start, rank):
    number = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)[rank]
    job = start("collective", "lock", "compute")
    begin = time.monotonic()
    job.hit(rank, number)
    assert job.end(15) == [75, 75, 75]
    assert time.monotonic() - begin < 10
    assert job.words() == [f"preempted: {signal.Signals(number).name}"] * 3
    assert job.told == "", "nobody failed"


def test_while_training_all_leave_after_the_same_step(start):
    job = start("steps", "steps", "steps")
    job.hit(2, signal.SIGUSR1)
    assert job.end(15) == [75, 75, 75]
    assert len({(job.directory / f"{rank}.saved").read_text() for rank in range(3)}) == 1
    assert job.words() == ["", "", ""], "each ended by itself"
    assert re.fullmatch(r"stopped after step \d+\n", job.told), "and nothing else is told"


def test_a_training_that_hangs_is_ended_after_the_grace_time(start):
    job = start("stuck", "stuck", GRACE_SECONDS="2")
    begin = time.monotonic()
    job.hit(1, signal.SIGTERM)
    assert job.end(20) == [75, 75]
    assert time.monotonic() - begin >= 2
    assert job.words() == ["preempted: SIGTERM"] * 2


def test_a_second_signal_ends_all_at_once(start):
    job = start("stuck", "stuck")
    job.hit(1, signal.SIGINT)
    time.sleep(0.5)
    job.hit(1, signal.SIGINT)  # the same Ctrl-C, from the launcher
    time.sleep(2)
    assert job.codes() == [None, None]
    job.hit(1, signal.SIGTERM)
    assert job.end(12) == [75, 75]
    assert job.words() == ["preempted: SIGINT"] * 2


def test_a_rank_that_is_about_to_train_waits_for_the_others_answer(start):
    """Rank 0 trains already; rank 1 has said that it may end at once, and must not."""
    job = start("steps", "begins")
    job.hit(1, signal.SIGTERM)
    time.sleep(1.5)
    assert job.codes() == [None, None]
    job.touch("begin")
    assert job.end(15) == [75, 75]
    assert (job.directory / "0.saved").read_text() == (job.directory / "1.saved").read_text()


def test_ranks_that_all_said_they_may_end_do_not_begin(start):
    job = start("begins", "begins", "lock")
    job.hit(2, signal.SIGSTOP)
    job.hit(0, signal.SIGTERM)
    time.sleep(1)
    job.touch("begin")
    time.sleep(0.5)
    job.hit(2, signal.SIGCONT)
    assert job.end(15) == [75, 75, 75]
    assert job.words() == ["preempted: SIGTERM"] * 3
    assert list(job.directory.glob("*.begun")) == []


def test_a_rank_that_has_not_met_the_others_waits_for_them_but_not_for_ever(start):
    job = start("imports", "imports", GRACE_SECONDS="2")
    job.hit(0, signal.SIGTERM)
    assert wait_until(lambda: job.codes()[0] is not None, 10)
    assert job.codes() == [1, None], "nobody could tell rank 1"
    assert job.words() == ["failed: SIGTERM", ""]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_silent_rank_is_named_and_ends_all(start, stopped):
    """Rank 0 hosts what the ranks talk through, so that nobody can talk when it is the one."""
    job = start("collective", "lock", "collective", TIMEOUT_SECONDS="3")
    begin = time.monotonic()
    job.hit(stopped, signal.SIGSTOP)
    codes = job.end(20, besides=stopped)
    assert time.monotonic() - begin >= 2
    assert codes == [None if rank == stopped else 1 for rank in range(3)]
    said = rf"rank {stopped} has given no sign of life for [3-9] s"
    form = rf"\[rank \d/3\] error: {said}: a process or a machine .*\. See what was .*\.( \(Here it ended with .*\))?"
    errors = [line for line in job.lines if "error: " in line]
    assert errors
    assert all(re.fullmatch(form, line) for line in errors), errors
    if stopped == 1:
        assert len(errors) == 1
        assert errors[0].startswith("[rank 0/3]")
        assert job.lines[1:] in ([], [f"[rank 2/3] rank {stopped} gives no sign of life; this rank ended with it"])
    words = [word for word in job.words() if word]
    assert words
    assert all(re.fullmatch(f"failed: {said}", word) for word in words)


def test_a_silent_rank_is_named_even_if_a_collective_notices_it_first(start):
    # Far apart, for a busy machine; and half of the first is less than the silence that a rank waits for before it speaks.
    job = start("collective", "collective", "compute", TIMEOUT_SECONDS="5.9", COLLECTIVE_SECONDS="3")
    job.hit(2, signal.SIGSTOP)
    assert job.end(20, besides=2) == [1, 1, None]
    assert "Traceback" not in job.told, job.told
    (error,) = [line for line in job.lines if "error: " in line]
    assert re.search(r"error: rank 2 has given no sign of life for [3-5] s: .*\(Here it ended with .*\)", error), error


def test_a_stop_of_all_does_not_wait_for_a_silent_rank(start):
    job = start("lock", "lock", TIMEOUT_SECONDS="600")
    job.hit(1, signal.SIGSTOP)
    job.hit(0, signal.SIGTERM)
    assert job.end(20, besides=1) == [1, None]
    assert re.fullmatch(r"failed: rank 1 has given no sign of life for \d s", job.words()[0])


def test_ranks_that_were_all_suspended_do_not_blame_each_other(start):
    job = start("steps", "steps", TIMEOUT_SECONDS="2")
    for rank in (0, 1):
        job.hit(rank, signal.SIGSTOP)
    time.sleep(3)
    for rank in (0, 1):
        job.hit(rank, signal.SIGCONT)
    time.sleep(1)
    assert job.codes() == [None, None], job.told
    job.hit(0, signal.SIGTERM)
    assert job.end(15) == [75, 75]


def test_a_rank_that_is_killed_is_named_beside_the_error_it_causes(start):
    job = start("collective", "compute")
    job.hit(1, signal.SIGKILL)
    assert job.end(20) == [1, -signal.SIGKILL]
    assert re.match(r"\[rank 0/2\] error: rank 1 has given no sign of life for 3 s: ", job.lines[0])
    assert job.lines[1] == "[rank 0/2] Traceback (most recent call last):"


def test_the_end_of_rank_0_is_noticed_in_a_wait_for_a_file(start):
    job = start("compute", "lock")
    job.hit(0, signal.SIGKILL)
    assert job.end(20) == [-signal.SIGKILL, 1]
    (line,) = job.lines
    assert re.fullmatch(
        r"\[rank 1/2\] error: rank 0 has ended without a word: it was killed, .*\. See what was .*\.", line
    )
    assert job.words() == ["", "failed: rank 0 has ended without a word"]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_failure_is_told_in_full_and_ends_all(start, failing):
    states = ["collective", "lock", "collective"]
    states[failing] = "crash"
    job = start(*states)
    job.touch("crash")
    assert wait_until(lambda: "ZeroDivisionError" in job.told, 20), job.told
    # As torchrun does, to those that are left.
    left = [rank for rank in range(3) if rank != failing]
    for rank in left:
        job.hit(rank, signal.SIGTERM)
    codes = job.end(20)
    assert codes[failing] == 1
    # Who has told it, and ends by itself, watches no more, and may die of the signal in its last moments.
    assert {codes[rank] for rank in left} <= {1, -signal.SIGTERM}
    lines = job.lines
    assert lines[0] == f"[rank {failing}/3] Traceback (most recent call last):"
    told = [line for line in lines if not line.startswith(f"[rank {failing}/3]")]
    assert sorted(told) == [f"[rank {rank}/3] rank {failing} failed first; this rank ended with it" for rank in left]
    assert job.told.count("ZeroDivisionError: a bug on one rank") == 1
    words = [word for word in job.words() if word]
    assert set(words) <= {f"failed: rank {failing}: ZeroDivisionError: a bug on one rank"}


def test_a_rank_whose_work_is_done_keeps_nobody_from_stopping(start):
    job = start("lock", "ends", "lock")
    assert wait_until(lambda: job.codes()[1] == 0, 15), job.told
    job.hit(2, signal.SIGTERM)
    assert job.end(15) == [75, 0, 75]


def test_an_orderly_end_of_all_is_quiet(start):
    job = start("ends", "ends", "ends")
    assert job.end(15) == [0, 0, 0]
    assert job.told == ""


class Torchrun(Job):
    """Ranks as torchrun starts them."""

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
        self.pids = []

    def be_ready(self) -> "Torchrun":
        marks = [self.directory / f"{rank}.ready" for rank in range(len(self._states))]
        assert wait_until(lambda: all(mark.exists() and mark.read_text().endswith("\n") for mark in marks)), self.told
        self.pids = [int(mark.read_text()) for mark in marks]
        time.sleep(0.3)
        return self

    def end(self, seconds: float = HANG, besides: int | None = None) -> list[int | None]:
        """torchrun's exit code."""
        done = wait_until(lambda: self.agent.poll() is not None and not self._alive(), seconds)
        self.kill()
        assert done, f"after {seconds} s\n{self.told[-5000:]}"
        return [self.agent.returncode]

    def _alive(self) -> list[int]:
        return [pid for pid in self.pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    def kill(self) -> None:
        self.agent.kill()
        self.agent.wait()
        for pid in self._alive():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Started together, since what takes its time is imports."""
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


def test_under_torchrun_a_stop_is_no_failure(launched):
    job = launched["worker"].be_ready()
    job.hit(1, signal.SIGTERM)
    assert job.end(20) == [0], "another code would have torchrun start it again"
    assert job.words() == ["preempted: SIGTERM"] * 2


def test_what_torchrun_passes_on_stops_all(launched):
    job = launched["agent"].be_ready()
    job.agent.send_signal(signal.SIGUSR1)
    job.end(20)
    assert job.words() == ["preempted: SIGUSR1"] * 2


def test_ranks_end_when_their_launcher_is_gone(launched):
    job = launched["orphans"].be_ready()
    job.agent.kill()
    job.end(20)
    assert job.words() == ["preempted: the launcher is gone"] * 2
