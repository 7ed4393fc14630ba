"""A stop reaches a process whose main thread is anywhere, and ends it where that does not: real processes, no torch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import REPOSITORY, environment

from agnews_dist.distributed.preemption import SIGNALS, PreemptionHandler, preempted_exit_code, slurm_seconds_left

PRELUDE = """
import ctypes, os, signal, sys, threading, time
from agnews_dist.distributed.preemption import PreemptionHandler

def words(how, why):
    print(f"{how}: {why}")

def stay():
    # In C, where Python runs no handler: a lock that nobody opens.
    lock = threading.Lock()
    lock.acquire()
    print("ready", flush=True)
    lock.acquire()

watch = PreemptionHandler(os.environ, grace_seconds=float(os.environ.get("GRACE_SECONDS", "25")))
watch.last_words = words
watch.start()
"""
STAY = PRELUDE + "stay()\n"
TRAIN = PRELUDE + "watch.saves_from_now()\nstay()\n"
HANG = 30


class Child:
    """Python with `code`; `ready` has been printed."""

    def __init__(self, code: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**environ),
            cwd=REPOSITORY,
        )
        line = self.process.stdout.readline()
        if line != "ready\n":
            self.process.kill()
            pytest.fail(line + self.process.communicate()[0])

    def end(self) -> tuple[int, str, float]:
        """(exit code, what it printed, seconds that took)."""
        begin = time.monotonic()
        try:
            printed, _ = self.process.communicate(timeout=HANG)
        finally:
            self.process.kill()
        return self.process.returncode, printed, time.monotonic() - begin


def end_of(code: str, *numbers: int, **environ: str) -> tuple[int, str, float]:
    child = Child(code, **environ)
    for number in numbers:
        child.process.send_signal(number)
    return child.end()


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_a_signal_ends_a_process_at_once(number):
    code, printed, seconds = end_of(STAY, number)
    assert (code, printed) == (75, f"preempted: {number.name}\n")
    assert seconds < 10


def test_under_torchrun_a_stop_is_no_failure():
    assert preempted_exit_code({}) == 75
    assert preempted_exit_code({"TORCHELASTIC_RUN_ID": "none"}) == 0
    code, printed, _ = end_of(STAY, signal.SIGTERM, TORCHELASTIC_RUN_ID="none")
    assert (code, printed) == (0, "preempted: SIGTERM\n")


def test_while_training_the_main_thread_has_the_grace_time():
    code, printed, seconds = end_of(TRAIN, signal.SIGUSR1, GRACE_SECONDS="1.5")
    assert (code, printed) == (75, "preempted: SIGUSR1\n")
    assert seconds > 1


@pytest.mark.parametrize("leaves", [True, False], ids=["leaving", "not asked"])
def test_leaving_is_no_way_around_the_grace_time(leaves):
    """Also where the vote came before this rank itself knew of the stop."""
    before = "while not watch.asked: time.sleep(0.01)\n" if leaves else ""
    code = PRELUDE + f"watch.saves_from_now()\nprint('ready', flush=True)\n{before}watch.leaving()\ntime.sleep(60)\n"
    status, printed, _ = end_of(code, *([signal.SIGTERM] if leaves else []), GRACE_SECONDS="1")
    assert (status, printed) == (75, "preempted: SIGTERM\n" if leaves else "preempted: \n")


def test_the_main_thread_ends_by_itself_if_it_can():
    code = TRAIN.replace("stay()\n", "") + (
        "print('ready', flush=True)\nwhile not watch.is_stopping: time.sleep(0.01)\n"
        "watch.leaving()\nwatch.close()\nprint(watch.asked)\nsys.exit(7)\n"
    )
    code, printed, _ = end_of(code, signal.SIGUSR2, GRACE_SECONDS="5")
    assert (code, printed) == (7, "SIGUSR2\n")


def test_a_second_signal_ends_at_once_unless_it_is_the_same_ctrl_c():
    child = Child(TRAIN)
    child.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    child.process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert child.process.poll() is None, "a terminal's Ctrl-C comes twice, directly and through the launcher"
    child.process.send_signal(signal.SIGTERM)
    code, printed, seconds = child.end()
    assert (code, printed) == (75, "preempted: SIGINT\n")
    assert seconds < 10


def test_a_deadline_is_a_reason_and_the_earliest_counts():
    code = STAY.replace("stay()\n", "watch.set_deadline(0.5, 'the limit')\nwatch.set_deadline(60, 'another')\nstay()\n")
    status, printed, _ = end_of(code)
    assert (status, printed) == (75, "preempted: the limit\n")


def test_a_launcher_that_is_gone_is_a_reason_but_a_shell_is_none(tmp_path):
    """The parent of both ends; only one of them has been started by a launcher."""
    code = STAY.replace(
        "stay()\n", "words = watch.last_words\nwatch.last_words = lambda *told: (words(*told))\nstay()\n"
    )
    code = code.replace('print(f"{how}: {why}")', "open(sys.argv[1], 'w').write(f'{how}: {why}')")
    parent = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], "
    parent += "stdout=subprocess.PIPE, text=True)\nassert child.stdout.readline() == 'ready\\n'\nprint(child.pid)\n"
    told = {}
    for name, environ in {"launcher": {"RANK": "0", "WORLD_SIZE": "1"}, "shell": {}}.items():
        pid = int(
            subprocess.check_output(
                [sys.executable, "-c", parent, code, str(tmp_path / name)], env=environment(**environ), timeout=HANG
            )
        )
        told[name] = pid
    try:
        deadline = time.monotonic() + HANG
        while not (tmp_path / "launcher").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "launcher").read_text() == "preempted: the launcher is gone"
        time.sleep(0.5)
        assert not (tmp_path / "shell").exists()
        os.kill(told["shell"], signal.SIGTERM)
        while not (tmp_path / "shell").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "shell").read_text() == "preempted: SIGTERM"
    finally:
        for pid in told.values():
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("what", ["raise RuntimeError('no words')", "threading.Event().wait()"])
def test_last_words_cannot_prevent_the_end(what):
    code = STAY.replace('print(f"{how}: {why}")', what)
    status, printed, seconds = end_of(code, signal.SIGTERM)
    assert status == 75
    assert ("no words" in printed) == ("raise" in what), "a bug in them is not hidden"
    assert seconds < 15


def test_what_was_printed_is_not_lost():
    code = PRELUDE + "print('in the buffer')\nprint('ready', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    status, printed, _ = end_of(code, signal.SIGTERM, PYTHONUNBUFFERED="")
    assert (status, printed) == (75, "in the buffer\npreempted: SIGTERM\n")


def test_handlers_and_wakeup_are_restored_and_a_process_can_watch_twice():
    before = [signal.getsignal(number) for number in SIGNALS]
    fds = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        watch = PreemptionHandler({})
        watch.start()
        try:
            assert [signal.getsignal(number) for number in SIGNALS] != before
            # Something to save: else this very process would be ended.
            watch.saves_from_now()
            assert watch.asked is None
            assert not watch.is_stopping
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + HANG
            while not watch.is_stopping and time.monotonic() < deadline:
                time.sleep(0.01)
            assert watch.asked == "SIGUSR1"
            assert watch.failed("RuntimeError: alone") is None, "all of it is told"
        finally:
            watch.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


def test_other_programs_signals_are_no_stop():
    watch = PreemptionHandler({})
    received = []
    before = signal.signal(signal.SIGHUP, lambda number, _: received.append(number))
    watch.start()
    try:
        watch.saves_from_now()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.5)
        assert received == [signal.SIGHUP]
        assert watch.asked is None
    finally:
        watch.close()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("end", ["", "Unknown", "NONE", "1e9", "999", "²"])
def test_a_job_end_that_cannot_be_true_is_no_limit(end):
    """The last but one is over, as in a shell that was left in an old job's environment."""
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": end}, 1000.0) is None


def test_the_limit_of_a_slurm_job():
    assert slurm_seconds_left({}, 1000.0) is None
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": "1600"}, 1000.5) == 599.5


def test_a_rank_that_has_not_met_the_others_waits_for_the_grace_time():
    """Ranks that have met it would not know; the code says that nobody can be sure of them."""
    environ = {"RANK": "1", "WORLD_SIZE": "2", "GRACE_SECONDS": "1"}
    status, printed, seconds = end_of(STAY, signal.SIGTERM, **environ)
    assert (status, printed) == (1, "failed: SIGTERM\n")
    assert seconds > 0.5


RANK_1_FAILED = (
    PRELUDE
    + """
from torch.distributed import HashStore
from agnews_dist.distributed.coordinator import Coordinator

store = HashStore()
watch.meet(store, 0, 2, 60.0)
other = Coordinator(store, 1, 2, 60.0, is_early=lambda: False, wake=lambda: None)
watch.saves_from_now()
print("ready", flush=True)
other.fail("a bug")
while watch._coordinator.failure is None:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGTERM)
# Long enough for the second thread to read it, and less than the main thread has after a failure.
time.sleep(1)
print("asked:", watch.asked, flush=True)
os._exit(7)
"""
)


def test_what_a_launcher_sends_because_a_rank_failed_is_no_stop():
    code, printed, _ = end_of(RANK_1_FAILED)
    assert (code, printed.splitlines()[-1]) == (7, "asked: None")


def test_torch_is_not_loaded():
    """It takes seconds, in which a signal may come."""
    code = (
        "import sys, agnews_dist.distributed.preemption\nprint(sorted(set(sys.modules) & {'torch', 'numpy', 'psutil'}))"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, text=True)
    assert re.fullmatch(r"\[\]\n", printed)
