"""`--debug`: small, verbose and deterministic; it stops if the model cannot overfit a batch."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from support import fork_server
from support.events import read_events


def debug(directory: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "agnews_dist.train", "--debug", "--run.dir", str(directory), "--run.name", "debug"]
    return fork_server.run_python(*command, XDG_CACHE_HOME=str(directory), CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> list[tuple[Path, subprocess.CompletedProcess[str]]]:
    directories = [tmp_path_factory.mktemp("debug") for _ in range(2)]
    return [(directory / "debug", debug(directory)) for directory in directories]


def test_debug_prints_the_overfit_check_and_every_step(twice):
    directory, done = twice[0]
    assert done.stderr == ""
    (check,) = (line for line in done.stdout.splitlines() if "overfit check" in line)
    assert "8 examples" in check
    assert "accuracy 1.000" in check
    (checked,) = (event for event in read_events(directory / "events.jsonl") if event["event"] == "OverfitChecked")
    assert 0 < checked["num_steps"] < 100
    assert checked["last_loss"] < 0.1 < 1.0 < checked["first_loss"]
    steps = [event for event in read_events(directory / "events.jsonl") if event["event"] == "StepDone"]
    assert len(steps) >= 8
    printed = re.findall(rf" step +(\d+)/{len(steps)} .* loss ([\d.]+) ", done.stdout)
    assert [(int(number), float(loss)) for number, loss in printed] == [
        (step["step"], pytest.approx(step["loss"], abs=1e-4)) for step in steps
    ]
    assert done.stdout.index("overfit check") < done.stdout.index(printed[0][1])


def test_debug_is_deterministic(twice):
    results = [json.loads((directory / "result.json").read_text()) for directory, _ in twice]
    assert results[0]["splits"] == results[1]["splits"]
    assert set(results[0]["splits"]) == {"validation", "test"}
    # The event of a checkpoint comes when the disk has it, which depends on time.
    events = [
        [plain(event) for event in read_events(directory / "events.jsonl") if event["event"] != "CheckpointSaved"]
        for directory, _ in twice
    ]
    assert len(events[0]) > 10
    assert events[0] == events[1]
    for name in ("predictions-test.jsonl", "model/model.safetensors"):
        first, second = ((directory / name).read_bytes() for directory, _ in twice)
        assert first == second, name


def plain(event: dict[str, object]) -> dict[str, object]:
    """Return an event without times and paths."""
    own = ("time", "seconds", "stall", "facts", "paths", "path", "num_bytes")
    return {key: value for key, value in event.items() if key not in own}


def test_failed_overfit_check_stops_the_run(tmp_path):
    words = ["--debug", "--optim.lr", "0", "--run.dir", str(tmp_path), "--run.name", "debug"]
    # The process reports which switches its debug mode has set.
    code = f"""if True:
        import torch
        from agnews_dist.__main__ import main
        code = main(["train", *{words}])
        print(torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled())
        raise SystemExit(code)
    """
    done = fork_server.run_python("-c", code, check=False, XDG_CACHE_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "True True"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: run.debug: 8 examples not learnt in 100 steps (accuracy 0.")
    assert "Check optim.lr (0.0), the labels, and model.trainable_blocks." in line
    assert re.search(r" step +1/", done.stdout) is None
    assert not (tmp_path / "debug" / "result.json").exists()
