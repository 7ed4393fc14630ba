"""The checkpoint that a start resumes from, and the differences that forbid it: on real checkpoints, without training."""

import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.settings import errors_of

from agnews_dist.commands.command import TRAINING_OPTIONS
from agnews_dist.config.fields import Setting, all_settings, choices_of, convert, format_value
from agnews_dist.config.schema import Config, OptimConfig
from agnews_dist.errors import AlreadyFinished, UserError
from agnews_dist.run import resume
from agnews_dist.run.fingerprints import setting_values, weight_settings
from agnews_dist.run.resume import ResumePoint, check_fingerprints, find_resume_point, settings_after_restart
from agnews_dist.run.status import StatusFile
from agnews_dist.training.checkpoint import DamagedError, UnreadableError, write_checkpoint

SETTINGS = {**weight_settings(Config()), "engine.precision": "fp32"}
FINGERPRINTS = {"config": "c" * 64, "tokenizer": "t" * 64, "tokens": "d" * 64, "frozen_weights": "f" * 64}


def leave(run: Path, step: int, *, state: str = "preempted", best: int | None = None, scored: bool = False) -> Path:
    """Leave a run with a checkpoint of `step`; return the checkpoint."""
    folder = run / "checkpoints"
    entry = None if best is None else {"name": f"best-{best:08d}", "epoch": 1}
    if best is not None:
        write_checkpoint(folder / f"best-{best:08d}", {"weights": {"w": torch.full((2,), float(best))}}, {})
    path = folder / f"step-{step:08d}{'-scored' if scored else ''}"
    content = {"step": step, "settings": SETTINGS, "fingerprints": FINGERPRINTS, "best": entry}
    write_checkpoint(path, {"weights": {"w": torch.full((2,), float(step))}}, content)
    StatusFile(lambda: run, attempt=2, step=step, job=None).write(state, "")
    return path


def find(
    run: Path, resume: str = "auto", *, overwrite: bool = False, accept: list[str] | None = None, **changed: Any
) -> ResumePoint:
    """Find the point to resume from. `changed`: settings that differ, with `__` for the dot."""
    point = find_or_none(run, resume, overwrite=overwrite, accept=accept, **changed)
    assert point is not None
    return point


def find_or_none(
    run: Path, resume: str = "auto", *, overwrite: bool = False, accept: list[str] | None = None, **changed: Any
) -> ResumePoint | None:
    """Find the point to resume from, if there is one."""
    now = {**SETTINGS, **{key.replace("__", "."): value for key, value in changed.items()}}
    return find_resume_point(run, resume=resume, overwrite=overwrite, settings=now, accept=accept or [])


def damage(path: Path) -> None:
    """Replace the last byte of a checkpoint's weights."""
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_no_resume_point_without_a_run_or_under_never(tmp_path):
    assert find_or_none(tmp_path / "run") is None
    leave(tmp_path / "run", 40)
    assert find_or_none(tmp_path / "run", "never") is None


def test_newest_undamaged_checkpoint_is_found_with_its_best_epoch(tmp_path):
    leave(tmp_path / "run", 40, best=30)
    newest = leave(tmp_path / "run", 50, best=30, scored=True)
    point = find(tmp_path / "run")
    assert (point.checkpoint.path, point.attempt, point.is_own, point.warnings) == (newest, 3, True, ())
    assert point.best.tensors["weights"]["w"].tolist() == [30.0, 30.0]
    damage(newest)
    point = find(tmp_path / "run")
    assert point.checkpoint.state["step"] == 40
    (warning,) = point.warnings
    assert warning.startswith(f"{newest} is damaged (weights.safetensors")
    assert warning.endswith("It is skipped; the one before it is used.")


def test_checkpoint_without_its_best_epoch_counts_as_damaged(tmp_path):
    leave(tmp_path / "run", 40)
    leave(tmp_path / "run", 50, best=45)
    damage(tmp_path / "run" / "checkpoints" / "best-00000045")
    assert find(tmp_path / "run").checkpoint.state["step"] == 40


def test_run_with_only_damaged_checkpoints_starts_from_the_beginning_with_a_warning(tmp_path):
    path = leave(tmp_path / "run", 40)
    damage(path)
    point = find(tmp_path / "run")
    assert (point.checkpoint, point.is_own, point.attempt) == (None, True, 3)
    assert point.warnings[0].endswith("It is skipped; no earlier one exists.")


COMPARED = {key: setting for key, setting in all_settings().items() if setting.resume != "ignored"}
ACCEPTABLE = {key for key, setting in COMPARED.items() if setting.resume == "may be accepted"}


def another_value(setting: Setting) -> Any:
    """Return a value of the setting that is not its default."""
    choices = choices_of(setting.type)
    texts = [*choices, "true", "false", "0.25", "7"]
    return next(value for text in texts if (value := try_convert(setting.type, text)) not in (None, setting.default))


def try_convert(type_: Any, text: str) -> Any:
    """Convert a text; None if the type does not admit it."""
    try:
        return convert(type_, text)
    except ValueError:
        return None


REFUSED = {key: another_value(setting) for key, setting in COMPARED.items()} | {"optim.epochs": 2}


def test_settings_of_the_schema_are_compared():
    assert {*COMPARED} < {*SETTINGS}
    always = {"data.max_length", "data.limit_train", "model.trainable_blocks", "batch.global_batch_size", "run.seed"}
    assert always <= {*COMPARED} - ACCEPTABLE
    assert {"optim.lr", "optim.epochs", "engine.precision"} <= ACCEPTABLE
    assert all(SETTINGS[key] != value for key, value in REFUSED.items()), "each value must differ from the default"


@pytest.mark.parametrize("key", REFUSED)
def test_differing_setting_is_refused_by_name_with_both_values(tmp_path, key):
    path = leave(tmp_path / "run", 40)
    change = {key.replace(".", "__"): REFUSED[key]}
    with pytest.raises(UserError) as raised:
        find(tmp_path / "run", **change)
    message = str(raised.value)
    assert message.startswith(
        f"{path} cannot be continued ({key} was {format_value(SETTINGS[key])}, is {format_value(REFUSED[key])}): "
    )
    assert (f"continue with --accept {key}, or train from the start" in message) == (key in ACCEPTABLE)
    if key in ACCEPTABLE:
        (warning,) = find(tmp_path / "run", accept=[key], **change).warnings
        assert warning.startswith(f"{key} was {format_value(SETTINGS[key])}, is {format_value(REFUSED[key])}, as accepted")
    else:
        (line,) = errors_of(["--accept", key], TRAINING_OPTIONS)
        assert line.startswith(f"--accept '{key}': it takes a list a,b,... of model.dropout, optim.lr, ")


@pytest.mark.parametrize(
    ("job", "resume", "overwrite", "has_saved", "expected"),
    [
        # The job continues what it has done itself, whatever it was to begin from.
        ("slurm 7", "never", True, True, ("auto", False)),
        ("slurm 7", "never", False, False, ("auto", False)),
        ("slurm 7", "runs/other", False, True, ("auto", False)),
        # Stopped before its first checkpoint: resume from that path once more, and no progress is lost.
        ("slurm 7", "runs/other", False, False, ("runs/other", True)),
        # The run of another job, which this one was to replace before it was stopped.
        ("slurm 8", "never", True, True, ("never", True)),
        (None, "never", False, True, ("never", False)),
    ],
)
def test_settings_after_restart_keep_the_progress_of_the_job(tmp_path, job, resume, overwrite, has_saved, expected):
    run = tmp_path / "run"
    run.mkdir()
    if has_saved:
        leave(run, 40)
    StatusFile(lambda: run, attempt=1, step=0, job="slurm 7").write("preempted", "")
    assert settings_after_restart(run, job, resume, overwrite=overwrite) == expected
    assert settings_after_restart(tmp_path / "none", job, resume, overwrite=overwrite) == (resume, overwrite)


def test_several_differences_are_reported_and_accepted_together(tmp_path):
    leave(tmp_path / "run", 40)
    change = {"optim__lr": 1.0, "optim__schedule": "cosine"}
    with pytest.raises(UserError, match=r"\(optim.lr was .*; optim.schedule was .*--accept optim.lr,optim.schedule"):
        find(tmp_path / "run", **change)
    assert len(find(tmp_path / "run", accept=["optim.lr", "optim.schedule"], **change).warnings) == 2
    with pytest.raises(UserError, match=r"run.seed was 0, is 1") as raised:
        find(tmp_path / "run", accept=["optim.lr", "optim.schedule"], run__seed=1, **change)
    assert "--accept" not in str(raised.value)


def test_ignored_settings_may_differ_without_a_warning(tmp_path):
    leave(tmp_path / "run", 40)
    change = {key.replace(".", "__"): "other" for key, setting in all_settings().items() if setting.resume == "ignored"}
    assert "data__source" in change
    assert find(tmp_path / "run", **change).warnings == ()


def test_list_read_back_from_a_checkpoint_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SETTINGS", {**SETTINGS, "optim.betas": [0.9, 0.999]})
    leave(tmp_path / "run", 40)
    assert find(tmp_path / "run").warnings == ()
    with pytest.raises(UserError, match=r"optim.betas was \[0.9, 0.999\], is \[0.8, 0.999\]"):
        find(tmp_path / "run", optim__betas=[0.8, 0.999])


def test_setting_newer_than_the_checkpoint_had_its_default(tmp_path, monkeypatch):
    old = {key: value for key, value in SETTINGS.items() if key != "optim.max_grad_norm"}
    monkeypatch.setitem(globals(), "SETTINGS", old)
    leave(tmp_path / "run", 40)
    default = Config().optim.max_grad_norm
    assert find(tmp_path / "run", optim__max_grad_norm=default).warnings == ()
    with pytest.raises(UserError, match=rf"optim.max_grad_norm was {default}, is 9.0"):
        find(tmp_path / "run", optim__max_grad_norm=9.0)


def test_more_epochs_are_accepted_with_a_warning_about_the_learning_rate(tmp_path):
    epochs = Config().optim.epochs
    for state in ("preempted", "finished"):
        leave(tmp_path / "run", 40, state=state)
        (warning,) = find(tmp_path / "run", optim__epochs=epochs + 2).warnings
        assert (
            f"optim.epochs was {epochs}, is {epochs + 2}: the learning rate now follows the schedule of {epochs + 2}" in warning
        )


def test_more_steps_are_accepted_with_a_warning_and_fewer_or_none_are_not(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SETTINGS", {**SETTINGS, "optim.max_steps": 50})
    leave(tmp_path / "run", 40)
    (warning,) = find(tmp_path / "run", optim__max_steps=80).warnings
    assert "optim.max_steps was 50, is 80: the learning rate now follows the schedule of 80 steps" in warning
    for value in (45, None):
        with pytest.raises(UserError, match=r"optim.max_steps was 50, is \w+\).*--accept optim.max_steps"):
            find(tmp_path / "run", optim__max_steps=value)
    assert find(tmp_path / "run", optim__epochs=1).warnings == (), "max_steps decides, so epochs have no effect"


def test_larger_patience_continues_a_run_that_stopped_early(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SETTINGS", {**SETTINGS, "optim.patience": 3})
    leave(tmp_path / "run", 40, state="finished")
    for value in (4, None):
        found = find(tmp_path / "run", optim__patience=value)
        assert (found.step, found.warnings) == (40, ()), "the steps so far are the same"
    with pytest.raises(UserError, match=r"optim.patience was 3, is 2\).*--accept optim.patience"):
        find(tmp_path / "run", optim__patience=2)


def test_class_weights_read_back_from_a_checkpoint_are_the_same(tmp_path, monkeypatch):
    saved = setting_values(Config(optim=OptimConfig(class_weights=(1.0, 2.5))))["optim.class_weights"]
    monkeypatch.setitem(globals(), "SETTINGS", {**SETTINGS, "optim.class_weights": saved})
    leave(tmp_path / "run", 40)
    assert find(tmp_path / "run").warnings == ()
    with pytest.raises(UserError, match=r"optim.class_weights was \[1.0, 2.5\], is none"):
        find(tmp_path / "run", optim__class_weights="none")


def test_finished_run_is_done_unless_it_is_overwritten(tmp_path):
    leave(tmp_path / "run", 40, state="finished")
    with pytest.raises(
        AlreadyFinished, match=r"run is finished \(40 steps\): nothing is left to do.*--run.overwrite"
    ) as raised:
        find(tmp_path / "run")
    assert raised.value.exit_code == 0
    assert find_or_none(tmp_path / "run", overwrite=True) is None
    with pytest.raises(UserError, match=r"run.seed was 0, is 1"):
        find(tmp_path / "run", run__seed=1)


def test_overwrite_continues_an_unfinished_run_with_the_same_settings(tmp_path):
    # A scheduler restarts a job with the same --run.overwrite: that must not lose the progress each time.
    leave(tmp_path / "run", 40)
    assert find(tmp_path / "run", overwrite=True).checkpoint.state["step"] == 40
    assert find_or_none(tmp_path / "run", overwrite=True, run__seed=1) is None


def test_resume_path_is_a_checkpoint_or_a_run(tmp_path):
    older = leave(tmp_path / "run", 40)
    leave(tmp_path / "run", 50)
    own = find(tmp_path / "run", str(older))
    assert (own.checkpoint.path, own.is_own, own.attempt) == (older, True, 3)
    other = find(tmp_path / "other", str(tmp_path / "run"))
    assert (other.checkpoint.state["step"], other.is_own, other.attempt) == (50, False, 1)
    with pytest.raises(UserError, match=r"checkpoint\.resume .*nowhere: no such directory\. Give the path"):
        find(tmp_path / "run", str(tmp_path / "nowhere"))
    damage(older)
    with pytest.raises(DamagedError, match=r"weights.safetensors"):
        find(tmp_path / "run", str(older))
    with pytest.raises(UserError, match=r"run.seed was 0, is 1"):
        find(tmp_path / "other", str(tmp_path / "run"), run__seed=1)


def test_checkpoint_that_cannot_be_read_now_is_neither_skipped_nor_removed(tmp_path, monkeypatch):
    leave(tmp_path / "run", 40)
    newest = leave(tmp_path / "run", 50)
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == newest / "weights.safetensors":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(resume, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UnreadableError, match=r"step-00000050 may be whole \(weights.safetensors cannot be read, Stale"):
        find(tmp_path / "run")
    # It is found once the file system gives it.
    begin = time.monotonic()
    monkeypatch.setattr(resume, "RETRY_SECONDS", 30.0)
    monkeypatch.setattr(Path, "read_bytes", lambda path: fail(path) if time.monotonic() < begin + 0.5 else read(path))
    assert find(tmp_path / "run").step == 50


@pytest.mark.parametrize(
    ("name", "what"),
    [("tokens", r"data \(or data.max_length\)"), ("tokenizer", "tokenizer"), ("frozen_weights", "frozen weights of the model")],
)
def test_check_fingerprints_refuses_other_data_and_weights_by_name(tmp_path, name, what):
    leave(tmp_path / "run", 40)
    checkpoint = find(tmp_path / "run").checkpoint
    check_fingerprints(checkpoint, FINGERPRINTS)
    check_fingerprints(checkpoint, {**FINGERPRINTS, "config": "0" * 64})
    with pytest.raises(UserError, match=rf"cannot be continued \(the {what} had the fingerprint \w{{12}}, now 0{{12}}"):
        check_fingerprints(checkpoint, {**FINGERPRINTS, name: "0" * 64})
    old = replace(checkpoint, state={**checkpoint.state, "fingerprints": {}})
    with pytest.raises(UserError, match="had the fingerprint None"):
        check_fingerprints(old, FINGERPRINTS)
