"""TensorBoard: event files in the run's directory, without torch. `tensorboard --logdir runs`.

Every start of the run writes a new file with all rows, and empties those of earlier starts.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] # generated
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from agnews_dist.report.trackers.tracked_run import Row, TrackedRun


class TensorBoard:
    """Event files of one run."""

    def __init__(self, run: TrackedRun) -> None:
        folder = Path(run.directory, "tensorboard")
        for old in folder.glob("events.out.tfevents.*"):
            os.truncate(old, 0)  # a running server would stop at a file that is gone
        self._writer = EventFileWriter(str(folder))
        # At the second one, a running server drops what it has read before.
        self._writer.add_event(Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
        settings = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in run.settings.items()}
        self._add(hparams_pb(settings, trial_id=run.id))

    def _add(self, summary: Any, step: int = 0, seconds: float | None = None) -> None:
        self._writer.add_event(Event(wall_time=seconds or time.time(), step=step, summary=summary))

    def log(self, rows: Sequence[Row]) -> None:
        """Write rows as scalars, with the time of their events."""
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            self._add(Summary(value=values), row.step, row.timestamp)
        self._writer.flush()

    def finish(self, scores: Mapping[str, float], step: int, files: Sequence[Path]) -> None:
        """Write the scores as scalars and the places of the files as text."""
        self._add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scores.items()]), step)
        self._add(text_pb("files", "\n\n".join(map(str, files))), step)
        self._writer.close()

    def stop(self) -> None:
        """Do nothing: a record has no state, and all rows are on disk."""


TRACKER = TensorBoard
