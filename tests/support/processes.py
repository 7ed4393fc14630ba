"""Child processes of tests: python, torchrun, a terminal. A child that hangs is ended with a clear failure."""

import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared"))
"""Real AG News rows, tokenizer and a small GPT-2; tests that need them skip where this folder is absent."""
TIMEOUT = 300.0
"""Seconds until a child counts as hanging: the longest takes 30 on two busy cores. pytest's own limit is three times that."""

TERMINAL = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "NO_COLOR": "", "JPY_PARENT_PID": "", "COLUMNS": "", "LINES": ""}
"""Variables of a child with a terminal, whatever the test's own process has. The size is the terminal's own."""


def environment(**extra: str) -> dict[str, str]:
    """Return the variables of a child: one thread (results are compared bit for bit), offline, no launcher's variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, [kept.get("PYTHONPATH")])]
    # NCCL cannot connect two ranks on one GPU, so ranks compute on the CPU.
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **fixed, "PYTHONPATH": os.pathsep.join(paths), **extra}


def without_report(command: Sequence[str]) -> list[str]:
    """Add `--report.write false` to a training, unless it sets it: a report takes seconds, and few tests read it."""
    words = list(command)
    starts = (["agnews_dist.train"], ["agnews_dist", "train"])
    is_training = any(words[i : i + len(start)] == start for start in starts for i in range(len(words)))
    shows_only = any(word.startswith(("--help", "--print_config", "--report.write")) for word in words)
    return words if shows_only or not is_training else [*words, "--report.write", "false"]


def python(*arguments: str, check: bool = True, timeout: float = TIMEOUT, stdin: str | None = None, **extra: str):
    """Run python with `arguments`; `extra` are environment variables."""
    return _run([sys.executable, *without_report(arguments)], check=check, timeout=timeout, stdin=stdin, extra=extra)


def torchrun(num_ranks: int, *arguments: str, check: bool = True, timeout: float = TIMEOUT, **extra: str):
    """Run `torchrun --nproc_per_node=num_ranks` with `arguments` (a script, or `-m module`, and its arguments)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return _run([*command, *without_report(arguments)], check=check, timeout=timeout, stdin=None, extra=extra)


def in_a_terminal(*arguments: str, columns: int = 80, timeout: float = TIMEOUT, **extra: str) -> str:
    """Return what python with `arguments` writes to a terminal, escape sequences included; the exit code must be 0."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, columns))
    env = environment(**{**TERMINAL, **extra})
    process = subprocess.Popen(
        [sys.executable, *without_report(arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=env,
        cwd=REPOSITORY,
    )
    os.close(theirs)
    raw = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux reports the closed other end this way
            break
        if not chunk:
            break
        raw += chunk
    os.close(ours)
    assert process.wait(timeout=timeout) == 0, raw
    return raw.decode()


def wait_until(condition: Callable[[], object], timeout: float = TIMEOUT, every: float = 0.01) -> bool:
    """Wait until `condition()` is true; return False if it is not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; its parent may not have asked for its exit code yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _run(command: list[str], *, check: bool, timeout: float, stdin: str | None, extra: dict[str, str]):
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command,
        env=environment(**extra),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL if stdin is None else pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    try:
        out, err = child.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        # TERM first: torchrun passes it on to its workers, which would survive a KILL of the agent.
        child.terminate()
        try:
            out, err = child.communicate(timeout=45)
        finally:
            child.kill()
        raise AssertionError(f"not ended after {timeout:.0f} s: {describe_output(command, out, err)}") from None
    if check and child.returncode != 0:
        raise AssertionError(f"exit code {child.returncode}: {describe_output(command, out, err)}")
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def describe_output(command: Sequence[str], out: str, err: str) -> str:
    """Return a command and the end of its output, for the message of a failure."""
    return f"{' '.join(command)}\n--- stdout\n{out[-6000:]}\n--- stderr\n{err[-9000:]}"
