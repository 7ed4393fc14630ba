"""Resuming: the checkpoint that a start continues from, and the differences that forbid it (settings, data, weights).

A checkpoint is valid on any number of ranks and under every engine. A difference that would change its next steps is
refused by name. Some differences may be intended: `--accept` allows those.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agnews_dist.config.fields import all_settings, format_value
from agnews_dist.distributed.world import print_line
from agnews_dist.errors import AlreadyFinished, UserError
from agnews_dist.run.status import read_status
from agnews_dist.training.checkpoint import (
    Checkpoint,
    DamagedError,
    Groups,
    UnreadableError,
    best_name,
    list_checkpoints,
    read_checkpoint,
)
from agnews_dist.training.checkpoint_manager import OnDisk

FOLDER = "checkpoints"
"""Name of the folder of checkpoints in a run's directory."""
FINGERPRINT_NAMES = {
    "tokens": "data (or data.max_length)",
    "tokenizer": "tokenizer",
    "frozen_weights": "frozen weights of the model",
}
LENGTHS = {"optim.epochs": "epochs", "optim.max_steps": "steps"}
"""Setting -> unit of the length of a run. A larger one continues it."""
RETRY_SECONDS = 30.0
"""Time for the file system to give a checkpoint: a server that was restarted, a mounted bucket that still uploads."""
RESTART_REMEDY = "or train from the start with --checkpoint.resume never and another --run.name (or --run.overwrite)"


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a start continues from."""

    checkpoint: Checkpoint | None
    """None: the run began, but was stopped before its first checkpoint."""
    best: Checkpoint | None
    """The best weights so far, with their predictions."""
    is_own: bool
    """True: the run continues in its own directory. False: a new run starts from another run's checkpoint."""
    attempt: int
    """Number of starts of this run, including this one."""
    warnings: tuple[str, ...]

    @property
    def step(self) -> int:
        """Steps done before this start."""
        return self.checkpoint.state["step"] if self.checkpoint else 0

    @property
    def on_disk(self) -> OnDisk | None:
        """The checkpoint as the run's own manager finds it; None: the folder holds none of this run."""
        if self.checkpoint is None or not self.is_own:
            return None
        return OnDisk(self.checkpoint.path.name, self.step, best_name(self.checkpoint.state))

    @property
    def tensors(self) -> tuple[Groups, Groups]:
        """Groups of tensors of the checkpoint and of its best weights."""
        return (self.checkpoint.tensors if self.checkpoint else {}, self.best.tensors if self.best else {})


def find_resume_point(
    directory: Path, *, resume: str, overwrite: bool, settings: Mapping[str, object], accept: Collection[str]
) -> ResumePoint | None:
    """Find the checkpoint that `checkpoint.resume` means for the run in `directory`; None: it starts from the beginning.

    Raises:
        AlreadyFinished: the run is finished, and no setting differs.
        UserError: a path without a checkpoint, or settings that differ from the checkpoint's.
    """
    if resume == "never":
        return None
    status = read_status(directory)
    attempt = status.attempt + 1 if status else 1
    if resume != "auto":
        checkpoint, best, warnings = _read_path(Path(resume))
        is_own = checkpoint.path.resolve().parent == (directory / FOLDER).resolve()
        warnings += check_settings(checkpoint, settings, accept)
        return ResumePoint(checkpoint, best, is_own, attempt if is_own else 1, tuple(warnings))
    if status is None:
        return None
    checkpoint, best, warnings = read_newest_usable(directory / FOLDER)
    is_finished = status.state == "finished"
    if checkpoint is None:
        return None if is_finished else ResumePoint(None, None, True, attempt, tuple(warnings))
    differing = differing_settings(checkpoint.state["settings"], settings)
    if overwrite and (is_finished or differing):
        return None
    warnings += check_settings(checkpoint, settings, accept)
    if is_finished and not differing:
        raise AlreadyFinished(
            f"{directory} is finished ({status.step} steps): nothing is left to do. Read its result.json; train it again with "
            "--run.overwrite, or longer: more optim.epochs, max_steps or patience."
        )
    return ResumePoint(checkpoint, best, True, attempt, tuple(warnings))


def settings_after_restart(directory: Path, job: str | None, resume: str, *, overwrite: bool) -> tuple[str, bool]:
    """Return (checkpoint.resume, run.overwrite) for a restart of `job`: keep the job's own progress.

    The values given apply to the job's first start. A later start continues what the first one did.
    """
    status = read_status(directory)
    if status is None or status.job != job:
        return resume, overwrite  # stopped before the run began
    if resume in ("auto", "never") or list_checkpoints(directory / FOLDER):
        return "auto", False
    return resume, True  # stopped before its first checkpoint


def _read_path(path: Path) -> tuple[Checkpoint, Checkpoint | None, list[str]]:
    """Read the checkpoint at `path`, or the newest one of the run at `path`."""
    for folder in (path / FOLDER, path):
        if list_checkpoints(folder):
            checkpoint, best, warnings = read_newest_usable(folder)
            if checkpoint is not None:
                return checkpoint, best, warnings
            raise DamagedError("; ".join(warnings))
    if not path.is_dir():
        raise UserError(
            f"checkpoint.resume {path}: no such directory. Give the path of a checkpoint (runs/NAME/checkpoints/step-...) or "
            "of a run, or auto."
        )
    checkpoint = _read_patiently(path)
    return checkpoint, _read_best(checkpoint), []


def read_newest_usable(folder: Path) -> tuple[Checkpoint | None, Checkpoint | None, list[str]]:
    """Read the newest undamaged checkpoint in `folder` and its best weights, with a warning per damaged one skipped."""
    warnings: list[str] = []
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            checkpoint = _read_patiently(path)
            return checkpoint, _read_best(checkpoint), warnings
        except DamagedError as error:
            instead = "no earlier one exists" if path == paths[-1] else "the one before it is used"
            warnings.append(f"{error} It is skipped; {instead}.")
    return None, None, warnings


def _read_best(checkpoint: Checkpoint) -> Checkpoint | None:
    name = best_name(checkpoint.state)
    return _read_patiently(checkpoint.path.with_name(name)) if name else None


def _read_patiently(path: Path) -> Checkpoint:
    """Read a checkpoint. What the file system does not give at once is tried again for RETRY_SECONDS."""
    deadline, is_announced = time.monotonic() + RETRY_SECONDS, False
    while True:
        try:
            return read_checkpoint(path)
        except UnreadableError as error:
            if time.monotonic() > deadline:
                raise
            if not is_announced:
                print_line(f"waits for a checkpoint, at most {RETRY_SECONDS:.0f} s: {error}")
                is_announced = True
            time.sleep(min(1.0, RETRY_SECONDS))


def differing_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return setting -> (value in the checkpoint, value now) for those that matter and differ.

    A setting that is newer than the checkpoint had its default.
    """
    known = all_settings()
    keys = [key for key in {**saved, **now} if key not in known or known[key].resume != "ignored"]
    then = {key: list(each.default) if isinstance(each.default, tuple) else each.default for key, each in known.items()}
    then |= saved
    found = {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
    if then.get("optim.max_steps") is not None and now.get("optim.max_steps") is not None:
        found.pop("optim.epochs", None)  # without effect
    return found


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], accept: Collection[str]) -> list[str]:
    """Return warnings about settings that differ and are accepted.

    Raises:
        UserError: a setting differs that was not accepted, or cannot be.
    """
    warnings: list[str] = []
    refused: dict[str, str] = {}
    for key, (saved, now) in differing_settings(checkpoint.state["settings"], settings).items():
        if key == "optim.patience" and saved is not None and (now is None or now > saved):
            continue  # the steps so far are those of a run with this patience
        line = f"{key} was {format_value(saved)}, is {format_value(now)}"
        if key in LENGTHS and None not in (saved, now) and now > saved:
            warnings.append(
                f"{line}: the learning rate now follows the schedule of {now} {LENGTHS[key]}. The steps done so far had lower "
                "rates than in a run of that length."
            )
        elif key in accept:
            warnings.append(f"{line}, as accepted: from here on this is a different training.")
        else:
            refused[key] = line
    if refused:
        remedy = "Restore these settings, "
        if all(key in all_settings() and all_settings()[key].resume == "may be accepted" for key in refused):
            remedy += f"continue with --accept {','.join(refused)}, "
        raise UserError(
            f"{checkpoint.path} cannot be continued ({'; '.join(refused.values())}): the next steps would differ. "
            f"{remedy}{RESTART_REMEDY}."
        )
    return warnings


def check_fingerprints(checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
    """Check that data, tokenizer and frozen weights are unchanged."""
    saved = checkpoint.state["fingerprints"]
    differing = [
        f"the {what} had the fingerprint {str(saved.get(name))[:12]}, now {fingerprints[name][:12]}"
        for name, what in FINGERPRINT_NAMES.items()
        if saved.get(name) != fingerprints[name]
    ]
    if differing:
        raise UserError(
            f"{checkpoint.path} cannot be continued ({'; '.join(differing)}): its weights were fitted to the old files. "
            f"Restore them, {RESTART_REMEDY}."
        )
