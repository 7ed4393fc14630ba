"""What goes wrong on one rank or on all ends the whole job, soon and with one clear message; what is only odd trains."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import fork_server
from support.events import read_events
from support.processes import REPOSITORY, torchrun
from support.processes import python as start

# Far below engine.timeout_seconds (600): a rank left waiting in a collective would be seen.
SOON = 150
ODD_RANK = str(REPOSITORY / "tests" / "ranks" / "odd_rank.py")
SMALL = [
    *("--model.name", "embedded", "--data.limit_train", "60", "--data.limit_validation", "9", "--data.limit_test", "9"),
    *("--batch.global_batch_size", "10", "--run.name", "mine"),
]
CPU = {"CUDA_VISIBLE_DEVICES": ""}


def train(
    directory: Path, *launched: str, source: str = "synthetic", launch=fork_server.run_ranks
) -> subprocess.CompletedProcess[str]:
    places = ["--run.dir", str(directory), "--data.cache_dir", str(directory / "cache"), "--data.source", source]
    return launch(2, *launched, *SMALL, *places, check=False, timeout=SOON, **CPU)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that tell a user's error; the job must have failed."""
    assert done.returncode != 0
    return [line for line in done.stderr.splitlines() if "error: " in line and line.startswith(("error", "[rank"))]


def marked(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("[rank ")]


def events_of(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


def steps_of(run: Path) -> list[int]:
    return [event["step"] for event in events_of(run, "StepDone")]


def test_a_bad_row_is_said_once_by_rank_0(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"News number {i}.", "label": i % 4} for i in range(20)]
    rows[16]["label"] = 4
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(tmp_path / "runs", "-m", "agnews_dist.train", source=str(file), launch=torchrun)
    (line,) = errors(done)
    assert line.startswith("[rank 0/2] error: label is not a class in 1 row (rows.jsonl row 17: 4)")
    assert "Correct these rows." in line
    assert marked(done) == [line], "no traceback of ours"
    assert 'File "' + str(REPOSITORY / "agnews_dist") not in done.stderr
    assert not (tmp_path / "runs" / "mine").exists(), "a run that never began leaves nothing"


def test_a_fault_that_one_rank_sees_stops_all(tmp_path):
    done = train(tmp_path, ODD_RANK, "1", "--data.source=/nowhere/rows.csv", "train")
    (line,) = errors(done)
    assert line.startswith("[rank 1/2] error: data.source '/nowhere/rows.csv' does not exist")
    assert "Check the path" in line
    assert marked(done) == [line]
    assert not (tmp_path / "mine").exists()


def test_a_rank_that_starts_from_other_data_is_found_before_it_trains(tmp_path):
    done = train(tmp_path, ODD_RANK, "1", "--data.seed=5", "train")
    (line,) = errors(done)
    assert line.startswith("[rank 1/2] error: rank 1 has another config and tokens than rank 0")
    assert "Give every rank the same configuration" in line
    assert not (tmp_path / "mine").exists()


def test_a_bug_on_one_rank_stops_all_and_every_line_says_whose_it_is(tmp_path):
    done = train(tmp_path, ODD_RANK, "1", "crash", "train", launch=torchrun)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    begin = lines.index("[rank 1/2] Traceback (most recent call last):")
    end = lines.index("[rank 1/2] ZeroDivisionError: a bug on one rank")
    assert end > begin + 4
    assert sum("Traceback" in line for line in marked(done)) == 1, (
        "that of the rank that failed, not of the one it took along"
    )
    status = json.loads((tmp_path / "mine" / "status.json").read_text())
    assert (status["state"], status["step"], status["attempt"]) == ("failed", 0, 1)
    assert errors(done) == [], "a bug is no user's error"
    left = {path.name for path in (tmp_path / "mine").iterdir()}
    assert left == {"config.yaml", "events.jsonl", "status.json"}, "no result of half a run"
    assert steps_of(tmp_path / "mine") == [1, 2]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(tmp_path):
    done = train(tmp_path, ODD_RANK, "1", "nan", "train")
    (line,) = errors(done)
    named = re.match(r"\[rank 1/2\] error: non-finite loss on rank\(s\) 1, of examples (\d+): ", line)
    assert named, line
    assert "Lower optim.lr" in line
    assert marked(done) == [line]
    assert not (tmp_path / "mine" / "result.json").exists()
    assert steps_of(tmp_path / "mine") == [1, 2]
    (event,) = events_of(tmp_path / "mine", "NonFinite")
    assert (event["step"], event["ids"]) == (3, [int(named[1])])


def test_a_loss_that_is_not_finite_is_skipped_by_all_ranks_if_asked(tmp_path):
    done = train(tmp_path, ODD_RANK, "1", "nan", "train", "--optim.nonfinite", "skip")
    assert done.returncode == 0, done.stderr
    bad = [event["step"] for event in events_of(tmp_path / "mine", "NonFinite")]
    steps = events_of(tmp_path / "mine", "StepDone")
    # Rank 1 never recovers: from its third micro-batch on, every step is left out, and the weights stay finite.
    assert bad == [event["step"] for event in steps[2:]]
    assert [event["loss"] is None for event in steps] == [False, False] + [True] * (len(steps) - 2)
    exported = load_file(tmp_path / "mine" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in exported.values())


# One that is suspended: tests/faults.
@pytest.mark.parametrize(("change", "launch"), [("vanish", torchrun), ("hang", fork_server.run_ranks)])
def test_a_rank_that_dies_or_hangs_ends_all_within_the_timeout(tmp_path, change, launch):
    start = time.monotonic()
    done = train(tmp_path, ODD_RANK, "1", change, "train", "--engine.timeout_seconds", "8", launch=launch)
    assert done.returncode != 0
    # Imports and setup are part of it; what is left of them after the limit would be a hang.
    assert time.monotonic() - start < SOON / 2
    told = {"vanish": r"error: .*rank 1", "hang": r"^\[rank 1/2\] rank 0 failed first; this rank ended with it$"}
    assert re.search(told[change], done.stderr, re.M), done.stderr
    status = json.loads((tmp_path / "mine" / "status.json").read_text())
    assert status["state"] in ("failed", "running"), "stale or said, but never preempted"


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str], int]:
    """(run, cache, training, when the cache was written): two training rows on three ranks, in bf16, with the profiler on."""
    directory = tmp_path_factory.mktemp("few")
    words = ["--model.name", "embedded", "--data.source", "synthetic", "--data.cache_dir", str(directory / "cache")]
    words += ["--data.limit_train", "2", "--data.limit_validation", "2", "--data.limit_test", "1"]
    prepared = start("-m", "agnews_dist", "prepare", *words, **CPU)
    assert re.search(r"tokens +made now", prepared.stdout)
    assert re.search(r"train +2 texts", prepared.stdout)
    (cache,) = (path for path in (directory / "cache").iterdir() if path.is_dir())
    written = (cache / "meta.json").stat().st_mtime_ns
    words += ["--optim.epochs", "3", "--engine.precision", "bf16", "--profile", "--batch.longest_first"]
    words += ["--batch.global_batch_size", "2"]
    done = fork_server.run_ranks(
        3, "-m", "agnews_dist.train", *words, "--run.dir", str(directory), "--run.name", "few", **CPU
    )
    return directory / "few", cache, done, written


def test_fewer_examples_than_ranks_train_and_are_scored(few):
    directory, _, _, _ = few
    result = json.loads((directory / "result.json").read_text())
    assert (result["num_ranks"], result["num_steps"]) == (3, 3)
    assert {name: split["num_examples"] for name, split in result["splits"].items()} == {"validation": 2, "test": 1}
    steps = [event for event in read_events(directory / "events.jsonl") if event["event"] == "StepDone"]
    assert [event["num_examples"] for event in steps] == [2, 2, 2]
    # The mean over two examples, whatever the third rank computed for its filler row: about ln 4 at the start.
    assert steps[0]["loss"] == pytest.approx(1.386, abs=0.3)
    assert (directory / "model" / "model.safetensors").is_file()


def test_the_largest_step_is_rehearsed_when_asked_for(few):
    _, _, done, _ = few
    # Rank 0 has the longer of the two texts.
    assert re.search(r"rehearse the largest step \(1 x \d\d+ tokens\): 1 done", done.stdout)


def test_a_batch_too_small_for_the_ranks_is_warned_of(few):
    directory, _, _, _ = few
    warnings = [event["message"] for event in read_events(directory / "events.jsonl") if event["event"] == "Warned"]
    (message,) = [warning for warning in warnings if "global_batch_size" in warning]
    assert (
        "batch.global_batch_size 2 on 3 ranks: 1 of 3 ranks compute a filler row at every step, 33% of the" in message
    )
    assert "Raise batch.global_batch_size to 3 or more" in message


def test_what_was_prepared_is_found_by_the_training(few):
    _, cache, done, written = few
    assert re.search(r"tokens +cached", done.stdout)
    assert (cache / "meta.json").stat().st_mtime_ns == written


def test_bf16_and_the_profiler_on_a_cpu(few):
    directory, _, done, _ = few
    assert re.search(r"precision +bf16", done.stdout)
    exported = load_file(directory / "model" / "model.safetensors")
    assert {str(weight.dtype) for weight in exported.values()} == {"torch.float32"}
    assert "Self CPU" in done.stdout
    events = json.loads((directory / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("bfloat16" in str(event.get("args", {}).get("Input type", "")).lower() for event in events)
    assert any(str(event.get("name")).startswith("ProfilerStep") for event in events)
