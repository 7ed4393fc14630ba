"""One start of a run on rank 0 and on another rank: begin, resume, and every way to end."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.events import recorder

from agnews_dist.config.schema import CheckpointConfig, Config, EngineConfig, RunConfig
from agnews_dist.distributed.world import World
from agnews_dist.errors import AlreadyFinished, SharedError, Stopped
from agnews_dist.events import Event, Warned
from agnews_dist.report.result_files import versions
from agnews_dist.run import attempt as attempt_module
from agnews_dist.run.attempt import Attempt
from agnews_dist.run.fingerprints import weight_settings
from agnews_dist.run.status import StatusFile, read_status
from agnews_dist.training.checkpoint import list_checkpoints, write_checkpoint
from agnews_dist.training.timing import StageTimer

FINGERPRINTS = {"config": "c", "tokenizer": "t", "tokens": "d", "frozen_weights": "f"}


class FakePreemptionHandler:
    """Preemption handler without a thread."""

    stop_reason: str | None = "SIGTERM"
    before_exit: Any = None
    is_training = False

    def begin_training(self) -> None:
        """Record the call."""
        self.is_training = True


class FakeSink:
    """Records events but progress, and whether it was closed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_closed = False
        self._record = recorder(self.events)

    def __call__(self, event: Event) -> None:
        self._record(event)

    def close(self) -> None:
        """Record the call."""
        self.is_closed = True


class FakeTrainer:
    """Records what it resumes from; its strategy must not be asked for its state."""

    strategy, class_names = None, ("a", "b")
    loaded: Any = None

    def load_state(self, *state: Any) -> None:
        """Record the arguments."""
        self.loaded = state


def make_config(runs: Path, **changes: Any) -> Config:
    """Return the configuration of the run `small`."""
    return Config(run=RunConfig(dir=str(runs), name="small")).model_copy(update=changes)


def make_attempt(config: Config, world: World | None = None) -> Attempt:
    """Return a start that is not entered yet."""
    engine = SimpleNamespace(world=world or World(), precision="fp32")
    return Attempt(config, engine, FakePreemptionHandler(), accept=(), timer=StageTimer(0.0))


def leave_checkpoint(runs: Path, step: int, *, job: str | None = None, **state: Any) -> Path:
    """Leave the run `small`, preempted with a checkpoint of `step`."""
    run = runs / "small"
    settings = {**weight_settings(make_config(runs)), "engine.precision": "fp32"}
    content = {"step": step, "settings": settings, "fingerprints": FINGERPRINTS, "best": None, "log_bytes": 0, **state}
    path = run / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(path, {"weights": {"w": torch.full((2,), float(step))}}, content)
    StatusFile(lambda: run, attempt=1, step=step, job=job).write("preempted", "")
    return path


def end_with(attempt: Attempt, sink: FakeSink, error: BaseException | None, *, begin: bool = True) -> BaseException | None:
    """Run a start that ends with `error`, before or after the run began; return the error that it passes on."""
    try:
        with attempt:
            attempt._sinks.add(sink)
            attempt.claim()
            if begin:
                attempt.begin(FINGERPRINTS)
            if error is not None:
                raise error
    except BaseException as caught:
        return caught
    return None


@pytest.fixture
def claimed(tmp_path):
    """Yield a start of the run `small` that has claimed its directory, on rank 0."""
    with make_attempt(make_config(tmp_path)) as attempt:
        attempt.claim()
        yield attempt


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_run_in_the_directory_of_a_sweep_is_refused(tmp_path, overwrite, resume):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "plan.json").write_text("{}")
    StatusFile(lambda: tmp_path / "small", attempt=2, step=30, job=None).write("preempted", "SIGTERM")
    run = RunConfig(dir=str(tmp_path), name="small", overwrite=overwrite)
    attempt = make_attempt(make_config(tmp_path, run=run, checkpoint=CheckpointConfig(resume=resume)))
    error = end_with(attempt, FakeSink(), None)
    assert "small: it is a sweep, and not a run. Choose another --run.name." in str(error)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["plan.json", "small", "status.json"]


@pytest.mark.parametrize("first", ["begin", "end"])
def test_attempt_that_is_ended_while_it_begins_records_the_end(claimed, tmp_path, monkeypatch, first):
    # The preemption thread ends the process: whatever the main thread is writing, it must not overwrite the final status.
    write, is_ended, may_begin = StatusFile.write, threading.Event(), threading.Event()

    def write_slowly(self: StatusFile, state: str, reason: str) -> None:
        if state == "running":
            may_begin.set()
            is_ended.wait(0.5)
        write(self, state, reason)
        if state != "running":
            is_ended.set()

    monkeypatch.setattr(StatusFile, "write", write_slowly)
    with ThreadPoolExecutor() as pool:
        if first == "begin":
            beginning = pool.submit(claimed.begin, {})
            assert may_begin.wait(5)
        claimed.monitors.preemption.before_exit("preempted", "SIGTERM")
        if first == "end":
            beginning = pool.submit(claimed.begin, {})
        beginning.result(5)
    status = read_status(tmp_path / "small")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    leftovers = [path for path in tmp_path.glob(".small.*") if path.is_dir()]
    assert not leftovers, "neither a staging directory nor a replaced run is left"


def test_error_of_a_collective_that_a_stop_has_broken_does_not_turn_the_stop_into_a_failure(tmp_path):
    # The other ranks exit while this one's preemption thread waits for them.
    attempt = make_attempt(make_config(tmp_path))
    with attempt:
        attempt.claim()
        attempt.begin({})
        attempt.monitors.preemption.before_exit("preempted", "SIGUSR1")
        attempt.__exit__(RuntimeError, RuntimeError("Connection closed by peer"), None)
    status = read_status(tmp_path / "small")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGUSR1")


def test_nothing_undoes_a_finished_run(claimed, tmp_path, capsys):
    claimed.begin({})
    claimed.finish(76, "all steps are done")
    claimed.__exit__(RuntimeError, RuntimeError("Connection closed by peer"), None)
    claimed.monitors.preemption.before_exit("preempted", "SIGTERM")
    status = read_status(tmp_path / "small")
    assert status is not None
    assert (status.state, status.step) == ("finished", 76)
    assert "stopped" not in capsys.readouterr().err


def test_start_without_a_name_fails_while_the_checkpoint_of_its_job_cannot_be_read(tmp_path, monkeypatch):
    config = make_config(tmp_path).model_copy(update={"run": RunConfig(dir=str(tmp_path))})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    leave_checkpoint(tmp_path, 40, job="slurm 7")
    monkeypatch.setattr("agnews_dist.run.resume.RETRY_SECONDS", 0.0)

    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "state.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with make_attempt(config) as attempt, monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(SharedError, match="step-00000040 may be whole"):
            attempt.claim()
    with make_attempt(config) as attempt:
        attempt.claim()
        assert attempt.directory == tmp_path / "small"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "running", "it began"),
        (ValueError("a fault\nwith details"), "failed", "a fault"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
        (AlreadyFinished("finished"), "running", "it began"),
        (Stopped(), "preempted", "SIGTERM"),
    ],
)
def test_attempt_exit_records_the_state_and_releases_everything(tmp_path, error, state, reason):
    sink = FakeSink()
    assert end_with(make_attempt(make_config(tmp_path)), sink, error) is error, "the error is passed on"
    assert sink.is_closed
    status = read_status(tmp_path / "small")
    assert status is not None
    assert (status.state, status.reason) == (state, reason)
    assert not (tmp_path / ".small.lock").exists()
    if isinstance(error, Stopped):
        assert str(error) == "stopped (SIGTERM) before its first checkpoint. The same command resumes from there."


def test_attempt_exit_closes_its_sinks_if_the_status_cannot_be_recorded(tmp_path, monkeypatch):
    sink, lost = FakeSink(), SharedError("rank 1 is gone", 1)

    def all_gather(value: object) -> list[object]:
        if value == FakePreemptionHandler.stop_reason:
            raise lost
        return [value]

    monkeypatch.setattr(attempt_module.collectives, "all_gather", all_gather)
    assert end_with(make_attempt(make_config(tmp_path)), sink, Stopped()) is lost
    assert sink.is_closed


def test_attempt_that_never_began_leaves_nothing(tmp_path):
    sink, error = FakeSink(), ValueError("a bad row")
    assert end_with(make_attempt(make_config(tmp_path)), sink, error, begin=False) is error
    assert sink.is_closed
    assert list(tmp_path.iterdir()) == []


def test_attempt_resumes_and_removes_later_checkpoints(tmp_path):
    chosen, later = (leave_checkpoint(tmp_path, step, num_ranks=1, features="host") for step in (40, 50))
    config = make_config(tmp_path, checkpoint=CheckpointConfig(resume=str(chosen)))
    sink, trainer = FakeSink(), FakeTrainer()
    with make_attempt(config) as attempt:
        attempt._sinks.add(sink)
        attempt.claim()
        assert list_checkpoints(later.parent) == [later, chosen], "nothing is changed before the run begins"
        attempt.begin(FINGERPRINTS)
        assert list_checkpoints(later.parent) == [chosen]
        assert attempt.requested_place() == "host", "features stay where they were"
        checkpoints = attempt.open_checkpoints(trainer, FINGERPRINTS, "host")
        assert checkpoints.last_saved == 40
    state, tensors, best_tensors = trainer.loaded
    assert (state["step"], tensors["weights"]["w"].tolist(), best_tensors) == (40, [40.0, 40.0], {})
    assert attempt.monitors.preemption.is_training
    warning, resumed = sink.events
    assert isinstance(warning, Warned)
    assert warning.message == f"{later} is removed: the run resumes from step 40, before it."
    assert (resumed.path, resumed.step, resumed.attempt) == (str(chosen), 40, 2)
    status = read_status(tmp_path / "small")
    assert status is not None
    assert (status.state, status.attempt, status.step, status.reason) == ("running", 2, 40, "it resumed")


@pytest.mark.parametrize(("saved", "expected"), [(versions(), True), ({**versions(), "transformers": "0.1"}, False)])
def test_export_is_checked_again_only_if_the_libraries_have_changed(tmp_path, saved, expected):
    config = make_config(tmp_path, checkpoint=CheckpointConfig(resume="auto"))
    with make_attempt(config) as attempt:
        attempt.claim()
        assert not attempt.has_checked_export, "a new run"
    leave_checkpoint(tmp_path, 40, versions=saved)
    with make_attempt(config) as attempt:
        attempt.claim()
        assert attempt.has_checked_export is expected


@pytest.mark.parametrize(("place", "num_ranks", "expected"), [("auto", 2, "auto"), ("disk", 1, "disk")])
def test_requested_place_is_the_setting_unless_it_is_auto_on_as_many_ranks(tmp_path, place, num_ranks, expected):
    leave_checkpoint(tmp_path, 40, num_ranks=num_ranks, features="host")
    config = make_config(tmp_path, checkpoint=CheckpointConfig(resume="auto"))
    config = config.model_copy(update={"engine": EngineConfig(feature_cache=place)})
    with make_attempt(config) as attempt:
        attempt.claim()
        attempt.begin(FINGERPRINTS)
        assert attempt.requested_place() == expected


def test_rank_without_the_checkpoint_skips_what_rank_0_has_saved(tmp_path, monkeypatch):
    # Saving is collective: if only rank 0 skipped a checkpoint that is saved already, the other ranks would wait for ever.
    state = {"step": 40, "best": None}
    fakes = {"check_equal": lambda _: None, "catch": lambda work: work(), "raise_if_any_failed": lambda outcome: outcome}
    for name, fake in {**fakes, "all_gather": lambda value: [False if value is True else state, value]}.items():
        monkeypatch.setattr(attempt_module.collectives, name, fake)
    trainer = FakeTrainer()
    with make_attempt(make_config(tmp_path), World(rank=1, num_ranks=2, local_rank=1, ranks_per_node=2)) as attempt:
        attempt.claim()
        attempt.begin(FINGERPRINTS)
        with closing(attempt.open_checkpoints(trainer, FINGERPRINTS, "host")) as checkpoints:
            checkpoints.save(40, {}, None, is_scored=False, wait=True)
    assert trainer.loaded == (state, {}, {}), "only rank 0 has the tensors"
    assert list(tmp_path.iterdir()) == [], "only rank 0 writes"
