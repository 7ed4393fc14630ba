"""Real multi-process runs for tests: torchrun on this machine, output kept, a hang ended with a clear failure."""

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: one thread per rank (results are compared bit for bit), no launcher's leftovers."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, [kept.get("PYTHONPATH")])]
    # These tests are about several ranks; two of them on one GPU cannot talk over NCCL.
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **fixed, "PYTHONPATH": os.pathsep.join(paths), **extra}


def python(*arguments: str, check: bool = True, timeout: float = 240, stdin: str | None = None, **extra: str):
    """Run python with `arguments`; `extra` are environment variables."""
    return _run([sys.executable, *arguments], check=check, timeout=timeout, stdin=stdin, extra=extra)


def torchrun(num_ranks: int, *arguments: str, check: bool = True, timeout: float = 240, **extra: str):
    """Run `torchrun --nproc_per_node=num_ranks` with `arguments` (a script, or `-m module`, and its arguments)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return _run([*command, *arguments], check=check, timeout=timeout, stdin=None, extra=extra)


def in_a_terminal(*arguments: str, timeout: float = 60, **extra: str) -> str:
    """What python with `arguments` writes to a real terminal, escape sequences included; it must end with 0."""
    ours, theirs = pty.openpty()
    env = environment(TERM="xterm-256color", LC_ALL="C.UTF-8", **extra)
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env, cwd=REPOSITORY
    )
    os.close(theirs)
    raw = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux reports the other end closed
            break
        if not chunk:
            break
        raw += chunk
    os.close(ours)
    assert process.wait(timeout=timeout) == 0, raw
    return raw.decode()


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
        # Not kill() at once: torchrun passes TERM on to its workers, which would otherwise live on.
        child.terminate()
        try:
            out, err = child.communicate(timeout=45)
        finally:
            child.kill()
        raise AssertionError(f"no end after {timeout} s: {told(command, out, err)}") from None
    if check and child.returncode != 0:
        raise AssertionError(f"exit code {child.returncode}: {told(command, out, err)}")
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def told(command: Sequence[str], out: str, err: str) -> str:
    """The end of what a command said, for a failure's message."""
    return f"{' '.join(command)}\n--- stdout\n{out[-6000:]}\n--- stderr\n{err[-9000:]}"
