"""Stops of a process whose main thread is busy: real child processes, without torch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import REPOSITORY, environment

from agnews_dist.distributed.preemption import SIGNALS, PreemptionHandler, preempted_exit_code

# Processes that end, or wait for a grace time.
pytestmark = pytest.mark.slow

PRELUDE = """
import ctypes, os, signal, sys, threading, time
from agnews_dist.distributed.preemption import PreemptionHandler

# The tests themselves may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_IGN if "NOHUP" in os.environ else signal.SIG_DFL)

def report(state, reason):
    print(f"{state}: {reason}")

def block():
    # A deadlock in C code, where Python runs no signal handler.
    lock = threading.Lock()
    lock.acquire()
    print("ready", flush=True)
    lock.acquire()

handler = PreemptionHandler(os.environ, grace_seconds=float(os.environ.get("GRACE_SECONDS", "600")))
handler.before_exit = report
handler.start()
"""
BLOCK = PRELUDE + "block()\n"
TRAIN = PRELUDE + "handler.begin_training()\nblock()\n"
SOON = 60
"""Seconds within which a process ends; the grace time is far above, or set by the test."""


class Child:
    """A Python process that runs `code` and has printed `ready`."""

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
        """Return (exit code, output, seconds until the end)."""
        begin = time.monotonic()
        try:
            printed, _ = self.process.communicate(timeout=SOON)
        finally:
            self.process.kill()
        return self.process.returncode, printed, time.monotonic() - begin


def run_and_signal(code: str, *numbers: int, **environ: str) -> tuple[int, str, float]:
    """Run `code`, send it signals once it is ready, and return as `Child.end`."""
    child = Child(code, **environ)
    for number in numbers:
        child.process.send_signal(number)
    return child.end()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_training_ends_the_process_at_once(number):
    code, printed, _ = run_and_signal(BLOCK, number)
    assert (code, printed) == (75, f"preempted: {number.name}\n")


def test_exit_code_is_0_under_torchrun():
    assert preempted_exit_code({}) == 75
    assert preempted_exit_code({"TORCHELASTIC_RUN_ID": "none"}) == 0
    code, printed, _ = run_and_signal(BLOCK, signal.SIGTERM, TORCHELASTIC_RUN_ID="none")
    assert (code, printed) == (0, "preempted: SIGTERM\n")


def test_signal_during_training_leaves_the_grace_time():
    code, printed, seconds = run_and_signal(TRAIN, signal.SIGUSR1, GRACE_SECONDS="1.5")
    assert (code, printed) == (75, "preempted: SIGUSR1\n")
    assert seconds > 1


@pytest.mark.parametrize("has_signal", [True, False], ids=["signal", "no signal"])
def test_begin_exit_starts_the_grace_time(has_signal):
    """Without a signal: the vote came before this rank itself knew of the stop."""
    before = "while not handler.stop_reason: time.sleep(0.01)\n" if has_signal else ""
    code = PRELUDE + f"handler.begin_training()\nprint('ready', flush=True)\n{before}handler.begin_exit()\ntime.sleep(60)\n"
    status, printed, _ = run_and_signal(code, *([signal.SIGTERM] if has_signal else []), GRACE_SECONDS="1")
    assert (status, printed) == (75, "preempted: SIGTERM\n" if has_signal else "preempted: \n")


def test_main_thread_may_end_by_itself():
    code = TRAIN.replace("block()\n", "") + (
        "print('ready', flush=True)\nwhile not handler.is_stopping: time.sleep(0.01)\n"
        "handler.begin_exit()\nhandler.close()\nprint(handler.stop_reason)\nsys.exit(7)\n"
    )
    code, printed, _ = run_and_signal(code, signal.SIGUSR2, GRACE_SECONDS="5")
    assert (code, printed) == (7, "SIGUSR2\n")


def test_second_signal_ends_at_once_unless_it_repeats_a_ctrl_c():
    child = Child(TRAIN)
    child.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    child.process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert child.process.poll() is None, "a terminal's Ctrl-C comes twice, directly and through the launcher"
    child.process.send_signal(signal.SIGTERM)
    code, printed, _ = child.end()
    assert (code, printed) == (75, "preempted: SIGINT\n")


def test_earliest_deadline_stops_the_process():
    code = BLOCK.replace("block()\n", "handler.set_deadline(0.5, 'the limit')\nhandler.set_deadline(60, 'another')\nblock()\n")
    status, printed, _ = run_and_signal(code)
    assert (status, printed) == (75, "preempted: the limit\n")


def test_vanished_launcher_stops_the_process_but_a_shell_does_not(tmp_path):
    """The parents of both processes end; only one of the processes has a launcher's variables."""
    code = BLOCK.replace('print(f"{state}: {reason}")', "open(sys.argv[1], 'w').write(f'{state}: {reason}')")
    parent = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], "
    parent += "stdout=subprocess.PIPE, text=True)\nassert child.stdout.readline() == 'ready\\n'\nprint(child.pid)\n"
    pids = {}
    for name, environ in {"launcher": {"RANK": "0", "WORLD_SIZE": "1"}, "shell": {}}.items():
        pid = int(
            subprocess.check_output(
                [sys.executable, "-c", parent, code, str(tmp_path / name)], env=environment(**environ), timeout=SOON
            )
        )
        pids[name] = pid
    try:
        deadline = time.monotonic() + SOON
        while not (tmp_path / "launcher").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "launcher").read_text() == "preempted: the launcher is gone"
        time.sleep(0.5)
        assert not (tmp_path / "shell").exists()
        os.kill(pids["shell"], signal.SIGTERM)
        while not (tmp_path / "shell").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "shell").read_text() == "preempted: SIGTERM"
    finally:
        for pid in pids.values():
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("body", ["raise RuntimeError('a bug')", "threading.Event().wait()"])
def test_before_exit_cannot_prevent_the_end(body):
    code = BLOCK.replace('print(f"{state}: {reason}")', body)
    status, printed, _ = run_and_signal(code, signal.SIGTERM)
    assert status == 75
    assert ("a bug" in printed) == ("raise" in body), "its error is printed"


def test_buffered_output_is_flushed():
    code = PRELUDE + "print('in the buffer')\nprint('ready', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    status, printed, _ = run_and_signal(code, signal.SIGTERM, PYTHONUNBUFFERED="")
    assert (status, printed) == (75, "in the buffer\npreempted: SIGTERM\n")


def test_close_restores_signal_handlers():
    before = [signal.getsignal(number) for number in SIGNALS]
    fds = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        handler = PreemptionHandler({})
        handler.start()
        try:
            assert [signal.getsignal(number) for number in SIGNALS] != before
            # Otherwise the signal would end this process.
            handler.begin_training()
            assert handler.stop_reason is None
            assert not handler.is_stopping
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + SOON
            while not handler.is_stopping and time.monotonic() < deadline:
                time.sleep(0.01)
            assert handler.stop_reason == "SIGUSR1"
            assert handler.report_failure("RuntimeError: alone", is_own=False) is None, "print the full error"
        finally:
            handler.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


def test_other_signals_are_ignored():
    handler = PreemptionHandler({})
    received = []
    before = signal.signal(signal.SIGWINCH, lambda number, _: received.append(number))
    handler.start()
    try:
        handler.begin_training()
        os.kill(os.getpid(), signal.SIGWINCH)
        time.sleep(0.5)
        assert received == [signal.SIGWINCH]
        assert handler.stop_reason is None
    finally:
        handler.close()
        signal.signal(signal.SIGWINCH, before)


def test_nohup_outlives_its_terminal():
    """The run continues after HUP, also if it comes to the process itself; another signal stops it."""
    child = Child(BLOCK, NOHUP="1")
    child.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGQUIT)
    assert child.end()[:2] == (75, "preempted: SIGQUIT\n")


def test_rank_that_is_not_connected_fails_after_the_grace_time():
    """Its exit code is a failure: the other ranks cannot know of the stop."""
    environ = {"RANK": "1", "WORLD_SIZE": "2", "GRACE_SECONDS": "1"}
    status, printed, seconds = run_and_signal(BLOCK, signal.SIGTERM, **environ)
    assert (status, printed) == (1, "failed: SIGTERM\n")
    assert seconds > 0.5


EARLY_STOP = (
    PRELUDE
    + """
from torch.distributed import HashStore
from agnews_dist.distributed.coordinator import Coordinator

print("ready", flush=True)
while not handler.is_stopping:
    time.sleep(0.01)
handler._stopping_since -= 60  # imports of a minute
store = HashStore()
handler.connect(store, 0, 2, 60.0)
other = Coordinator(store, 1, 2, 60.0)
while not other.phase:
    time.sleep(0.01)
other.close()
time.sleep(60)
"""
)


def test_stop_long_before_the_ranks_connect_stops_them_all():
    code, printed, _ = run_and_signal(EARLY_STOP, signal.SIGTERM, RANK="0", WORLD_SIZE="2")
    assert (code, printed) == (75, "preempted: SIGTERM\n")


RANK_1_FAILED = (
    PRELUDE
    + """
from torch.distributed import HashStore
from agnews_dist.distributed.coordinator import Coordinator, Failure

store = HashStore()
handler.connect(store, 0, 2, 60.0)
other = Coordinator(store, 1, 2, 60.0)
handler.begin_training()
print("ready", flush=True)
other.publish(Failure(1, 1, "a bug"))
while handler._coordinator.failure is None:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGTERM)
# Longer than the second thread takes to read the signal, shorter than FAILURE_GRACE_SECONDS.
time.sleep(1)
print("stop reason:", handler.stop_reason, flush=True)
os._exit(7)
"""
)


def test_launchers_signal_after_a_failure_is_not_a_stop():
    code, printed, _ = run_and_signal(RANK_1_FAILED)
    assert (code, printed.splitlines()[-1]) == (7, "stop reason: None")


def test_module_loads_no_torch():
    """Loading torch takes seconds, in which a signal may come."""
    code = "import sys, agnews_dist.distributed.preemption\nprint(sorted(set(sys.modules) & {'torch', 'numpy', 'psutil'}))"
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, text=True)
    assert re.fullmatch(r"\[\]\n", printed)
