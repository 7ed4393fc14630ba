"""MLflow: a file store in the run's directory, or the server of MLFLOW_TRACKING_URI.

MLflow takes no number back. So a restart asks which numbers the store has, and writes the others.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from agnews_dist.report.trackers.tracked_run import Row, TrackedRun, make_final_row

MAX_METRICS, MAX_PARAMS, MAX_CHARACTERS = 1000, 100, 500
"""Limits of one request, and of the value of a parameter."""


class MLflow:
    """One run of MLflow, found again by a tag."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # refused since 3.13 without it
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or Path(run.directory, "mlruns").resolve().as_uri()
        self._client = client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "agnews_dist")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([experiment_id], f"tags.agnews_dist_id = '{run.id}'")
        record = found[0] if found else client.create_run(experiment_id, run_name=run.name, tags={"agnews_dist_id": run.id})
        self._id, data = record.info.run_id, record.data
        client.update_run(self._id, status="RUNNING")
        new = {key: str(value)[:MAX_CHARACTERS] for key, value in run.settings.items() if key not in data.params}
        params = [Param(key, value) for key, value in new.items()]
        for begin in range(0, len(params), MAX_PARAMS):
            client.log_batch(self._id, params=params[begin : begin + MAX_PARAMS])
        self._known = {(key, each.step) for key in data.metrics for each in client.get_metric_history(self._id, key)}

    def log(self, rows: Sequence[Row]) -> None:
        """Write the numbers that the store does not have, with the time of their events."""
        numbers = ((key, value, int(1000 * row.timestamp), row.step) for row in rows for key, value in row.values.items())
        new = [Metric(*each) for each in numbers if (each[0], each[3]) not in self._known]
        for begin in range(0, len(new), MAX_METRICS):
            self._client.log_batch(self._id, metrics=new[begin : begin + MAX_METRICS])

    def finish(self, scores: Mapping[str, float], step: int, files: Sequence[Path]) -> None:
        """Write the scores as metrics, and the files as artifacts."""
        self.log([make_final_row(scores, step)])
        for path in files:
            self._client.log_artifact(self._id, str(path))
        self._client.set_terminated(self._id)

    def stop(self) -> None:
        """Mark the record as killed. The next start sets it to running."""
        self._client.set_terminated(self._id, "KILLED")


TRACKER = MLflow
