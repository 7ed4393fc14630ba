"""The sink of `report.trackers`: real clients, what they get after a restart, and the bounds for those that fail or hang."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.events import make_step
from support.processes import has_ended, python, wait_until
from support.tracker_stores import read_records

from agnews_dist import events
from agnews_dist.errors import UserError
from agnews_dist.report.console import Sinks
from agnews_dist.report.event_log import EventLog
from agnews_dist.report.trackers import tracker_sink
from agnews_dist.report.trackers.tracked_run import EventReader, to_row
from agnews_dist.report.trackers.tracker_sink import Trackers, check_installed
from agnews_dist.storage.locks import Lock, try_lock


class Kept(list[events.Event]):
    """Sink that keeps the events."""

    def __call__(self, event: events.Event) -> None:
        self.append(event)

    def close(self) -> None:
        """Do nothing."""

    def __hash__(self) -> int:
        return id(self)

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in self if isinstance(event, events.Warned)]


@contextmanager
def started(run: Path, *names: str, keep_bytes: int | None = None) -> Iterator[tuple[Sinks, Trackers, Kept]]:
    """A start of a run with trackers."""
    kept = Kept()
    with closing(EventLog(run / "events.jsonl", keep_bytes=keep_bytes)) as log, Sinks() as sinks:
        sinks.add(log)
        sinks.add(kept)
        trackers = Trackers(names, run, {"optim.lr": 1e-3, "run.name": None}, log, sinks)
        sinks.add(trackers)
        yield sinks, trackers, kept


def write_result(run: Path) -> None:
    scores = {"accuracy": 0.5, "macro_f1": 0.25, "loss": None}
    (run / "result.json").write_text(json.dumps({"splits": {"test": scores}}))


def finish(run: Path, sinks: Sinks) -> None:
    write_result(run)
    sinks(events.RunDone(paths={"result": str(run / "result.json"), "report": str(run / "none.html")}))


def pids(trackers: Trackers) -> list[int]:
    return [process._process.pid for process in trackers._running]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_restart_repeats_steps_that_the_store_has(tmp_path, name):
    with started(tmp_path, name) as (sinks, trackers, _):
        for number in (1, 2):
            sinks(make_step(number))
        log_bytes = (tmp_path / "events.jsonl").stat().st_size
        sinks(make_step(3))
        [process] = trackers._running
        assert wait_until(lambda: process.position > log_bytes, 60)
    with started(tmp_path, name, keep_bytes=log_bytes) as (sinks, _, kept):
        for number in (3, 4):
            sinks(make_step(number))
        finish(tmp_path, sinks)
        assert kept.warnings == []
    [record] = read_records(name, tmp_path)
    assert sorted(step for key, step, _ in record.numbers if key == "train/loss") == [1, 2, 3, 4]
    assert record.final == {"final/test/accuracy": 0.5, "final/test/macro_f1": 0.25}
    assert float(record.settings["optim.lr"]) == 1e-3


def locked(directory: Path) -> closing[Lock]:
    """Hold the lock of a record, so that its tracker waits."""
    (directory / "trackers").mkdir()
    lock = try_lock(directory / "trackers" / "tensorboard.lock")
    assert lock is not None
    lock.sign()
    return closing(lock)


@pytest.mark.slow
def test_a_hanging_tracker_is_dropped_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_sink, "FINISH_SECONDS", 1.0)
    with locked(tmp_path), started(tmp_path, "tensorboard") as (sinks, trackers, kept):
        [pid] = pids(trackers)
        sinks(make_step(1))
        begin = time.monotonic()
        finish(tmp_path, sinks)
        sinks.close()
        assert time.monotonic() - begin < 20, "the end waits for a tracker that hangs"
        assert wait_until(lambda: has_ended(pid), 30)
    log = tmp_path / "trackers" / "tensorboard.log"
    assert kept.warnings == [
        f"tracker tensorboard: it failed (no answer for 1 s), and the run continues without it. See {log}."
    ]


@pytest.mark.slow
def test_a_silent_tracker_is_dropped_during_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_sink, "SILENT_SECONDS", 0.5)
    with locked(tmp_path), started(tmp_path, "tensorboard") as (sinks, trackers, kept):
        [pid] = pids(trackers)
        for number in range(1, 100):
            sinks(make_step(number))
            time.sleep(0.02)
        assert len(kept.warnings) == 1
        assert "no answer for 0 s" in kept.warnings[0]
        assert wait_until(lambda: has_ended(pid), 30)


@pytest.mark.slow
def test_a_killed_tracker_is_dropped_with_one_warning(tmp_path):
    with started(tmp_path, "tensorboard") as (sinks, trackers, kept):
        [process] = trackers._running
        os.kill(process._process.pid, signal.SIGKILL)
        assert wait_until(lambda: process.failure is not None, 60)
        for number in (1, 2, 3):
            sinks(make_step(number))
        assert ["it failed (exit code -9)" in warning for warning in kept.warnings] == [True]


def kill_all(trackers: Trackers) -> None:
    for process in trackers._running:
        os.kill(process._process.pid, signal.SIGKILL)
    assert wait_until(lambda: all(process.failure is not None for process in trackers._running), 60)


@pytest.mark.slow
@pytest.mark.parametrize("is_at_the_end", [False, True])
def test_two_trackers_that_fail_at_once_leave_a_warning_each(tmp_path, is_at_the_end):
    with started(tmp_path, "tensorboard", "mlflow") as (sinks, trackers, kept):
        kill_all(trackers)
        if is_at_the_end:
            trackers.close()
        else:
            sinks(make_step(1))
        assert [warning.split(":")[0] for warning in kept.warnings] == ["tracker tensorboard", "tracker mlflow"]
        sinks(make_step(2))
        assert len(kept.warnings) == 2


@pytest.mark.slow
def test_an_unforeseen_error_drops_all_trackers_with_one_warning(tmp_path):
    with started(tmp_path, "tensorboard", "mlflow") as (sinks, trackers, kept):
        processes = pids(trackers)
        del trackers._log
        for number in (1, 2):
            sinks(make_step(number))
        [warning] = kept.warnings
        assert warning.startswith("report.trackers: they failed (AttributeError: ")
        assert wait_until(lambda: all(map(has_ended, processes)), 30)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "state"), [("mlflow", "KILLED"), ("wandb", "exit code 1")])
def test_a_stopped_run_is_marked_and_has_all_steps(tmp_path, monkeypatch, name, state):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with started(tmp_path, name) as (sinks, trackers, kept):
        sinks(make_step(1))
        [process] = trackers._running
        assert wait_until(lambda: process.position > 0, 60)
    assert kept.warnings == []
    [record] = read_records(name, tmp_path)
    assert (record.state, {step for _, step, _ in record.numbers}) == (state, {1})


@pytest.mark.slow
def test_a_killed_run_is_marked_and_has_all_steps(tmp_path):
    script = """
import os, signal, sys, time
from pathlib import Path
from agnews_dist.report.console import Sinks
from agnews_dist.report.event_log import EventLog
from agnews_dist.report.trackers.tracker_sink import Trackers
from support.events import make_step

run, sinks = Path(sys.argv[1]), Sinks()
log = EventLog(run / "events.jsonl")
sinks.add(log)
[process] = Trackers(["mlflow"], run, {}, log, sinks)._running
sinks(make_step(1))
while process.position == 0 and process.failure is None:
    time.sleep(0.05)
sinks(make_step(2))
print(process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = python("-c", script, str(tmp_path), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert wait_until(lambda: has_ended(int(done.stdout)), 60)
    [record] = read_records("mlflow", tmp_path)
    assert (record.state, {step for _, step, _ in record.numbers}) == ("KILLED", {1, 2})


@pytest.mark.slow
def test_a_finished_run_without_its_last_event_has_final_scores(tmp_path):
    with started(tmp_path, "mlflow") as (sinks, trackers, kept):
        sinks(make_step(1))
        [process] = trackers._running
        assert wait_until(lambda: process.position > 0, 60)
        write_result(tmp_path)
        (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert kept.warnings == []
    [record] = read_records("mlflow", tmp_path)
    assert (record.state, record.files, len(record.final)) == ("FINISHED", ["result.json"], 2)


@pytest.mark.slow
def test_trackio_takes_any_name_of_a_run(tmp_path):
    run = tmp_path / "sp ace's"
    run.mkdir()
    with started(run, "trackio") as (sinks, _, kept):
        sinks(make_step(1))
        finish(run, sinks)
        assert kept.warnings == []
    [record] = read_records("trackio", run)
    assert [file for file in record.files if file.endswith("-result.json")]


@pytest.mark.slow
def test_a_failing_tracker_is_dropped_with_one_warning(tmp_path):
    (tmp_path / "tensorboard").touch()
    with started(tmp_path, "tensorboard") as (sinks, trackers, kept):
        [process] = trackers._running
        assert wait_until(lambda: process.failure is not None, 60)
        for number in (1, 2, 3):
            sinks(make_step(number))
        assert len(kept.warnings) == 1
        assert kept.warnings[0].startswith("tracker tensorboard: it failed (FileExistsError: ")
        assert "Traceback" in (tmp_path / "trackers" / "tensorboard.log").read_text()


@pytest.mark.slow
def test_a_moved_run_ends_the_tracker(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with started(run, "tensorboard") as (sinks, trackers, kept):
        sinks(make_step(1))
        [process] = trackers._running
        assert wait_until(lambda: process.position > 0, 60)
        run.rename(tmp_path / "moved")
        sinks(make_step(2))
        assert wait_until(lambda: process.failure is not None, 60)
        sinks(make_step(3))
        assert ["directory was moved" in warning for warning in kept.warnings] == [True]
    assert not run.exists()


@pytest.mark.parametrize(
    ("place", "content"),
    [("trackers", ""), ("trackers/run.json", ""), ("trackers/run.json", "[]"), ("trackers/run.json", "{}")],
)
def test_a_tracker_that_cannot_start_is_a_warning(tmp_path, place, content):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(content)
    with started(tmp_path, "tensorboard", "mlflow") as (sinks, trackers, kept):
        sinks(make_step(1))
        assert pids(trackers) == []
        [warning] = kept.warnings
        assert warning.startswith("report.trackers tensorboard,mlflow: cannot start (")


def test_a_directory_is_not_a_package(tmp_path, monkeypatch):
    check_installed(["tensorboard", "mlflow"])
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("no_such_tracker", "another_tracker"):
        with pytest.raises(UserError, match=f"report.trackers {name}: the package is not installed"):
            check_installed([name])


def test_rows_leave_out_what_is_not_finite():
    time_ = "2026-01-31T23:59:59.500+00:00"
    step = {"event": "StepDone", "time": time_, **vars(make_step(7)), "loss": None, "grad_norm": None}
    row = to_row(step)
    assert row is not None
    assert (row.step, row.group, row.timestamp) == (7, "train", 1769903999.5)
    speeds = {"train/tokens_per_second": 4000.0, "train/examples_per_second": 128.0}
    assert row.values == {"train/lr": 1e-3, "train/epoch": 1.0, **speeds}
    assert to_row({"event": "Warned", "time": time_, "message": "x"}) is None


def test_reader_returns_whole_lines_of_any_length(tmp_path):
    path = tmp_path / "events.jsonl"
    path.touch()
    with path.open("rb") as file, path.open("ab", buffering=0) as writer:
        reader = EventReader(file.fileno())
        assert reader.read() == []
        writer.write(b'{"event": "A"}\n{"event"')
        assert reader.read() == [{"event": "A"}]
        assert reader.read() == []
        long = "x" * 1_000_000
        writer.write(f': "{long}"}}\n'.encode())
        assert reader.read() == [{"event": long}]
        assert reader.position == path.stat().st_size
