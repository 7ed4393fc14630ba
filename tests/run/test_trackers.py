"""Trackers: real clients with local stores keep one complete record of a run, through kills, and never harm the run."""

import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from support import small_run
from support.processes import has_ended, wait_until
from support.timeline import Timeline
from support.tracker_stores import READERS, Record, read_records, round_to_32_bits

NUM_STEPS = 2 * small_run.EPOCH_STEPS
SAVED, HANGS_AT = small_run.EPOCH_STEPS, 70
"""Step of the last checkpoint before the first kill, and the step at which the ranks wait for it."""
TRACKED = ("--report.trackers", "tensorboard,wandb,mlflow,trackio", "--checkpoint.every_steps", "1000")
LOCAL = {"WANDB_API_KEY": "", "NETRC": "/dev/null"}


def find_processes(run: Path) -> list[psutil.Process]:
    """The processes of the trackers of a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(run / "trackers" / "run.json") in (process.info["cmdline"] or []):
            found.append(process)
    return found


def steps_of(record: Record) -> set[int]:
    return {step for name, step, _ in record.numbers if name == "train/loss"}


def read_when(tracker: str, run: Path, step: int) -> list[Record]:
    """Content of the tracker's store, once it has a step."""
    found: list[Record] = []

    def has_step() -> bool:
        found[:] = read_records(tracker, run)
        return any(step in steps_of(record) for record in found)

    assert wait_until(has_step, 60, every=0.5), f"{tracker}: {found}"
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict[str, list[Record]], dict[str, list[Record]]]:
    """The directory of a run that was killed twice, and what the trackers had at the first kill and at the end."""
    directory = tmp_path_factory.mktemp("killed")
    run = small_run.run_directory(directory)
    fault = {"FAULT": "hang", "AT_STEP": str(HANGS_AT + 1), "ON_RANK": "all"}
    job = small_run.start(directory, *TRACKED, fault="support.faults:inject", **LOCAL, **fault)
    try:
        assert wait_until(lambda: Timeline(run).steps == HANGS_AT), small_run.read_log(directory)
        before = {name: read_when(name, run, 1 if name == "wandb" else HANGS_AT) for name in READERS}
        processes = find_processes(run)
        assert len(processes) == len(READERS), "rank 0 alone has trackers"
        job.signal("all", signal.SIGKILL)
        assert wait_until(lambda: all(has_ended(process.pid) for process in processes), 30)
        assert Timeline(run).saved() == SAVED
        # The second start is killed while the clients catch up.
        job = small_run.start(directory, *TRACKED, fault="support.faults:inject", **LOCAL, **fault)
        assert wait_until(lambda: len(list(run.glob("tensorboard/*"))) and len(find_processes(run)) == len(READERS))
        time.sleep(1)
    finally:
        job.signal("all", signal.SIGKILL)
        job.kill()
    small_run.finish(directory, *TRACKED, **LOCAL)
    return run, before, {name: read_records(name, run) for name in READERS}


def expected_numbers(run: Path, *, with_speed: bool) -> Iterator[tuple[str, int, float]]:
    for event in Timeline(run).events():
        if event["event"] == "StepDone":
            values = {f"train/{name}": event[name] for name in ("loss", "lr", "grad_norm", "epoch")}
            if with_speed:
                values["train/tokens_per_second"] = event["num_tokens"] / event["seconds"]
                values["train/examples_per_second"] = event["num_examples"] / event["seconds"]
        elif event["event"] == "EvalDone":
            values = {f"{event['split']}/{name}": event[name] for name in ("accuracy", "macro_f1", "loss")}
        else:
            continue
        for name, value in values.items():
            yield name, event["step"], round_to_32_bits(value)


@pytest.mark.parametrize("tracker", READERS)
def test_a_killed_run_has_one_record_with_every_step_once(killed, tracker):
    run, before, after = killed
    [old], [record] = before[tracker], after[tracker]
    assert old.id == record.id, "the same record"
    # The restart repeated steps that the store had and no checkpoint. W&B writes blocks of some 40 steps.
    assert (0 if tracker == "wandb" else SAVED) < max(steps_of(old)) <= HANGS_AT
    assert steps_of(record) == set(range(1, NUM_STEPS + 1))
    # MLflow takes nothing back: repeated steps keep the speed of the first time. All else is bit-equal.
    with_speed = tracker != "mlflow"
    found = [number for number in record.numbers if with_speed or not number[0].endswith("_per_second")]
    assert Counter(found) == Counter(expected_numbers(run, with_speed=with_speed))
    names_and_steps = [number[:2] for number in record.numbers]
    assert len(set(names_and_steps)) == len(names_and_steps)


@pytest.mark.parametrize("tracker", READERS)
def test_the_record_has_settings_final_scores_and_result(killed, tracker):
    run, _, after = killed
    [record] = after[tracker]
    splits = json.loads((run / "result.json").read_text())["splits"]
    names = ("accuracy", "macro_f1", "loss")
    final = {f"final/{split}/{name}": round_to_32_bits(splits[split][name]) for split in splits for name in names}
    assert len(final) == 6
    assert record.final == final
    assert float(record.settings["optim.lr"]) == 2e-3
    assert record.settings["model.name"] == small_run.settings()["model.name"]
    assert [file for file in record.files if file.endswith("result.json")]
    identity = json.loads((run / "trackers" / "run.json").read_text())["id"]
    assert tracker == "mlflow" or record.id == identity


def test_the_weights_are_those_without_trackers(killed, tmp_path):
    plain = small_run.finish(tmp_path, "--checkpoint.every_steps", "1000")
    assert small_run.differences(plain, killed[0]) == []
    assert not (plain / "trackers").exists()


def test_failing_and_hanging_trackers_leave_a_warning_each(killed, tmp_path):
    """The server of MLflow and W&B accepts and never answers; trackio's folder is a file."""
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        environ = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
            "TRACKIO_DIR": str(tmp_path / "file" / "trackio"),
        }
        run = small_run.finish(tmp_path, *TRACKED, **environ)
    assert small_run.differences(run, killed[0]) == []
    warnings = [event["message"] for event in Timeline(run).of("Warned") if "tracker" in event["message"]]
    for name, reason in (("mlflow", "no answer"), ("wandb", "no answer"), ("trackio", "NotADirectoryError: ")):
        [warning] = [each for each in warnings if each.startswith(f"tracker {name}: it failed ({reason}")]
        warnings.remove(warning)
    assert warnings == []
    done, last = Timeline(run).of("RunDone")[0]["time"], Timeline(run).events()[-1]["time"]
    assert (datetime.fromisoformat(last) - datetime.fromisoformat(done)).total_seconds() < 25
    [record] = read_records("tensorboard", run)
    assert steps_of(record) == set(range(1, NUM_STEPS + 1))
    assert find_processes(run) == []


def test_a_tracker_without_its_package_is_refused_before_any_work(tmp_path):
    """Imports find no wandb, as where it is not installed."""
    job = small_run.start(tmp_path, "--report.trackers", "wandb", fault="support.faults:hide_wandb")
    output = small_run.wait_for(job, tmp_path, codes=1)
    assert "report.trackers wandb: the package is not installed. Run pip install agnews_dist[wandb], or leave it out." in output
    assert not small_run.run_directory(tmp_path).exists()
