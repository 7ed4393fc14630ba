"""Event log: strict JSON lines, complete after a kill, continued by a resumed run; and `Sinks`."""

import dataclasses
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score
from support.events import read_events
from support.processes import TIMEOUT

from agnews_dist.errors import UserError
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.evaluation.metrics import compute_scores
from agnews_dist.events import (
    ClassScores,
    DataChecked,
    DataFinding,
    EvalDone,
    Event,
    OverfitChecked,
    Predicted,
    Profiled,
    Progress,
    RunDone,
    RunStarted,
    Scores,
    StepDone,
    StoppedEarly,
    Warned,
)
from agnews_dist.report import event_log
from agnews_dist.report.console import Sinks
from agnews_dist.report.event_log import EventLog

STEP = StepDone(
    step=1, epoch=1, loss=1.25, lr=1e-3, grad_norm=2.0, num_examples=32, num_tokens=1664, seconds=0.5
)  # fmt: skip
EVENTS: list[Event] = [
    RunStarted(facts={"device": "cpu"}, parameters={"out_head": (3076, 0)}, num_steps=10),
    Warned(message='a "quoted" text\nof two lines, \u2028, an emoji \U0001f600 and a lone surrogate \udc80'),
    DataChecked(findings=(DataFinding("3 rows of test", "test.csv row 1", "scores would be inflated", "Remove them"),)),
    STEP,
    EvalDone(
        split="validation",
        epoch=1,
        scores=Scores(num_examples=3, num_correct=2, accuracy=2 / 3, macro_f1=0.6, loss=0.7, confusion=((1, 1), (0, 1))),
        class_names=("World", "Sci/Tech"),
        num_classes=2,
        classes=(ClassScores(name="World", num_examples=2, precision=1.0, recall=0.5, f1=2 / 3),),
        seconds=0.1,
    ),
    Predicted(split="test", num_examples=3, seconds=0.1),
    StoppedEarly(step=9, epoch=2, num_worse=3, metric="loss", best_step=6),
    Profiled(path="trace.json", top_operators="a\nb"),
    OverfitChecked(num_examples=8, num_steps=50, first_loss=1.4, last_loss=0.01, accuracy=1.0),
    RunDone(facts={"best weights": "1"}, paths={"model": "runs/x/model"}),
]


def test_every_event_is_written_with_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    before = datetime.now(timezone.utc)
    with closing(EventLog(path)) as log:
        for event in EVENTS:
            log(event)
    found = read_events(path)
    assert len(found) == len(EVENTS) == 10
    for line, event in zip(found, EVENTS, strict=True):
        assert list(line)[:2] == ["event", "time"]
        assert line.pop("event") == type(event).__name__
        written = datetime.fromisoformat(line.pop("time"))
        assert written.utcoffset() == timedelta(0)
        assert abs(written - before) < timedelta(minutes=1)
        fields = dataclasses.asdict(event)
        fields |= fields.pop("scores", {})
        assert line == json.loads(json.dumps(fields))


def test_scores_are_fields_of_the_line_in_their_place(tmp_path: Path) -> None:
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        log(EVENTS[4])
    (line,) = read_events(tmp_path / "events.jsonl")
    assert list(line) == [
        "event", "time", "split", "epoch", "step", "num_examples", "num_correct", "accuracy", "macro_f1", "loss", "confusion",
        "class_names", "num_classes", "classes", "seconds", "is_best",
    ]  # fmt: skip


@pytest.mark.parametrize("num_classes", [20, 21, 300, 10_000])
def test_an_evaluation_of_many_classes_is_a_short_line(tmp_path: Path, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, num_classes, (2, 20_000))
    split = SplitScores(
        labels, predictions, np.empty((0, 0), "f4"), compute_scores(labels, predictions, num_classes, math.nan), seconds=1.0
    )
    names = tuple(f"a class with a long name, number {i}" for i in range(num_classes))
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        log(split.to_event("test", 1, names))
    assert (tmp_path / "events.jsonl").stat().st_size < 10_000
    (line,) = read_events(tmp_path / "events.jsonl")
    assert line["num_classes"] == num_classes
    assert line["loss"] is None
    if num_classes <= 20:
        assert line["confusion"] == confusion_matrix(labels, predictions).tolist()
        assert line["class_names"] == [each["name"] for each in line["classes"]] == list(names)
    else:
        assert line["confusion"] is line["class_names"] is None
        f1 = f1_score(labels, predictions, labels=range(num_classes), average=None, zero_division=0)
        assert [each["f1"] for each in line["classes"]] == np.sort(f1)[:5].tolist()


def test_progress_is_not_written(tmp_path: Path) -> None:
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        log(Progress(task="tokenising", done=1, total=2))
        log(STEP)
    assert [line["event"] for line in read_events(tmp_path / "events.jsonl")] == ["StepDone"]


def test_non_finite_numbers_are_null(tmp_path: Path) -> None:
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        log(dataclasses.replace(STEP, loss=math.nan, grad_norm=math.inf))
    text = (tmp_path / "events.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (line,) = read_events(tmp_path / "events.jsonl")
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["lr"] == 1e-3


KILLED = """
import os, signal, sys
from pathlib import Path
from agnews_dist.events import Warned
from agnews_dist.report.event_log import EventLog
log = EventLog(Path(sys.argv[1]))
for number in range(100):
    log(Warned(message=f"event {number}"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], check=False, env={**os.environ, "PYTHONPATH": str(root)}, timeout=TIMEOUT
    )
    assert done.returncode == -signal.SIGKILL
    assert [line["message"] for line in read_events(path)] == [f"event {number}" for number in range(100)]


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with closing(EventLog(path)) as log:
        log(Warned(message="before"))
    with path.open("a") as file:
        file.write('{"event": "Warned", "ti')
    assert [line["message"] for line in read_events(path)] == ["before"]
    with closing(EventLog(path)) as log:
        log(Warned(message="after"))
    assert [line["message"] for line in read_events(path)] == ["before", "after"]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_keep_bytes_drops_what_came_after_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with closing(EventLog(path)) as log:
        log(Warned(message="before"))
        kept = log.num_bytes
        assert kept == path.stat().st_size > 0
        log(Warned(message="will be repeated"))
    with closing(EventLog(path, keep_bytes=kept)) as log:
        assert log.num_bytes == kept
        log(Warned(message="repeated"))
    assert [line["message"] for line in read_events(path)] == ["before", "repeated"]
    # The log may be shorter than the checkpoint recorded.
    with closing(EventLog(path, keep_bytes=10**6)) as log:
        log(Warned(message="after"))
    assert [line["message"] for line in read_events(path)] == ["before", "repeated", "after"]


def test_lines_that_cannot_be_written_are_kept_and_sync_fails(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(EventLog(path)) as log:
        log(Warned(message="first"))
        log.sync(log.num_bytes)
        try:
            # The file may grow by half a line, which must be overwritten later.
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.num_bytes + 20, limits[1]))
            for message in ("second", "third"):
                with pytest.raises(OSError, match=r"File too large|No space left") as raised:
                    log(Warned(message=message))
                assert raised.value.filename == str(path)
            assert [line["message"] for line in read_events(path)] == ["first"]
            assert path.stat().st_size < log.num_bytes
            with pytest.raises(OSError, match=r"File too large|No space left"):
                log.sync(log.num_bytes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log(Warned(message="fourth"))
        log.sync(log.num_bytes)
    assert [line["message"] for line in read_events(path)] == ["first", "second", "third", "fourth"]


def test_hanging_disk_delays_no_step_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, answers, write = tmp_path / "events.jsonl", threading.Event(), os.pwrite

    def hang(*arguments: object) -> int:
        answers.wait(TIMEOUT)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", hang)
    log = EventLog(path)
    try:
        # One moment of patience for all of them, not for each.
        for number in range(1000):
            log(dataclasses.replace(STEP, step=number))
        num_bytes = log.num_bytes
        assert path.stat().st_size == 0 < num_bytes
        monkeypatch.setattr(event_log, "SILENT_SECONDS", 0.4)
        time.sleep(0.5)
        with pytest.raises(OSError, match="no answer for 0 s") as raised:
            log(dataclasses.replace(STEP, step=1000))
        assert raised.value.filename == str(path)
    finally:
        threading.Timer(0.5, answers.set).start()
    log.sync(num_bytes)
    assert path.stat().st_size >= num_bytes, "a checkpoint waits for the lines that it counts"
    log.close()
    assert [line["step"] for line in read_events(path)] == list(range(1001))


def test_move_of_the_directory_is_noticed_at_the_next_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with closing(EventLog(tmp_path / "a" / "events.jsonl")) as log:
        log.is_in_place = (tmp_path / "a").exists
        log(STEP)
        assert not log.has_moved
        (tmp_path / "a").rename(tmp_path / "b")
        log(STEP)
        assert log.has_moved
    assert len(read_events(tmp_path / "b" / "events.jsonl")) == 2


def test_a_failing_sink_does_not_end_the_run_and_others_get_one_warning(tmp_path: Path) -> None:
    received: list[Event] = []

    class Full:
        path = "/full/events.jsonl"

        def __call__(self, event: Event) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)

        def close(self) -> None:
            pass

    class Screen:
        def __call__(self, event: Event) -> None:
            received.append(event)

        def close(self) -> None:
            pass

    with Sinks() as emit:
        emit.add(Full())
        emit.add(Screen())
        emit(STEP)
        emit(STEP)
    assert [event for event in received if event == STEP] == [STEP, STEP]
    (warning,) = [event for event in received if isinstance(event, Warned)]
    assert warning.message.startswith("/full/events.jsonl cannot be written (No space left on device): ")


def test_a_log_that_cannot_be_opened_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot open .*choose another with --run.dir"):
        EventLog(tmp_path / "no" / "events.jsonl")
