"""A run that was stopped ends as one that was not; what would make it another training is refused by name."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.jobs import wait_until
from support.small_run import EPOCH_STEPS, NUM_STEPS, differences, end, finish, start, status, told
from support.timeline import Timeline

ARRANGE = "support.faults:arrange"
DROPOUT = ("--optim.weight_decay", "0.1")


def stop(
    directory: Path, *more: str, at_step: int, on_rank: int = 0, what: str = "vote", num_ranks: int = 2, codes=75
) -> str:
    """An attempt that gets a signal at its `at_step`th step; what it said."""
    job = start(
        directory, *more, num_ranks=num_ranks, before=ARRANGE, AT_STEP=str(at_step), ON_RANK=str(on_rank), WHAT=what
    )
    return end(job, directory, codes)


def run_of(directory: Path) -> Path:
    return directory / "runs" / "small"


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (run_of(directory) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    finish(directory)
    return directory


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """One that was stopped in the middle of the second epoch."""
    stop(tmp_path, at_step=EPOCH_STEPS + 20)
    return tmp_path


def test_every_step_is_done_and_logged_once(whole):
    steps = [event["step"] for event in Timeline(run_of(whole)).of("StepDone")]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert status(whole) == {**status(whole), "state": "finished", "attempt": 1, "step": NUM_STEPS}


@pytest.mark.parametrize(("what", "on_rank"), [("TERM", 1), ("USR1", 0)])
def test_a_signal_to_any_rank_stops_all_and_the_run_goes_on_from_there(whole, tmp_path, what, on_rank):
    step = EPOCH_STEPS + 20
    said = stop(tmp_path, at_step=step, on_rank=on_rank, what=what)
    told_step = re.search(rf"^stopped \(SIG{what}.*\) at step (\d+), which is saved", said, re.M)
    assert told_step, said
    # The signal is seen by a thread, and the vote is cast at the step's beginning.
    assert step <= int(told_step[1]) <= step + 5
    step = int(told_step[1])
    assert "Traceback" not in said
    assert status(tmp_path) == {**status(tmp_path), "state": "preempted", "attempt": 1, "step": step}
    assert f"step-{step:08d}" in saved(tmp_path)
    assert Timeline(run_of(tmp_path)).steps == step
    finish(tmp_path)
    assert f"goes on from step {step}, attempt 2: " in told(tmp_path)
    assert differences(run_of(tmp_path), run_of(whole)) == []
    assert status(tmp_path) == {**status(tmp_path), "state": "finished", "attempt": 2, "step": NUM_STEPS}


def test_after_the_last_step_of_an_epoch_its_evaluation_is_what_is_missing(whole, tmp_path):
    stop(tmp_path, at_step=EPOCH_STEPS)
    assert not Timeline(run_of(tmp_path)).of("EvalDone")
    assert status(tmp_path)["step"] == EPOCH_STEPS
    stop(tmp_path, at_step=1)
    assert len(Timeline(run_of(tmp_path)).of("EvalDone")) == 1
    finish(tmp_path)
    assert differences(run_of(tmp_path), run_of(whole)) == []


def test_saving_at_every_step_changes_nothing(whole, tmp_path):
    finish(tmp_path, "--checkpoint.every_steps", "1")
    assert differences(run_of(tmp_path), run_of(whole)) == []
    events = Timeline(run_of(tmp_path)).of("CheckpointSaved")
    # One that is due while another is being written waits for it.
    assert len(events) > 20
    kept = [name for name in saved(tmp_path) if name.startswith("step")]
    assert len(kept) == 2
    assert kept[-1] == f"step-{NUM_STEPS:08d}-scored"
    # The best epochs that these two know beside them, and nothing else.
    assert len(saved(tmp_path)) <= 4


def test_one_process_goes_on_as_well_and_ctrl_c_says_how(tmp_path):
    finish(tmp_path / "whole", num_ranks=1)
    said = stop(tmp_path / "cut", "--run.name", "null", at_step=30, what="INT", num_ranks=1)
    (run,) = (tmp_path / "cut" / "runs").iterdir()
    assert f"The same command goes on from there, with --run.name {run.name}." in said
    spent = json.loads((max((run / "checkpoints").glob("step-*")) / "state.json").read_text())["seconds"]
    # Now there are features on disk, which a new run would take.
    more = ("--run.name", "other", "--engine.feature_cache", "disk", "--optim.epochs", "1")
    finish(tmp_path / "cut", *more, num_ranks=1)
    end(start(tmp_path / "cut", "--run.name", run.name, num_ranks=1), tmp_path / "cut")
    assert differences(run, run_of(tmp_path / "whole")) == []
    results = [json.loads((path / "result.json").read_text()) for path in (run, run.with_name("other"))]
    assert [result["feature_cache"] for result in results] == ["host", "disk"]
    assert spent["tokenize"] > results[1]["seconds"]["tokenize"], "only the first one tokenises"
    assert all(results[0]["seconds"][stage] >= seconds for stage, seconds in spent.items())


def test_a_damaged_checkpoint_is_skipped_by_name_and_the_one_before_is_used(whole, stopped):
    newest, before = sorted((path for path in (run_of(stopped) / "checkpoints").glob("step-*")), reverse=True)
    file = newest / "moments.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    finish(stopped)
    assert re.search(
        rf"warning: .*{newest.name}.*moments.safetensors.*It is skipped, and the one before it is used", told(stopped)
    )
    assert f"goes on from step {int(before.name[5:13])}, attempt 2: {before}" in told(stopped)
    assert differences(run_of(stopped), run_of(whole)) == []


def test_who_goes_back_to_an_earlier_checkpoint_does_not_find_a_later_one_again(whole, stopped):
    later, earlier = sorted((path for path in (run_of(stopped) / "checkpoints").glob("step-*")), reverse=True)
    step = int(earlier.name[5:13])
    said = stop(stopped, "--checkpoint.resume", str(earlier), at_step=1)
    assert f"{later} is removed: the run goes on from step {step}, before it" in said
    assert status(stopped)["step"] < int(later.name[5:13])
    finish(stopped)
    assert f"goes on from step {step + 1}, attempt 3: " in told(stopped)
    assert differences(run_of(stopped), run_of(whole)) == []


def test_a_finished_run_is_not_trained_again(whole):
    before = (run_of(whole) / "result.json").stat().st_mtime_ns
    said = end(start(whole), whole, 0)
    assert re.search(rf"{run_of(whole)} is finished \({NUM_STEPS} steps\): nothing is left to do", said)
    assert (run_of(whole) / "result.json").stat().st_mtime_ns == before
    assert status(whole)["state"] == "finished"


def test_settings_that_would_make_it_another_training_are_refused_by_name(stopped_once):
    said = end(start(stopped_once, "--batch.global_batch_size", "8", "--optim.lr", "1e-3"), stopped_once, 1)
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert "cannot be continued (batch.global_batch_size was 16, is 8; optim.lr was 0.002, is 0.001)" in line
    assert "Restore what was" in line
    assert "Traceback" not in said
    assert status(stopped_once)["state"] == "preempted", "a refusal changes nothing"


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory) -> Path:
    """Stopped in the second epoch; tests that use it are refused, and change nothing."""
    directory = tmp_path_factory.mktemp("refused")
    stop(directory, at_step=EPOCH_STEPS + 20)
    return directory


def test_other_frozen_weights_and_another_tokenizer_are_refused(shared, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(shared / "checkpoints" / "gpt2-mini", model)
    given = ("--model.name", str(model), "--data.max_length", "32")
    limits = ("--data.limit_train", "160", "--data.limit_validation", "16", "--data.limit_test", "16")
    stop(tmp_path, *given, *limits, at_step=5, num_ranks=1)
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.0.mlp.c_fc.weight"))
    save_file({**weights, name: weights[name] + 0.01}, model / "model.safetensors", metadata={"format": "pt"})
    said = end(start(tmp_path, *given, *limits, num_ranks=1), tmp_path, 1)
    assert re.search(
        r"cannot be continued: the frozen weights of the model had the fingerprint \w{12}, now \w{12}", said
    )
    assert status(tmp_path)["state"] in ("preempted", "failed")


def test_another_learning_rate_goes_on_if_accepted(stopped):
    finish(stopped, "--optim.lr", "1e-3", "--accept", "optim.lr")
    assert re.search(r"warning: optim.lr was 0.002, is 0.001, as accepted", told(stopped))
    steps = Timeline(run_of(stopped)).of("StepDone")
    assert max(event["lr"] for event in steps) == pytest.approx(2e-3)
    assert steps[EPOCH_STEPS + 20]["lr"] < 1e-3


def test_more_epochs_go_on_from_the_end_and_say_what_becomes_of_the_learning_rate(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    finish(tmp_path, "--optim.epochs", "4")
    assert re.search(
        r"warning: optim.epochs was 3, is 4: the learning rate follows the schedule of 4 epochs", told(tmp_path)
    )
    steps = Timeline(run_of(tmp_path)).of("StepDone")
    assert [event["step"] for event in steps] == list(range(1, NUM_STEPS + EPOCH_STEPS + 1))
    assert steps[NUM_STEPS]["lr"] > steps[NUM_STEPS - 1]["lr"]
    assert len([event for event in Timeline(run_of(tmp_path)).of("EvalDone") if event["split"] == "validation"]) == 4


def test_other_ways_of_computing_the_same_go_on_silently(whole, stopped):
    finish(stopped, "--checkpoint.every_steps", "50", "--run.max_minutes", "30", "--batch.max_tokens_per_rank", "4096")
    assert not re.search("warning: .* was ", told(stopped))
    assert differences(run_of(stopped), run_of(whole)) == []


def test_never_and_overwrite_start_anew(stopped):
    said = end(start(stopped, "--checkpoint.resume", "never"), stopped, 1)
    assert re.search(r"error: \S+small exists: its results would be lost", said)
    assert status(stopped)["step"] == EPOCH_STEPS + 20
    finish(stopped, "--checkpoint.resume", "never", "--run.overwrite")
    assert status(stopped)["attempt"] == 1
    assert "goes on from" not in told(stopped)


def test_a_path_starts_a_new_run_from_another_ones_checkpoint(whole, stopped):
    finish(stopped, "--run.name", "forked", "--checkpoint.resume", str(run_of(stopped)))
    forked = stopped / "runs" / "forked"
    assert "weights" not in differences(forked, run_of(whole))
    assert status(stopped)["state"] == "preempted", "the run that it came from is as it was"
    said = end(start(stopped, "--run.name", "x", "--checkpoint.resume", str(stopped / "nothing")), stopped, 1)
    assert re.search(r"error: checkpoint.resume \S+nothing: no such directory", said)


def test_two_jobs_of_one_name_do_not_write_into_each_other(tmp_path):
    first = start(tmp_path, "--optim.epochs", "60")
    try:
        assert wait_until(lambda: (run_of(tmp_path) / "status.json").exists(), 60)
        second = start_beside(tmp_path)
        assert wait_until(second.ended, 60)
        assert second.codes() == [1, 1]
        assert re.search(
            r"error: \S+small is being written by another process \(process \d+ on \S+\): two runs would overwrite",
            (tmp_path / "second.txt").read_text(),
        )
        first.hit("rank 0", signal.SIGTERM)
    finally:
        end(first, tmp_path, 75)
    assert status(tmp_path)["attempt"] == 1


def start_beside(directory: Path):
    from support.jobs import ForkedJob
    from support.small_run import arguments

    return ForkedJob(arguments(directory), directory / "second.txt")


# Enough for the first steps on a busy machine; some hundred epochs take far longer.
@pytest.mark.parametrize("limit", ["run.max_minutes 0.3", "the time limit of the Slurm job"])
def test_a_time_limit_stops_the_run_before_it_is_over(tmp_path, limit):
    more, environ = (), {}
    if limit.startswith("run."):
        more = ("--run.max_minutes", "0.3")
    else:
        # A minute before it, as Slurm may be late or early by so much.
        environ = {"SLURM_JOB_END_TIME": str(int(time.time()) + 78), "SLURM_JOB_ID": "4711"}
    job = start(tmp_path, "--optim.epochs", "300", *more, **environ)
    said = end(job, tmp_path, 75, timeout=60)
    assert re.search(rf"stopped \({limit}\) at step \d+, which is saved", said), said
    assert status(tmp_path)["state"] == "preempted"


def test_divided_weights_and_several_blocks_go_on_bit_for_bit(tmp_path):
    """Below the last block dropout comes from torch's random numbers: those of a step, not of what came before."""
    more = ("--engine.backend", "fsdp", "--model.trainable_blocks", "2", "--optim.epochs", "1")
    finish(tmp_path / "whole", *more)
    stop(tmp_path / "cut", *more, at_step=30)
    assert status(tmp_path / "cut")["step"] == 30
    finish(tmp_path / "cut", *more)
    assert differences(run_of(tmp_path / "cut"), run_of(tmp_path / "whole")) == []


def test_a_job_that_starts_again_without_a_name_finds_its_run(whole, tmp_path):
    more, environ = ("--run.name", "null"), {"SLURM_JOB_ID": "4711"}
    job = start(tmp_path, *more, before=ARRANGE, AT_STEP="30", WHAT="vote", **environ)
    end(job, tmp_path, 75)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
    end(start(tmp_path, *more, **environ), tmp_path)
    assert [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == [run]
    assert differences(run, run_of(whole)) == []


def test_a_second_signal_ends_it_at_once_and_the_run_still_goes_on(whole, tmp_path):
    """The first is seen, but the loop is kept from acting on it."""
    job = start(tmp_path, before="support.faults:hang")
    try:
        assert wait_until(lambda: "hangs" in told(tmp_path), 60)
        job.hit("rank 1", signal.SIGTERM)
        assert not wait_until(job.ended, 3)
        job.hit("rank 1", signal.SIGTERM)
        job.hit("rank 0", signal.SIGTERM)
        assert wait_until(job.ended, 15), told(tmp_path)
    finally:
        job.kill()
    assert json.loads((run_of(tmp_path) / "status.json").read_text())["state"] in ("preempted", "failed", "running")
    finish(tmp_path)
    assert differences(run_of(tmp_path), run_of(whole)) == []
