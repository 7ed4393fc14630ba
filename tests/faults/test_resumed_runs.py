"""A run that was stopped and resumed ends as an uninterrupted one; settings that would change it are refused by name."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.jobs import ForkedJob
from support.processes import wait_until
from support.small_run import (
    EPOCH_STEPS,
    EPOCHS,
    NUM_STEPS,
    arguments,
    differences,
    finish,
    read_log,
    read_status,
    run_directory,
    start,
    wait_for,
)
from support.timeline import Timeline

INJECT = "support.faults:inject"
MIDDLE = EPOCH_STEPS + 20
"""A step in the middle of the second epoch."""


def stop(directory: Path, *more: str, at_step: int, on_rank: int = 0, fault: str = "vote", num_ranks: int = 2) -> str:
    """Run an attempt that is stopped at its `at_step`th step; return its output."""
    happening = {"AT_STEP": str(at_step), "ON_RANK": str(on_rank), "FAULT": fault}
    return wait_for(start(directory, *more, num_ranks=num_ranks, fault=INJECT, **happening), directory, 75)


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (run_directory(directory) / "checkpoints").iterdir())


def newest_two(directory: Path) -> list[Path]:
    return sorted((run_directory(directory) / "checkpoints").glob("step-*"), reverse=True)


def assert_same_as(whole: Path, directory: Path) -> None:
    assert differences(run_directory(directory), run_directory(whole)) == []


@pytest.fixture(scope="module")
def whole_of_one(tmp_path_factory) -> Path:
    """The directory of an uninterrupted run of one rank."""
    directory = tmp_path_factory.mktemp("whole-of-one")
    finish(directory, num_ranks=1)
    return directory


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory) -> Path:
    """A run of one rank that was stopped in the second epoch. Tests do not change it."""
    directory = tmp_path_factory.mktemp("stopped")
    stop(directory, at_step=MIDDLE, num_ranks=1)
    return directory


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_run_does_and_logs_every_step_once(whole):
    steps = [event["step"] for event in Timeline(run_directory(whole)).of("StepDone")]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert read_status(whole) == {**read_status(whole), "state": "finished", "attempt": 1, "step": NUM_STEPS}


@pytest.mark.parametrize(("signal_name", "on_rank"), [("TERM", 1), ("USR1", 0)])
def test_signal_to_any_rank_stops_all_and_run_resumes_there(whole, tmp_path, signal_name, on_rank):
    output = stop(tmp_path, at_step=MIDDLE, on_rank=on_rank, fault=signal_name)
    stopped_at = re.search(rf"^stopped \(SIG{signal_name}.*\) at step (\d+), which is saved", output, re.M)
    assert stopped_at, output
    step = int(stopped_at[1])
    # A thread receives the signal; ranks vote at the beginning of a step.
    assert MIDDLE <= step <= MIDDLE + 5
    assert "Traceback" not in output
    assert read_status(tmp_path) == {**read_status(tmp_path), "state": "preempted", "attempt": 1, "step": step}
    assert f"step-{step:08d}" in saved(tmp_path)
    assert Timeline(run_directory(tmp_path)).steps == step
    finish(tmp_path)
    assert f"resumed from step {step}, attempt 2: " in read_log(tmp_path)
    assert_same_as(whole, tmp_path)
    assert read_status(tmp_path) == {**read_status(tmp_path), "state": "finished", "attempt": 2, "step": NUM_STEPS}


def test_run_stopped_after_an_epochs_last_step_resumes_with_the_evaluation(whole, tmp_path):
    stop(tmp_path, at_step=EPOCH_STEPS)
    assert not Timeline(run_directory(tmp_path)).of("EvalDone")
    assert read_status(tmp_path)["step"] == EPOCH_STEPS
    stop(tmp_path, at_step=1)
    assert len(Timeline(run_directory(tmp_path)).of("EvalDone")) == 1
    finish(tmp_path)
    assert_same_as(whole, tmp_path)


def test_saving_at_every_step_changes_nothing(whole, tmp_path):
    finish(tmp_path, "--checkpoint.every_steps", "1")
    assert_same_as(whole, tmp_path)
    # A checkpoint that is due while another is being written waits for it.
    assert len(Timeline(run_directory(tmp_path)).of("CheckpointSaved")) > 10
    kept = [name for name in saved(tmp_path) if name.startswith("step")]
    assert len(kept) == 2
    assert kept[-1] == f"step-{NUM_STEPS:08d}-scored"
    assert len(saved(tmp_path)) <= 4, "the two and the best epochs that they name"


def test_one_process_resumes_after_ctrl_c_under_the_name_it_printed(whole_of_one, tmp_path):
    in_memory = ("--engine.feature_cache_gigabytes", "0")
    output = stop(tmp_path / "cut", "--run.name", "null", *in_memory, at_step=30, fault="INT", num_ranks=1)
    (run,) = (tmp_path / "cut" / "runs").iterdir()
    assert f"--run.name {run.name}." in output
    spent = json.loads((max((run / "checkpoints").glob("step-*")) / "state.json").read_text())["seconds"]
    # From now on there are features on disk, which a new run would use.
    more = ("--run.name", "other", "--engine.feature_cache", "disk", "--optim.epochs", "1")
    finish(tmp_path / "cut", *more, num_ranks=1)
    wait_for(start(tmp_path / "cut", "--run.name", run.name, num_ranks=1), tmp_path / "cut")
    assert differences(run, run_directory(whole_of_one)) == []
    results = [json.loads((path / "result.json").read_text()) for path in (run, run.with_name("other"))]
    assert [result["feature_cache"] for result in results] == ["host", "disk"]
    assert spent["tokenize"] > results[1]["seconds"]["tokenize"], "only the first run tokenises"
    assert all(results[0]["seconds"][stage] >= seconds for stage, seconds in spent.items())


def test_damaged_checkpoint_is_skipped_by_name(whole_of_one, stopped):
    newest, before = newest_two(stopped)
    file = newest / "moments.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    finish(stopped, num_ranks=1)
    assert re.search(rf"warning: .*{newest.name}.*moments.safetensors.*It is skipped", read_log(stopped))
    assert f"resumed from step {int(before.name[5:13])}, attempt 2: {before}" in read_log(stopped)
    assert_same_as(whole_of_one, stopped)


def test_resuming_from_an_earlier_checkpoint_removes_the_later_one(whole_of_one, stopped):
    later, earlier = newest_two(stopped)
    step = int(earlier.name[5:13])
    output = stop(stopped, "--checkpoint.resume", str(earlier), at_step=1, num_ranks=1)
    assert f"{later} is removed: " in output
    assert read_status(stopped)["step"] < int(later.name[5:13])
    finish(stopped, num_ranks=1)
    assert f"resumed from step {step + 1}, attempt 3: " in read_log(stopped)
    assert_same_as(whole_of_one, stopped)


def test_settings_of_another_training_are_refused_by_name(stopped_once):
    output = wait_for(start(stopped_once, "--batch.global_batch_size", "8", "--optim.lr", "1e-3"), stopped_once, 1)
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "cannot be continued (batch.global_batch_size was 16, is 8; optim.lr was 0.002, is 0.001)" in line
    assert "Traceback" not in output
    assert read_status(stopped_once)["state"] == "preempted", "a refusal changes nothing"


def test_other_frozen_weights_are_refused(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(shared / "checkpoints" / "gpt2-mini", model)
    options = ("--model.name", str(model), "--data.max_length", "32", "--data.limit_train", "160")
    options += ("--data.limit_validation", "16", "--data.limit_test", "16")
    stop(tmp_path, *options, at_step=5, num_ranks=1)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.0.mlp.c_fc.weight"))
    save_file({**weights, name: weights[name] + 0.01}, model / "model.safetensors", metadata={"format": "pt"})
    output = wait_for(start(tmp_path, *options, num_ranks=1), tmp_path, 1)
    assert re.search(r"frozen weights of the model had the fingerprint \w{12}, now \w{12}", output)
    assert read_status(tmp_path)["state"] in ("preempted", "failed")


def test_accepted_learning_rate_is_used(stopped):
    finish(stopped, "--optim.lr", "1e-3", "--accept", "optim.lr", num_ranks=1)
    assert re.search(r"warning: optim.lr was 0.002, is 0.001", read_log(stopped))
    steps = Timeline(run_directory(stopped)).of("StepDone")
    assert max(event["lr"] for event in steps) == pytest.approx(2e-3)
    assert steps[MIDDLE]["lr"] < 1e-3


def test_more_epochs_continue_a_finished_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    finish(tmp_path, "--optim.epochs", str(EPOCHS + 1))
    changed = f"warning: optim.epochs was {EPOCHS}, is {EPOCHS + 1}: the learning rate now follows the schedule"
    assert changed in read_log(tmp_path)
    timeline = Timeline(run_directory(tmp_path))
    steps = timeline.of("StepDone")
    assert [event["step"] for event in steps] == list(range(1, NUM_STEPS + EPOCH_STEPS + 1))
    assert steps[NUM_STEPS]["lr"] > steps[NUM_STEPS - 1]["lr"]
    assert len([event for event in timeline.of("EvalDone") if event["split"] == "validation"]) == EPOCHS + 1


def test_settings_that_do_not_change_results_resume_without_a_warning(whole_of_one, stopped):
    others = ("--checkpoint.every_steps", "50", "--run.max_minutes", "30", "--batch.max_tokens_per_rank", "4096")
    finish(stopped, *others, num_ranks=1)
    assert not re.search("warning: .* was ", read_log(stopped))
    assert_same_as(whole_of_one, stopped)


def test_resume_never_takes_overwrite_to_replace_a_run(stopped):
    output = wait_for(start(stopped, "--checkpoint.resume", "never", num_ranks=1), stopped, 1)
    assert re.search(r"error: \S+small exists: its results would be lost", output)
    assert read_status(stopped)["step"] == MIDDLE
    finish(stopped, "--checkpoint.resume", "never", "--run.overwrite", num_ranks=1)
    assert read_status(stopped)["attempt"] == 1


def test_resume_path_starts_a_new_run_from_another_runs_checkpoint(whole_of_one, stopped):
    finish(stopped, "--run.name", "forked", "--checkpoint.resume", str(run_directory(stopped)), num_ranks=1)
    assert "weights" not in differences(stopped / "runs" / "forked", run_directory(whole_of_one))
    assert read_status(stopped)["state"] == "preempted", "the source run is unchanged"
    nothing = ("--run.name", "x", "--checkpoint.resume", str(stopped / "nothing"))
    output = wait_for(start(stopped, *nothing, num_ranks=1), stopped, 1)
    assert re.search(r"error: checkpoint.resume \S+nothing: no such directory", output)


def test_two_jobs_do_not_write_into_one_run(tmp_path):
    first = start(tmp_path, "--optim.epochs", "300")
    try:
        assert wait_until((run_directory(tmp_path) / "status.json").exists)
        second = ForkedJob(arguments(tmp_path), tmp_path / "second.txt")
        assert wait_until(second.has_ended)
        assert second.codes() == [1, 1]
        assert re.search(
            r"error: \S+small is being written by another process: process \d+ on \S+\. Wait",
            (tmp_path / "second.txt").read_text(),
        )
        first.signal("rank 0", signal.SIGTERM)
    finally:
        wait_for(first, tmp_path, 75)
    assert read_status(tmp_path)["attempt"] == 1


@pytest.mark.parametrize("limit", ["run.max_minutes", "the time limit of the Slurm job"])
def test_time_limit_stops_the_run(tmp_path, limit):
    """Repeat with a longer limit, if the run ended before its first step."""
    for minutes in (0.1, 0.3, 0.9, 2.7):
        more, environ = ("--run.max_minutes", str(minutes)), {}
        if not limit.startswith("run."):
            # The run ends a minute before the job, as Slurm may be that early.
            more, environ = (), {"SLURM_JOB_END_TIME": str(int(time.time() + 60 * minutes) + 61), "SLURM_JOB_ID": "4711"}
        output = wait_for(start(tmp_path, "--optim.epochs", "2000", *more, num_ranks=1, **environ), tmp_path, 75)
        if "before its first checkpoint" not in output:
            break
    assert re.search(rf"stopped \({limit}( [\d.]+)?\) at step \d+, which is saved", output), output
    assert read_status(tmp_path)["state"] == "preempted"


STEPWISE = ("--optim.evaluate_every", "5", "--optim.best_metric", "loss", "--optim.patience", "2", "--optim.lr", "0.03")
STEPWISE = (*STEPWISE, "--optim.class_weights", "balanced", "--optim.label_smoothing", "0.1", "--optim.max_steps", "60")
STEPWISE = (*STEPWISE, "--optim.average", "ema", "--optim.average_start", "0", "--optim.layer_decay", "0.8")
STEPWISE = (*STEPWISE, "--optim.r_drop", "0.5")


def test_run_stopped_between_evaluations_stops_early_at_the_same_step_with_the_same_bits(tmp_path):
    """Use a learning rate so high that the loss soon rises. The second attempt inherits the counter of the first."""
    finish(tmp_path / "whole", *STEPWISE)
    whole = Timeline(run_directory(tmp_path / "whole"))
    stop_step, best_step = whole.steps, whole.of("StoppedEarly")[0]["best_step"]
    assert (stop_step - best_step, stop_step % 5) == (10, 0)
    assert stop_step < 60
    assert f"stopped early after step {stop_step}: 2 evaluations without a better loss" in read_log(tmp_path / "whole")
    status = read_status(tmp_path / "whole")
    assert (status["state"], status["step"]) == ("finished", stop_step)
    assert status["reason"] == "it stopped early: 2 evaluations without a better loss"
    result = json.loads((run_directory(tmp_path / "whole") / "result.json").read_text())
    assert result["num_steps"] == stop_step
    # After the first of the two worse evaluations.
    stop(tmp_path / "cut", *STEPWISE, at_step=stop_step - 1)
    state = json.loads((newest_two(tmp_path / "cut")[0] / "state.json").read_text())
    assert (state["scored_step"], state["best"]["num_worse"], state["best"]["step"]) == (stop_step - 5, 1, best_step)
    finish(tmp_path / "cut", *STEPWISE)
    assert f"resumed from step {state['step']}, attempt 2: " in read_log(tmp_path / "cut")
    assert_same_as(tmp_path / "whole", tmp_path / "cut")
    assert len(Timeline(run_directory(tmp_path / "cut")).of("StoppedEarly")) == 1


def test_fsdp_with_two_blocks_resumes_bit_for_bit(tmp_path):
    """Resume with dropout below the last block: it uses torch's random numbers, which are seeded per step."""
    more = ("--engine.backend", "fsdp", "--model.trainable_blocks", "2", "--optim.epochs", "1")
    finish(tmp_path / "whole", *more)
    stop(tmp_path / "cut", *more, at_step=20)
    assert read_status(tmp_path / "cut")["step"] == 20
    finish(tmp_path / "cut", *more)
    assert_same_as(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("at_step", "num_ranks"), [(EPOCH_STEPS, 2), (2 * EPOCH_STEPS + 9, 3)])
def test_run_with_frozen_blocks_resumes_bit_for_bit(tmp_path, at_step, num_ranks):
    """Stop at the end of an epoch, before the lower blocks are frozen; and after a second freezing."""
    more = ("--model.trainable_blocks", "3", "--model.freeze_schedule", "3,2,1", "--optim.epochs", "3")
    finish(tmp_path / "whole", *more, num_ranks=num_ranks)
    stop(tmp_path / "cut", *more, at_step=at_step, num_ranks=num_ranks)
    assert read_status(tmp_path / "cut")["step"] == at_step
    finish(tmp_path / "cut", *more, num_ranks=num_ranks)
    assert_same_as(tmp_path / "whole", tmp_path / "cut")


def test_requeued_job_without_a_run_name_finds_its_run(whole, tmp_path):
    more, environ = ("--run.name", "null"), {"SLURM_JOB_ID": "4711"}
    job = start(tmp_path, *more, fault=INJECT, AT_STEP="30", FAULT="vote", **environ)
    wait_for(job, tmp_path, 75)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
    wait_for(start(tmp_path, *more, **environ), tmp_path)
    assert [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == [run]
    assert differences(run, run_directory(whole)) == []


def test_second_signal_ends_a_hanging_run_which_resumes(whole, tmp_path):
    """Let the training loop hang, so that it cannot act on the first signal."""
    job = start(tmp_path, fault="support.faults:hang")
    try:
        assert wait_until(lambda: "hangs" in read_log(tmp_path))
        job.signal("rank 1", signal.SIGTERM)
        assert not wait_until(job.has_ended, 3)
        job.signal("rank 1", signal.SIGTERM)
        job.signal("rank 0", signal.SIGTERM)
        assert wait_until(job.has_ended), read_log(tmp_path)
    finally:
        job.kill()
    assert read_status(tmp_path)["state"] in ("preempted", "failed", "running")
    finish(tmp_path)
    assert_same_as(whole, tmp_path)
