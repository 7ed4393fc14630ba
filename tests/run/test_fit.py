"""`fit` and `load` against the command line: the same bytes from the same rows; the process is left as it was."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support import fork_server
from support.small_run import differences, write_inputs

WORKER = "tests/run/fit_worker.py"
NAMES = ("world", "sport", "business", "science")
NUM_ROWS = 96
SETTINGS: dict[str, Any] = {
    "data.max_length": 64,
    "data.validation_fraction": 0.25,
    "batch.global_batch_size": 16,
    "optim.epochs": 2,
    "optim.lr": 2e-3,
}
"""Settings of every training here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.csv`, `model`, and `runs/command` that the command has trained."""
    folder = tmp_path_factory.mktemp("fit")
    rows = pd.read_json(write_inputs() / "rows" / "train.jsonl", lines=True)[:NUM_ROWS]
    rows.assign(label=[NAMES[label] for label in rows.label]).to_csv(folder / "rows.csv", index=False)
    (folder / "model").symlink_to(write_inputs() / "model", target_is_directory=True)
    fork_server.run_python("-m", "agnews_dist", *arguments(folder, "command"))
    return folder


def arguments(folder: Path, name: str) -> list[str]:
    """Return the command line of a training."""
    places = {"data.source": folder / "rows.csv", "model.name": folder / "model", "data.cache_dir": folder / "cache"}
    settings = {**SETTINGS, **places, "run.dir": folder / "runs", "run.name": name}
    return ["train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """The run that the command has trained on two ranks."""
    fork_server.run_ranks(2, "-m", "agnews_dist", *arguments(folder, "two ranks"))
    return folder / "runs" / "two ranks"


def work(folder: Path, function: str) -> dict[str, Any]:
    """Run a function of fit_worker.py in a process; return what it found, and its output as `printed`."""
    done = fork_server.run_python(WORKER, function, str(folder), json.dumps(SETTINGS))
    return {**json.loads((folder / f"{function}.json").read_text()), "printed": done.stdout}


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return work(folder, "in_one_process")


@pytest.mark.parametrize("name", ["first", "frame", "path", "thread"])
def test_fits_in_one_process_write_the_bytes_of_the_command(folder, found, name):
    assert differences(folder / "runs" / name, folder / "runs" / "command") == []
    checkpoints = [folder / "runs" / each / "checkpoints" for each in (name, "command")]
    tensors = [sorted((path.relative_to(folder), path) for path in folder.rglob("*.safetensors")) for folder in checkpoints]
    assert len(tensors[0]) == len(tensors[1]) > 0
    for (name, path), (other_name, other) in zip(*tensors, strict=True):
        assert name == other_name
        assert path.read_bytes() == other.read_bytes()


def test_fits_leave_no_state_behind(found):
    changes = {name: value for name, value in found.items() if name.startswith("changed by")}
    assert len(changes) == 5
    assert [(name, sorted(changed)) for name, changed in changes.items() if changed] == [], changes
    assert found["frozen later"] <= found["frozen"]


def test_errors_reach_the_caller_as_their_class_and_leave_no_run(folder, found):
    assert found["debug"] == "none"
    assert found["rows"].startswith("DataError: label is missing in 96 rows of train (train row 0, train row 1, ")
    assert found["directory"].startswith("UserError: ")
    assert "rows.csv" in found["directory"]
    assert found["again"].startswith("AlreadyFinished: ")
    assert found["settings"].startswith("ConfigError: unknown setting 'epoch'")
    assert "\nlabel_smoothing='much': it takes a number" in found["settings"]
    assert found["late"].startswith("Stopped: stopped (run.max_minutes 0.001) at step 1, which is saved.")
    assert not (folder / "runs" / "bad").exists()


def test_sinks_get_every_event_and_an_error_in_one_is_a_warning(found):
    assert {"RunStarted", "StepDone", "EvalDone", "CheckpointSaved", "Warned", "RunDone"} <= {*found["events"]}
    assert found["events"].count("StepDone") == 10
    [line] = [line for line in found["printed"].splitlines() if "FaultySink" in line]
    assert "warning: sinks: FaultySink raised ValueError: a fault of the caller's at Progress. The run continues" in line


def test_a_run_shows_its_scores(folder, found):
    accuracy = json.loads((folder / "runs" / "command" / "result.json").read_text())["splits"]["validation"]["accuracy"]
    assert found["repr"] == f"Run('{folder}/runs/frame', validation accuracy {accuracy:.4f})"
    assert f"<td>validation</td><td>24</td><td>{accuracy:.4f}</td>" in found["html"]
    assert found["report"] is None


def test_predictions_are_those_of_the_command(folder, found):
    pd.read_csv(folder / "rows.csv")[["text"]][:40].to_csv(folder / "texts.csv", index=False)
    words = ["--model.name", folder / "runs" / "command", "--file", folder / "texts.csv", "--format", "jsonl"]
    done = fork_server.run_python("-m", "agnews_dist", "predict", *map(str, words))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["prediction"] for each in answers] == found["labels"]
    assert [list(each["probabilities"].values()) for each in answers] == found["probabilities"]


def test_an_interrupt_saves_a_checkpoint_from_which_the_same_call_continues(folder):
    found = work(folder, "interrupted")
    assert found["early"].startswith("KeyboardInterrupt")
    assert not found["early run"]
    assert found["stopped"].startswith("KeyboardInterrupt: stopped (SIGINT) at step 4, which is saved.")
    assert (found["saved"]["state"], found["saved"]["step"]) == ("preempted", 4)
    assert "cannot be continued (the data (or data.max_length) had the fingerprint" in found["other rows"]
    assert found["handler"]
    assert found["continued"] == "none"
    assert differences(folder / "runs" / "stopped", folder / "runs" / "command") == []


def test_fits_under_deepspeed_do_not_depend_on_each_other(folder):
    pytest.importorskip("deepspeed")
    found = work(folder, "with_deepspeed")
    assert (found["error 0"], found["error 1"]) == ("none", "none")
    assert differences(folder / "runs" / "deepspeed 0", folder / "runs" / "deepspeed 1") == []
    assert differences(folder / "runs" / "after deepspeed", folder / "runs" / "command") == []


def test_ranks_of_a_launcher_fit_together_as_the_command(folder, two_ranks):
    fork_server.run_ranks(2, WORKER, "as_rank", str(folder), json.dumps(SETTINGS))
    names = ["ranks", "ranks again"]
    num_correct = json.loads((two_ranks / "result.json").read_text())["splits"]["validation"]["num_correct"]
    for rank in (0, 1):
        found = json.loads((folder / f"as_rank{rank}.json").read_text())
        assert found["rows"].startswith("DataError: label is missing in 96 rows of train")
        assert found["changed"] == {}
        assert found["runs"] == [str(folder / "runs" / name) for name in names]
        assert found["scores"] == [num_correct] * 2
        assert found["launch"].startswith("ConfigError: launch=2: a launcher has started this process as a rank.")
    assert [differences(folder / "runs" / name, two_ranks) for name in names] == [[], []]


def test_launched_ranks_train_as_those_of_torchrun_and_raise_their_errors_here(folder, two_ranks):
    found = work(folder, "launching")
    assert found["interrupted"].startswith("KeyboardInterrupt: stopped (SIGINT) at step ")
    assert found["saved"]["state"] == "preempted"
    assert differences(folder / "runs" / "launched", two_ranks) == []
    assert found["run"].startswith(f"Run('{folder}/runs/launched', validation accuracy ")
    assert "Resumed" in (folder / "events.txt").read_text()
    assert "step 10/10" in found["printed"]
    assert found["failed"].startswith("ConfigError: optim.class_weights")
    assert found["killed"].startswith("UserError: launch=2: rank 0 was ended by SIGKILL. ")
    assert found["rows"].startswith("DataError: label is missing in 96 rows of train")
    assert all(error.startswith("ConfigError: sinks ") for error in found["sinks"])
    assert found["number"].startswith("ConfigError: launch=0: it takes a number of processes")
    assert found["changed"] == {}
    assert not (folder / "runs" / "bad").exists()
