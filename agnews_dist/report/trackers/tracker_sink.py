"""Sink of `report.trackers`: starts a process per tracker, and drops one that fails or hangs, with one warning.

Each process reads events.jsonl itself. So a training hands over nothing and waits for nothing, and a tracker that was dropped
or killed lacks nothing after the next start.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import agnews_dist
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, Event, RunDone, Warned
from agnews_dist.report.event_log import EventLog
from agnews_dist.report.trackers.tracked_run import TrackedRun
from agnews_dist.storage.atomic import new_file, to_json_value

FOLDER = "trackers"
"""Name of the folder of run.json and logs in a run's directory."""
SILENT_SECONDS = 120.0
"""Time without an answer after which a tracker is dropped. The import of a client from a slow disk takes a while."""
FINISH_SECONDS = 15.0
"""Longest wait for all trackers together at the end of a run."""
STOP_SECONDS = 5.0
"""The same at the end of a start that the next one continues."""


def check_installed(names: Iterable[str]) -> None:
    """Check that the packages of these trackers are there, without importing them.

    Raises:
        UserError: one is not.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a directory of this name is not the package
            raise UserError(
                f"report.trackers {name}: the package is not installed. Run pip install agnews_dist[{name}], or leave it out."
            )


class Trackers:
    """Sink that starts and ends the trackers of a run. No failure of theirs is one of the run."""

    def __init__(
        self, names: Iterable[str], directory: Path, settings: Mapping[str, object], log: EventLog, emit: Emit
    ) -> None:
        """Start the processes. `log`: the open events.jsonl, already cut back to the checkpoint; `emit` gets the warnings."""
        self._log, self._emit = log, emit
        self._running: list[_Process] = []
        self._num_bytes = 0
        """Size of events.jsonl at the event before."""
        names = list(dict.fromkeys(names))
        try:
            path = _write_run(directory, settings)
            for name in names:
                self._running.append(_Process(name, path, log.handle))
        except Exception as error:
            missing = names[len(self._running) :]
            emit(Warned(message=f"report.trackers {','.join(missing)}: cannot start ({error}). The run continues without it."))

    def __call__(self, event: Event) -> None:
        """Drop the trackers that have failed or hang. At the end of the run, wait until they are complete."""
        self._attempt(self._drop_failed)
        if isinstance(event, RunDone):
            self._attempt(partial(self._finish, FINISH_SECONDS))

    def close(self) -> None:
        """End what still runs: this start has failed or was stopped."""
        self._attempt(partial(self._finish, STOP_SECONDS))

    def _attempt(self, work: Callable[[], list[str]]) -> None:
        """Do `work` and emit its warnings. An error in it, of any kind, drops all trackers with one warning."""
        if not self._running:
            return
        try:
            messages = work()
        except Exception as error:
            for process in self._running:
                process.kill()
            self._running.clear()
            reason = f"{type(error).__name__}: {error}"
            messages = [f"report.trackers: they failed ({reason}), and the run continues without them."]
        # Only now: every warning comes back as an event. An error of another sink belongs to the run.
        for message in messages:
            self._emit(Warned(message=message))

    def _drop_failed(self) -> list[str]:
        """Drop what has failed or hangs; return the warnings."""
        messages: list[str] = []
        now = time.monotonic()
        for process in list(self._running):
            if process.position >= self._num_bytes:
                process.answered = now
            if process.failure is not None:
                messages.append(self._drop(process, process.failure))
            elif now - process.answered > SILENT_SECONDS:
                messages.append(self._drop(process, f"no answer for {SILENT_SECONDS:.0f} s"))
        self._num_bytes = self._log.num_bytes
        return messages

    def _finish(self, seconds: float) -> list[str]:
        """End all, and wait for that at most this long; return the warnings."""
        messages: list[str] = []
        deadline = time.monotonic() + seconds
        for process in self._running:
            process.request_end(self._log.num_bytes)
        for process in list(self._running):
            if not process.wait(deadline - time.monotonic()):
                messages.append(self._drop(process, f"no answer for {seconds:.0f} s"))
            elif process.failure is not None:
                messages.append(self._drop(process, process.failure))
        self._running.clear()
        return messages

    def _drop(self, process: "_Process", reason: str) -> str:
        """End a process; return the warning."""
        self._running.remove(process)
        process.kill()
        return f"tracker {process.name}: it failed ({reason}), and the run continues without it. See {process.log}."


class _Process:
    """A running `tracker_process`."""

    def __init__(self, name: str, path: Path, handle: int) -> None:
        """Start it. `path`: run.json; `handle`: of events.jsonl."""
        self.name, self.log = name, path.with_name(f"{name}.log")
        self.position = 0
        """Bytes of events.jsonl that the client has."""
        self.answered = time.monotonic()
        self.failure: str | None = None
        root = str(Path(agnews_dist.__file__).parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        arguments = [name, str(path), str(handle), str(os.getpid())]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agnews_dist.report.trackers.tracker_process", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": paths},
                pass_fds=[handle],
                start_new_session=True,
                text=True,
            )
        self._thread = threading.Thread(target=self._listen, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        """Note the answers, until the process ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer: dict[str, Any] = json.loads(line)
            self.position = answer.get("position", self.position)
            self.answered = time.monotonic()
            self.failure = answer.get("error")
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        if code != 0 and self.failure is None:
            self.failure = f"exit code {code}"

    def request_end(self, num_bytes: int) -> None:
        """Ask the process to end after this many bytes of events.jsonl."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended
            self._process.stdin.write(f"end {num_bytes}\n")
            self._process.stdin.flush()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process; return whether it has come."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def kill(self) -> None:
        """End the process, and those that the client has started."""
        if self._process.poll() is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _write_run(directory: Path, settings: Mapping[str, object]) -> Path:
    """Write run.json, with the id of an earlier start if there was one; return its path."""
    path = directory / FOLDER / "run.json"
    path.parent.mkdir(exist_ok=True)
    run = TrackedRun(id=_read_id(path), name=directory.name, directory=str(directory), settings=to_json_value(settings))
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(vars(run), allow_nan=False), encoding="utf-8")
    return path


def _read_id(path: Path) -> str:
    """Return the id of an earlier start, or a new one.

    Raises:
        ValueError: the file is damaged. A new id would begin a second record.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    except FileNotFoundError:
        return uuid.uuid4().hex
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove it, and a new record begins") from error
