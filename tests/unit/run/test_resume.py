"""Whether a run goes on, from which checkpoint, and what forbids it: on real checkpoints, without a training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agnews_dist.config.schema import Config
from agnews_dist.errors import Done, UserError
from agnews_dist.run.attempt import accepted
from agnews_dist.run.fingerprints import settings
from agnews_dist.run.resume import ACCEPTABLE, IGNORED, check_prints, look, wanted_later
from agnews_dist.run.status import StatusFile
from agnews_dist.training.checkpoint import DamagedError, write_checkpoint

SETTINGS = {**settings(Config()), "engine.precision": "fp32"}
PRINTS = {"config": "c" * 64, "tokenizer": "t" * 64, "tokens": "d" * 64, "frozen_weights": "f" * 64}


def leave(run: Path, step: int, *, state: str = "preempted", best: int | None = None, scored: bool = False) -> Path:
    """A run that stands at `step`."""
    folder = run / "checkpoints"
    entry = None if best is None else {"name": f"best-{best:08d}", "epoch": 1}
    if best is not None:
        write_checkpoint(folder / f"best-{best:08d}", {"weights": {"w": torch.full((2,), float(best))}}, {})
    path = folder / f"step-{step:08d}{'-scored' if scored else ''}"
    content = {"step": step, "settings": SETTINGS, "fingerprints": PRINTS, "best": entry}
    write_checkpoint(path, {"weights": {"w": torch.full((2,), float(step))}}, content)
    StatusFile(run, attempt=2, step=step, job=None).write(state, "")  # pyright: ignore[reportArgumentType]
    return path


def found(run: Path, resume: str = "auto", *, overwrite: bool = False, accept: list[str] | None = None, **changed: Any):
    """`changed`: settings, with `__` for the dot."""
    now = {**SETTINGS, **{key.replace("__", "."): value for key, value in changed.items()}}
    return look(run, resume=resume, overwrite=overwrite, settings=now, accept=accept or [])


def damage(path: Path) -> None:
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_nothing_is_found_where_nothing_is_or_if_it_is_not_wanted(tmp_path):
    assert found(tmp_path / "run") is None
    leave(tmp_path / "run", 40)
    assert found(tmp_path / "run", "never") is None


def test_the_newest_whole_checkpoint_is_found_with_its_best_epoch(tmp_path):
    leave(tmp_path / "run", 40, best=30)
    newest = leave(tmp_path / "run", 50, best=30, scored=True)
    here = found(tmp_path / "run")
    assert here is not None
    assert (here.checkpoint.path, here.attempt, here.is_own, here.warnings) == (newest, 3, True, ())
    assert here.best.tensors["weights"]["w"].tolist() == [30.0, 30.0]
    damage(newest)
    here = found(tmp_path / "run")
    assert here.checkpoint.state["step"] == 40
    (warning,) = here.warnings
    assert warning.startswith(f"{newest} is damaged (weights.safetensors")
    assert warning.endswith("It is skipped, and the one before it is used.")


def test_a_checkpoint_without_its_best_epoch_is_damaged_too(tmp_path):
    leave(tmp_path / "run", 40)
    leave(tmp_path / "run", 50, best=45)
    damage(tmp_path / "run" / "checkpoints" / "best-00000045")
    assert found(tmp_path / "run").checkpoint.state["step"] == 40


def test_a_run_without_a_whole_checkpoint_starts_from_its_beginning_and_says_so(tmp_path):
    path = leave(tmp_path / "run", 40)
    damage(path)
    here = found(tmp_path / "run")
    assert (here.checkpoint, here.is_own, here.attempt) == (None, True, 3)
    assert here.warnings[0].endswith("It is skipped, and there is none before it.")


REFUSED = {
    "data.limit_train": 10,
    "data.max_length": 64,
    "data.pad_token": "eos",
    "data.seed": 3,
    "data.validation_fraction": 0.3,
    "model.trainable_blocks": 2,
    "model.init": "random",
    "batch.global_batch_size": 8,
    "batch.global_token_budget": 512,
    "batch.bucket_window": 1,
    "run.seed": 1,
    **{
        "optim.lr": 1e-5,
        "optim.epochs": 2,
        "optim.weight_decay": 0.5,
        "optim.warmup_ratio": 0.5,
        "optim.schedule": "cosine",
    },
    **{"optim.max_grad_norm": 9.0, "engine.precision": "bf16", "engine.allow_tf32": False, "engine.fast_path": False},
    "engine.gradient_compression": "bf16",
}


def test_every_setting_is_refused_or_silent():
    """A new setting must be given its place."""
    assert {*REFUSED, *IGNORED, "data.limit_validation", "data.limit_test"} == {*SETTINGS}
    assert set(ACCEPTABLE) < set(REFUSED)
    assert all(SETTINGS[key] != value for key, value in REFUSED.items()), "a difference that is none tests nothing"


@pytest.mark.parametrize("key", REFUSED)
def test_another_training_is_refused_by_the_name_of_the_setting_with_both_values(tmp_path, key):
    path = leave(tmp_path / "run", 40)
    change = {key.replace(".", "__"): REFUSED[key]}
    with pytest.raises(UserError) as raised:
        found(tmp_path / "run", **change)
    message = str(raised.value)
    assert message.startswith(f"{path} cannot be continued ({key} was {SETTINGS[key]}, is {REFUSED[key]}): ")
    assert (f"--accept {key}, or start anew" in message) == (key in ACCEPTABLE)
    if key in ACCEPTABLE:
        (warning,) = found(tmp_path / "run", accept=accepted(key), **change).warnings
        assert warning.startswith(f"{key} was {SETTINGS[key]}, is {REFUSED[key]}, as accepted")
    else:
        with pytest.raises(UserError, match=rf"--accept {key}: with another value the steps would not be those"):
            accepted(key)


@pytest.mark.parametrize(
    ("job", "resume", "overwrite", "has_saved", "wanted"),
    [
        # What the job has done since goes on, whatever it was to begin from.
        ("slurm 7", "never", True, True, ("auto", False)),
        ("slurm 7", "never", False, False, ("auto", False)),
        ("slurm 7", "runs/other", False, True, ("auto", False)),
        # Stopped before its first checkpoint: from that path once more, and nothing is lost.
        ("slurm 7", "runs/other", False, False, ("runs/other", True)),
        # Another job's run, which this one was to replace before it was stopped.
        ("slurm 8", "never", True, True, ("never", True)),
        (None, "never", False, True, ("never", False)),
    ],
)
def test_a_later_start_of_a_job_goes_on_with_what_it_has_begun(tmp_path, job, resume, overwrite, has_saved, wanted):
    run = tmp_path / "run"
    run.mkdir()
    if has_saved:
        leave(run, 40)
    StatusFile(run, attempt=1, step=0, job="slurm 7").write("preempted", "")
    assert wanted_later(run, job, resume, overwrite=overwrite) == wanted
    assert wanted_later(tmp_path / "none", job, resume, overwrite=overwrite) == (resume, overwrite)


def test_several_differences_are_told_at_once_and_accepted_at_once(tmp_path):
    leave(tmp_path / "run", 40)
    change = {"optim__lr": 1.0, "optim__schedule": "cosine"}
    with pytest.raises(UserError, match=r"\(optim.lr was .*; optim.schedule was .*--accept optim.lr,optim.schedule"):
        found(tmp_path / "run", **change)
    assert len(found(tmp_path / "run", accept=accepted("optim.lr, optim.schedule"), **change).warnings) == 2
    with pytest.raises(UserError, match=r"run.seed was 0, is 1") as raised:
        found(tmp_path / "run", accept=["optim.lr", "optim.schedule"], run__seed=1, **change)
    assert "--accept" not in str(raised.value)


def test_where_it_computes_and_where_its_data_lies_may_differ_silently(tmp_path):
    leave(tmp_path / "run", 40)
    change = {key.replace(".", "__"): "other" for key in IGNORED}
    assert found(tmp_path / "run", **change).warnings == ()


def test_more_epochs_are_accepted_and_their_learning_rates_told(tmp_path):
    epochs = Config().optim.epochs
    for state in ("preempted", "finished"):
        leave(tmp_path / "run", 40, state=state)
        (warning,) = found(tmp_path / "run", optim__epochs=epochs + 2).warnings
        assert (
            f"optim.epochs was {epochs}, is {epochs + 2}: the learning rate follows the schedule of {epochs + 2}"
            in warning
        )


def test_a_finished_run_is_done_unless_it_is_to_be_replaced(tmp_path):
    leave(tmp_path / "run", 40, state="finished")
    with pytest.raises(Done, match=r"run is finished \(40 steps\): nothing is left to do.*--run.overwrite") as raised:
        found(tmp_path / "run")
    assert raised.value.exit_code == 0
    assert found(tmp_path / "run", overwrite=True) is None
    with pytest.raises(UserError, match=r"run.seed was 0, is 1"):
        found(tmp_path / "run", run__seed=1)


def test_overwriting_goes_on_with_an_unfinished_run_only_if_it_is_the_same(tmp_path):
    """A job that is started again by its scheduler with --run.overwrite must not begin from nothing each time."""
    leave(tmp_path / "run", 40)
    assert found(tmp_path / "run", overwrite=True).checkpoint.state["step"] == 40
    assert found(tmp_path / "run", overwrite=True, run__seed=1) is None


def test_a_path_is_a_checkpoint_or_a_run(tmp_path):
    older = leave(tmp_path / "run", 40)
    leave(tmp_path / "run", 50)
    own = found(tmp_path / "run", str(older))
    assert (own.checkpoint.path, own.is_own, own.attempt) == (older, True, 3)
    other = found(tmp_path / "other", str(tmp_path / "run"))
    assert (other.checkpoint.state["step"], other.is_own, other.attempt) == (50, False, 1)
    with pytest.raises(UserError, match=r"nowhere: no such directory, so there is nothing to go on from"):
        found(tmp_path / "run", str(tmp_path / "nowhere"))
    damage(older)
    with pytest.raises(DamagedError, match=r"weights.safetensors"):
        found(tmp_path / "run", str(older))
    with pytest.raises(UserError, match=r"run.seed was 0, is 1"):
        found(tmp_path / "other", str(tmp_path / "run"), run__seed=1)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tokens", r"data \(or data.max_length\)"),
        ("tokenizer", "tokenizer"),
        ("frozen_weights", "frozen weights of the model"),
    ],
)
def test_other_data_and_weights_are_refused_by_what_they_are(tmp_path, name, what):
    leave(tmp_path / "run", 40)
    checkpoint = found(tmp_path / "run").checkpoint
    check_prints(checkpoint, PRINTS)
    check_prints(checkpoint, {**PRINTS, "config": "0" * 64})
    with pytest.raises(UserError, match=rf"cannot be continued: the {what} had the fingerprint \w{{12}}, now 0{{12}}"):
        check_prints(checkpoint, {**PRINTS, name: "0" * 64})
    old = replace(checkpoint, state={**checkpoint.state, "fingerprints": {}})
    with pytest.raises(UserError, match="had the fingerprint None"):
        check_prints(old, PRINTS)
