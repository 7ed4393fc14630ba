"""The job that a process belongs to, from the environment variables of Slurm (sbatch(1), srun(1)) and of torchrun."""

import os
import socket
from collections.abc import Mapping

import psutil


def slurm_seconds_left(environ: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until the job's time limit at `now` (Unix seconds); None without a limit, or with one in the past.

    A shell may keep the variable of a job that has ended.
    """
    try:
        left = int(environ["SLURM_JOB_END_TIME"]) - now
    except (KeyError, ValueError):
        return None
    return left if left > 0 else None


def slurm_count(environ: Mapping[str, str], name: str) -> int | None:
    """Return a variable that holds a count; None if it is unset or not a number, such as `(null)`."""
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None


def identify_job(environ: Mapping[str, str]) -> str | None:
    """Return a name that a job keeps when it is restarted: Slurm's job, torchrun's run or its agent; None if started by hand.

    A requeued Slurm job keeps its number. Without a rendezvous id of its own, torchrun calls every run `none`.
    """
    if environ.get("SLURM_JOB_ID"):
        return f"slurm {environ['SLURM_JOB_ID']}"
    run = environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    if run not in ("", "none"):
        return f"torchrun {run}"
    agent = os.getppid()
    return f"torchrun on {socket.gethostname()}, process {agent} of {psutil.Process(agent).create_time():.0f}"


def identify_array(environ: Mapping[str, str]) -> str | None:
    """Return a name that all tasks of a job array share; outside of one, that of the job."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"slurm {array}" if array else identify_job(environ)


def is_restarted(environ: Mapping[str, str]) -> bool:
    """Return whether Slurm or torchrun has started this job before, with the same arguments."""
    counts = (slurm_count(environ, name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count is not None and count > 0 for count in counts)


def find_array_task(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (position, number of tasks) of this process's task in a job array; (0, 1) outside of one."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    task, least, step, count = (slurm_count(environ, name) for name in names)
    if task is None or not count:
        return 0, 1
    return (task - (least or 0)) // (step or 1) % count, count
