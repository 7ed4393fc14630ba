"""Weights & Biases: offline without a key. `wandb sync runs/NAME/wandb/offline-run-*` uploads it.

Offline, every start writes all rows to a new directory. Online, the server says how many rows it has.
"""

import netrc
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import wandb

from agnews_dist.report.trackers.tracked_run import Row, TrackedRun


def has_key() -> bool:
    """Return whether there is a key for the server."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    return False


class WeightsAndBiases:
    """One run of W&B. A row is a step of W&B, and `step` is the x axis."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_MODE", "online" if has_key() else "offline")
        if os.environ["WANDB_MODE"] == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            for old in Path(run.directory, "wandb").glob("offline-run-*"):
                shutil.rmtree(old, ignore_errors=True)
        os.environ.setdefault("WANDB_PROJECT", "agnews_dist")
        config, settings = dict(run.settings), wandb.Settings(console="off", silent=True, x_stats_pid=os.getppid())
        self._run = wandb.init(dir=run.directory, id=run.id, name=run.name, config=config, resume="allow", settings=settings)
        self._run.define_metric("*", step_metric="step")
        self._num_known = self._run.starting_step

    def log(self, rows: Sequence[Row]) -> None:
        """Write the rows that the server does not have."""
        for row in rows[self._num_known :]:
            self._run.log({**row.values, "step": row.step, "_timestamp": row.timestamp})
        self._num_known = max(0, self._num_known - len(rows))

    def finish(self, scores: Mapping[str, float], step: int, files: Sequence[Path]) -> None:  # noqa: ARG002
        """Write the scores to the summary and copy the files into the run."""
        self._run.summary.update(dict(scores))
        for path in files:
            self._run.save(shutil.copy(path, self._run.dir), base_path=self._run.dir, policy="now")
        self._run.finish()

    def stop(self) -> None:
        """Write the last block, and mark the run as failed."""
        self._run.finish(exit_code=1)


TRACKER = WeightsAndBiases
