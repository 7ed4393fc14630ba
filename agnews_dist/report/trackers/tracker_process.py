"""The process of one tracker: reads events.jsonl as it grows and hands its rows to the client.

Arguments: name of the tracker, path of run.json, handle of events.jsonl, process id of the training.
Standard input: `end` and the size of events.jsonl, when no more will come.
Standard output: JSON objects, one per line: `position` or `error`.
Standard input is closed when the training has ended, also by a kill. The process then ends soon, also while the client hangs.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agnews_dist.report.trackers.tracked_run import (
    EventReader,
    Row,
    TrackedRun,
    Tracker,
    attached_files,
    find_results,
    read_final_scores,
    to_row,
)
from agnews_dist.storage.locks import LockWait, is_open_at, wait_for_lock

INTERVAL = 1.0
"""Seconds between two looks at events.jsonl."""
END_SECONDS = 10.0
"""Time for the client to complete the record after the training has ended without a request."""
NICENESS = 10
"""The training comes first."""
Answer = Callable[[dict[str, Any]], object]


class End:
    """The request of the training to finish, and its end."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._requested = threading.Event()
        self._num_bytes = 0
        threading.Thread(target=self._listen, name="end", daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._num_bytes = int(line.split()[1])
            self._requested.set()
        self._requested.set()
        time.sleep(END_SECONDS)
        os._exit(1)

    def has_come(self, position: int) -> bool:
        """Return whether nothing comes after `position`. Without news, wait a moment."""
        if not self._requested.is_set():
            self._requested.wait(INTERVAL)
            if os.getppid() != self._parent:  # a forked process may still hold standard input open
                self._requested.set()
            return False
        if position < self._num_bytes:  # the disk of events.jsonl is slow
            threading.Event().wait(INTERVAL / 10)
            return False
        return True


def follow(open_client: Callable[[TrackedRun], Tracker], run: TrackedRun, handle: int, end: End, answer: Answer) -> None:
    """Pass all rows to the client, until the run is done or the end has come.

    Raises:
        OSError: the run's directory was moved; the client would write to its old place.
    """
    directory = os.open(run.directory, os.O_RDONLY)
    reader, step = EventReader(handle), 0
    client = open_client(run)
    while True:
        events = reader.read()
        if not events and not end.has_come(reader.position):
            continue
        if not is_open_at(directory, Path(run.directory)):
            raise OSError("the run's directory was moved")
        if not events:
            if paths := find_results(run.directory):
                client.finish(read_final_scores(paths), step, attached_files(paths))
            else:
                client.stop()
            return
        rows: list[Row] = [row for row in map(to_row, events) if row is not None]
        step = max((row.step for row in rows), default=step)
        if rows:
            client.log(rows)
        for event in events:
            if event["event"] == "RunDone":
                client.finish(read_final_scores(event["paths"]), step, attached_files(event["paths"]))
                return
        answer({"position": reader.position})


def main(name: str, path: str, handle: str, parent: str) -> int:
    """Run the tracker `name`; return 1 if it failed."""
    # The training decides when this process ends, also if a signal goes to all processes of a job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    # What clients print goes to the log, which standard error already is.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        with suppress(OSError):  # the training has ended, and the client completes the record
            answers.write(json.dumps(message, allow_nan=False) + "\n")

    try:
        end = End(int(parent))
        run = TrackedRun(**json.loads(Path(path).read_text(encoding="utf-8")))
        # The process of an earlier start may need a moment to end.
        lock = Path(path).with_name(f"{name}.lock")
        wait_for_lock(lock, LockWait(lock, f"tracker {name}", print))
        module = importlib.import_module(f"agnews_dist.report.trackers.{name}")
        follow(module.TRACKER, run, int(handle), end, answer)
    except BaseException as error:
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
        raise
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(*sys.argv[1:])
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    # Without the exit functions of the clients, which may wait for a network.
    sys.stderr.flush()
    os._exit(code)
