"""status.json: replaced whole, and found by the job that left the run unfinished."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from agnews_dist.errors import UserError
from agnews_dist.run.status import StatusFile, read_status, runs_of_job, status_file


def leave(directory: Path, state: str, *, job: str | None = None, time: str | None = None) -> None:
    """Leave a status in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    StatusFile(lambda: directory, attempt=2, step=40, job=job).write(state, "it was asked to")
    if time is not None:
        file = directory / "status.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "time": time}))


def test_status_is_read_as_it_was_written(tmp_path):
    assert read_status(tmp_path) is None
    leave(tmp_path, "preempted", job="slurm 7")
    content = json.loads((tmp_path / "status.json").read_text())
    assert (content["state"], content["attempt"], content["step"]) == ("preempted", 2, 40)
    assert datetime.fromisoformat(content["time"]).utcoffset() is not None
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.attempt, status.step, status.job) == ("preempted", 2, 40, "slurm 7")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "finished"}', '{"state": 1, "more": 2}'])
def test_read_status_ignores_other_content(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None


def test_unwritable_status_is_an_error_for_write_but_not_for_try_to_write(tmp_path):
    (tmp_path / "status.json").mkdir()
    file = StatusFile(lambda: tmp_path, attempt=1, step=0, job=None)
    with pytest.raises(UserError, match=r"status.json"):
        file.write("running", "it began")
    file.try_to_write("failed", "something")


def test_runs_of_job_are_its_unfinished_ones_newest_first(tmp_path):
    assert runs_of_job(tmp_path / "nowhere", "slurm 7") == []
    leave(tmp_path / "old", "failed", job="slurm 7", time="2026-01-01T00:00:00+00:00")
    leave(tmp_path / "new", "running", job="slurm 7", time="2026-01-02T00:00:00+00:00")
    leave(tmp_path / "done", "finished", job="slurm 7", time="2026-01-03T00:00:00+00:00")
    leave(tmp_path / "other", "preempted", job="slurm 8", time="2026-01-04T00:00:00+00:00")
    leave(tmp_path / "by hand", "preempted", time="2026-01-05T00:00:00+00:00")
    assert runs_of_job(tmp_path, "slurm 7") == ["new", "old"]
    assert runs_of_job(tmp_path, "slurm 8") == ["other"]
    assert runs_of_job(tmp_path, "slurm 9") == []
    assert runs_of_job(tmp_path, None) == []


def test_runs_of_job_are_runs_or_sweeps(tmp_path):
    for name in ("run", "sweep"):
        leave(tmp_path / name, "preempted", job="slurm 7")
    (tmp_path / "sweep" / "plan.json").write_text("{}")
    assert runs_of_job(tmp_path, "slurm 7") == ["run"]
    assert runs_of_job(tmp_path, "slurm 7", sweeps=True) == ["sweep"]


def test_status_file_of_a_sweep_is_that_of_the_task_of_an_array(tmp_path):
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    first, third = (dict(zip(names, values, strict=True)) for values in (("2", "2", "3", "4"), ("8", "2", "3", "4")))
    assert status_file(tmp_path, third) == "status.json"
    (tmp_path / "plan.json").write_text("{}")
    assert [status_file(tmp_path, environ) for environ in ({}, first, third)] == ["status.json", "status.json", "status-2.json"]
