"""A training on several processes of this machine, started from one: `fit(launch=2)`.

torch's elastic launcher runs in a process of its own (launched.py), as `torchrun` does. So nothing of this process is imported
again or inherited: a notebook, a script without a guard around its main part, and a process that uses a GPU can all launch.
Rows, job and result travel through files in a temporary directory.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from agnews_dist.api.in_process import TrainingJob
from agnews_dist.api.launched import CRASH, ERROR, JOB, RESULT
from agnews_dist.api.training_run import Trained
from agnews_dist.data.rows import RawRows
from agnews_dist.distributed.world import is_launched
from agnews_dist.errors import ConfigError, Stopped, UserError

ROWS = "rows.pickle"
"""File of the rows that were given in Python."""
WAIT_SECONDS = 60.0
"""Time for a launcher to end its ranks: torchrun kills them after 30 s."""


def train_on_ranks(job: TrainingJob, num_ranks: int) -> Trained:
    """Train on `num_ranks` new processes of this machine.

    Raises:
        ConfigError: `num_ranks` is not a count, or this process is a rank already, or a sink cannot be sent.
        UserError: as `train_here`; it is the first that a rank had.
        Stopped: as `train_here`.
        KeyboardInterrupt: Ctrl-C in this process. The ranks have saved a checkpoint, if they had begun.
    """
    if type(num_ranks) is not int or num_ranks < 1:
        raise ConfigError(f"launch={num_ranks!r}: it takes a number of processes (1 or more) or None. Correct it.")
    if is_launched(os.environ):
        raise ConfigError(f"launch={num_ranks}: a launcher has started this process as a rank. Leave launch out.")
    with tempfile.TemporaryDirectory(prefix="agnews_dist-launch-") as name:
        folder = Path(name)
        if job.read_given is not None:
            # Here and not on the ranks: one process checks the rows, and a wrong one is an error before anything starts.
            (folder / ROWS).write_bytes(pickle.dumps(job.read_given(), protocol=5))
            job = replace(job, read_given=partial(_load_rows, folder / ROWS))
        (folder / JOB).write_bytes(_pickle_job(job))
        was_interrupted = _run_launcher(folder, num_ranks)
        return _read_result(folder, num_ranks, was_interrupted=was_interrupted)


def _load_rows(path: Path) -> Mapping[str, RawRows]:
    return pickle.loads(path.read_bytes())


def _pickle_job(job: TrainingJob) -> bytes:
    """Return a job as bytes. Functions are pickled by their names, which other processes must be able to import.

    Raises:
        ConfigError: they cannot.
    """
    try:
        pickled = pickle.dumps(job, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"sinks cannot be sent to another process, as launch needs ({error}): it imports them. Write them at the top level "
            "of a module."
        ) from error
    if b"__main__" in pickled:
        raise ConfigError(
            "sinks have a function of the notebook or script itself: with launch, another process imports it. Write it in a "
            "module."
        )
    return pickled


def _run_launcher(folder: Path, num_ranks: int) -> bool:
    """Run the launcher to its end, and show what the ranks print; return whether Ctrl-C ended it."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)}
    if num_ranks > 1:
        environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which prints a warning about it
    is_terminal = sys.stdout.isatty()
    process = subprocess.Popen(
        [sys.executable, "-m", "agnews_dist.api.launched", "launcher", str(folder), str(num_ranks)],
        # It ends when this pipe is closed, also if this process is killed.
        stdin=subprocess.PIPE,
        stdout=None if is_terminal else subprocess.PIPE,
        stderr=None if is_terminal else subprocess.STDOUT,
        env=environ,
        # Ctrl-C on a terminal reaches this process alone, which passes it on.
        start_new_session=True,
    )
    was_interrupted = False
    try:
        while True:
            try:
                _show(process.stdout)
                process.wait()
                return was_interrupted
            except KeyboardInterrupt:
                if was_interrupted:
                    process.kill()  # the ranks notice it, and end
                    raise
                was_interrupted = True
                process.send_signal(signal.SIGINT)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _show(output: IO[bytes] | None) -> None:
    """Print lines as they come: a notebook shows what is printed, not what another process writes."""
    for line in output if output is not None else ():
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


def _read_result(folder: Path, num_ranks: int, *, was_interrupted: bool) -> Trained:
    """Return what rank 0 returned, or raise the error with which the ranks ended."""
    failures: list[tuple[bool, float, type[BaseException], str]] = []
    for path in folder.glob(ERROR.format("*")):
        kind, message = pickle.loads(path.read_bytes())
        failures.append((not issubclass(kind, (UserError, Stopped)), path.stat().st_mtime, kind, message))
    # An error that is explained comes before bugs, which may be consequences of another rank's end.
    is_bug, _, kind, message = min(failures, key=lambda each: each[:2], default=(False, 0.0, None, ""))
    if was_interrupted:
        raise KeyboardInterrupt(message if kind is Stopped else "")
    if kind is not None and not is_bug:
        raise _make_error(kind, message)
    if (folder / RESULT).exists():
        return pickle.loads((folder / RESULT).read_bytes())
    if is_bug and not (folder / CRASH).exists():
        raise RuntimeError(f"a rank failed:\n{message}")
    crash = (folder / CRASH).read_text() if (folder / CRASH).exists() else "the ranks ended without a result"
    raise UserError(f"launch={num_ranks}: {crash}. Look for the last lines above; if it was killed, check the free memory.")


def _make_error(kind: type[BaseException], message: str) -> BaseException:
    """Make a rank's error again."""
    try:
        return kind(message)
    except TypeError:  # a class with other arguments
        return UserError(message)
