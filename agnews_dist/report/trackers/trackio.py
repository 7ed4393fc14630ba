"""trackio: a local database in the run's directory, or in TRACKIO_DIR. `TRACKIO_DIR=runs/NAME/trackio trackio show`.

Every start of the run writes all rows again, in place of those of earlier starts. Its `Run.log` would hide errors.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agnews_dist.report.trackers.tracked_run import Row, TrackedRun, make_final_row

PROJECT = "agnews_dist"


class Trackio:
    """One run in trackio's database."""

    def __init__(self, run: TrackedRun) -> None:
        # Both are read by the import. Offline: trackio would ask the hub for the name of the user.
        os.environ.setdefault("TRACKIO_DIR", str(Path(run.directory, "trackio")))
        os.environ["HF_HUB_OFFLINE"] = "1"
        from trackio.sqlite_storage import SQLiteStorage

        self._storage, self._run = SQLiteStorage, run
        self._config: dict[str, Any] | None = dict(run.settings)
        SQLiteStorage.delete_run(PROJECT, run.name, run_id=run.id)

    def log(self, rows: Sequence[Row]) -> None:
        """Write rows with the time of their events, in one transaction."""
        values, steps, times = [dict(row.values) for row in rows], [row.step for row in rows], [row.time for row in rows]
        self._storage.bulk_log(
            PROJECT, self._run.name, values, steps, timestamps=times, config=self._config, run_id=self._run.id
        )
        self._config = None

    def finish(self, scores: Mapping[str, float], step: int, files: Sequence[Path]) -> None:
        """Write the scores as one row, and the files as artifacts."""
        from trackio.run import Run

        self.log([make_final_row(scores, step)])
        record = Run(None, PROJECT, None, self._run.name, self._run.id)
        for path in files:  # a name of a run may have characters that one of an artifact must not have
            record.log_artifact(path, name=f"{self._run.id}-{path.name}", type="result")
        record.finish()

    def stop(self) -> None:
        """Do nothing: a record has no state."""


TRACKER = Trackio
