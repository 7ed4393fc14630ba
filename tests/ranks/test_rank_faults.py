"""A fault on one rank or on all ends the whole job soon, with one clear message; unusual but valid input trains."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import small_run
from support.events import read_events
from support.fork_server import run_python, run_ranks
from support.processes import REPOSITORY

FAULTY_RANK = str(REPOSITORY / "tests" / "ranks" / "faulty_rank.py")
LIMITS = ("--data.limit_train", "60", "--data.limit_validation", "9", "--data.limit_test", "9")
CPU = {"CUDA_VISIBLE_DEVICES": ""}


def train(directory: Path, *launched: str, source: str = "") -> subprocess.CompletedProcess[str]:
    """Train on two ranks. A rank that waits in a collective ends at engine.timeout_seconds (600), which is a failure here."""
    inputs = small_run.write_inputs()
    words = ["--model.name", str(inputs / "model"), "--data.source", source or str(inputs / "rows"), *LIMITS]
    words += ["--data.max_length", str(small_run.MAX_LENGTH), "--batch.global_batch_size", "10"]
    words += ["--run.dir", str(directory), "--run.name", "mine", "--data.cache_dir", str(directory / "cache")]
    return run_ranks(2, *launched, *words, check=False, **CPU)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines with errors a user can fix; the job must have failed."""
    assert done.returncode != 0
    return [line for line in done.stderr.splitlines() if "error: " in line and line.startswith(("error", "[rank"))]


def rank_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("[rank ")]


def events_of(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


def steps_of(run: Path) -> list[int]:
    return [event["step"] for event in events_of(run, "StepDone")]


def test_bad_row_is_reported_once_by_rank_0(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"News number {i}.", "label": i % 4} for i in range(20)]
    rows[16]["label"] = 1.5
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(tmp_path / "runs", "-m", "agnews_dist.train", source=str(file))
    (line,) = errors(done)
    assert line.startswith("[rank 0/2] error: label 1.5 in rows.jsonl row 17 is a decimal number ")
    assert "Write the labels so" in line
    assert rank_lines(done) == [line], "no traceback of ours"
    assert 'File "' + str(REPOSITORY / "agnews_dist") not in done.stderr
    assert not (tmp_path / "runs" / "mine").exists(), "a run that never began leaves nothing"


def test_error_on_one_rank_stops_all(tmp_path):
    done = train(tmp_path, FAULTY_RANK, "1", "--data.source=/nowhere/rows.csv", "train")
    (line,) = errors(done)
    assert line.startswith("[rank 1/2] error: data.source '/nowhere/rows.csv' does not exist")
    assert "Correct it" in line
    assert rank_lines(done) == [line]
    assert not (tmp_path / "mine").exists()


def test_rank_with_other_data_is_found_before_training(tmp_path):
    done = train(tmp_path, FAULTY_RANK, "1", "--data.seed=5", "train")
    (line,) = errors(done)
    assert line.startswith("[rank 1/2] error: rank 1 has another config and tokens and rows than rank 0")
    assert "Give every rank the same configuration" in line
    assert not (tmp_path / "mine").exists()


def test_bug_on_one_rank_stops_all_and_every_line_names_the_rank(tmp_path):
    done = train(tmp_path, FAULTY_RANK, "1", "crash", "train")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    begin = lines.index("[rank 1/2] Traceback (most recent call last):")
    end = lines.index("[rank 1/2] ZeroDivisionError: a bug on one rank")
    assert end > begin + 4
    assert sum("Traceback" in line for line in rank_lines(done)) == 1, "only the rank that failed prints a traceback"
    status = json.loads((tmp_path / "mine" / "status.json").read_text())
    assert (status["state"], status["step"], status["attempt"]) == ("failed", 0, 1)
    assert errors(done) == [], "a bug is not an error a user can fix"
    left = {path.name for path in (tmp_path / "mine").iterdir()}
    assert left == {"config.yaml", "events.jsonl", "status.json"}, "no result of half a run"
    assert steps_of(tmp_path / "mine") == [1, 2]


def test_non_finite_loss_on_one_rank_stops_all_before_the_update(tmp_path):
    done = train(tmp_path, FAULTY_RANK, "1", "nan", "train")
    (line,) = errors(done)
    named = re.match(r"\[rank 1/2\] error: non-finite loss on rank\(s\) 1, of examples (\d+): ", line)
    assert named, line
    assert "Lower optim.lr" in line
    assert rank_lines(done) == [line]
    assert not (tmp_path / "mine" / "result.json").exists()
    assert steps_of(tmp_path / "mine") == [1, 2]
    (event,) = events_of(tmp_path / "mine", "NonFinite")
    assert (event["step"], event["ids"]) == (3, [int(named[1])])


def test_nonfinite_skip_lets_all_ranks_skip_the_update(tmp_path):
    done = train(tmp_path, FAULTY_RANK, "1", "nan", "train", "--optim.nonfinite", "skip")
    assert done.returncode == 0, done.stderr
    bad = [event["step"] for event in events_of(tmp_path / "mine", "NonFinite")]
    steps = events_of(tmp_path / "mine", "StepDone")
    # Rank 1 never recovers: every step from its third micro-batch on is skipped, and the weights stay finite.
    assert bad == [event["step"] for event in steps[2:]]
    assert [event["loss"] is None for event in steps] == [False, False] + [True] * (len(steps) - 2)
    exported = load_file(tmp_path / "mine" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in exported.values())


HANGS = r"^\[rank 0/2\] error: rank 1 hangs or is slow, in training/losses.py line \d+: rank 0 waited 8 s for it\. .*$"


@pytest.mark.parametrize(("fault", "message"), [("vanish", r"error: .*rank 1"), ("hang", HANGS)], ids=["vanish", "hang"])
def test_rank_that_dies_or_hangs_ends_all(tmp_path, fault, message):
    done = train(tmp_path, FAULTY_RANK, "1", fault, "train", "--engine.timeout_seconds", "8")
    assert done.returncode != 0
    assert re.search(message, done.stderr, re.M), done.stderr
    status = json.loads((tmp_path / "mine" / "status.json").read_text())
    assert status["state"] in ("failed", "running"), "never preempted"


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str], int]:
    """(run, cache, training, time of the cache): two training rows on three ranks, in bf16, with the profiler."""
    directory = tmp_path_factory.mktemp("few")
    words = ["--model.name", "embedded", "--data.source", "synthetic", "--data.cache_dir", str(directory / "cache")]
    words += ["--data.limit_train", "2", "--data.limit_validation", "2", "--data.limit_test", "1"]
    prepared = run_python("-m", "agnews_dist", "prepare", *words, **CPU)
    assert re.search(r"tokens +made now", prepared.stdout)
    assert re.search(r"train +2 texts", prepared.stdout)
    (cache,) = (path for path in (directory / "cache").iterdir() if path.is_dir())
    written = (cache / "meta.json").stat().st_mtime_ns
    words += ["--optim.epochs", "3", "--engine.precision", "bf16", "--profile", "--batch.longest_first"]
    words += ["--batch.global_batch_size", "2", "--verbose"]
    done = run_ranks(3, "-m", "agnews_dist.train", *words, "--run.dir", str(directory), "--run.name", "few", **CPU)
    return directory / "few", cache, done, written


def test_fewer_examples_than_ranks_train_and_are_scored(few):
    directory, _, _, _ = few
    result = json.loads((directory / "result.json").read_text())
    assert (result["num_ranks"], result["num_steps"]) == (3, 3)
    assert {name: split["num_examples"] for name, split in result["splits"].items()} == {"validation": 2, "test": 1}
    steps = [event for event in read_events(directory / "events.jsonl") if event["event"] == "StepDone"]
    assert [event["num_examples"] for event in steps] == [2, 2, 2]
    # The mean over two examples without the filler row of the third rank: about ln 4 at the start.
    assert steps[0]["loss"] == pytest.approx(1.386, abs=0.3)
    assert (directory / "model" / "model.safetensors").is_file()


def test_longest_first_tries_the_largest_step(few):
    _, _, done, _ = few
    # Rank 0 has the longer of the two texts.
    assert re.search(r"dry run of the largest step \(1 x \d\d+ tokens\): 1 done", done.stdout)


def test_batch_smaller_than_the_ranks_is_a_warning(few):
    directory, _, _, _ = few
    warnings = [event["message"] for event in read_events(directory / "events.jsonl") if event["event"] == "Warned"]
    (message,) = [warning for warning in warnings if "global_batch_size" in warning]
    assert "batch.global_batch_size 2 on 3 ranks: 1 of 3 ranks compute a filler row at every step, 33% of the" in message
    assert "Raise batch.global_batch_size to 3 or more" in message


def test_training_finds_the_prepared_tokens(few):
    _, cache, done, written = few
    assert re.search(r"tokens +cached", done.stdout)
    assert (cache / "meta.json").stat().st_mtime_ns == written


def test_bf16_and_the_profiler_run_on_a_cpu(few):
    directory, _, done, _ = few
    assert re.search(r"device .*, bf16\n", done.stdout)
    exported = load_file(directory / "model" / "model.safetensors")
    assert {str(weight.dtype) for weight in exported.values()} == {"torch.float32"}
    assert "Self CPU" in done.stdout
    events = json.loads((directory / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("bfloat16" in str(event.get("args", {}).get("Input type", "")).lower() for event in events)
    assert any(str(event.get("name")).startswith("ProfilerStep") for event in events)
