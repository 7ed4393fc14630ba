"""Whether and where a run goes on: the checkpoint that is used, and what forbids it: other settings, data or weights.

A checkpoint is valid on any number of ranks and under every engine. What would make its next steps those of another training is
refused by name; what may be meant is accepted with --accept.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agnews_dist.errors import Done, UserError
from agnews_dist.run.status import read_status
from agnews_dist.training.checkpoint import Checkpoint, DamagedError, best_name, checkpoints, read_checkpoint

FOLDER = "checkpoints"
"""Where a run's directory has its checkpoints."""
ACCEPTABLE = (
    "optim.lr",
    "optim.epochs",
    "optim.weight_decay",
    "optim.warmup_ratio",
    "optim.schedule",
    "optim.max_grad_norm",
    "engine.precision",
    "engine.allow_tf32",
    "engine.fast_path",
    "engine.gradient_compression",
)
"""Settings that --accept lets differ: from here on the training is another one, on the same examples in the same order."""
IGNORED = {
    # Places: what they hold is compared by its fingerprint.
    "data.source",
    "data.revision",
    "model.name",
    "model.revision",
    # Nothing that the numbers depend on, but for the order of additions.
    "batch.max_tokens_per_rank",
    "batch.longest_first",
    "optim.nonfinite",
}
"""Settings that may differ without a word."""
WHAT_PRINTS_MEAN = {
    "tokens": "data (or data.max_length)",
    "tokenizer": "tokenizer",
    "frozen_weights": "frozen weights of the model",
}


@dataclass(frozen=True)
class ResumePoint:
    """Where to go on."""

    checkpoint: Checkpoint | None
    """None: the run began, but was stopped before its first checkpoint."""
    best: Checkpoint | None
    """The best epoch so far, with its weights and predictions."""
    is_own: bool
    """The run goes on in its own directory; else a new run starts from another one's checkpoint."""
    attempt: int
    """Starts of this run, this one included."""
    warnings: tuple[str, ...]


def look(
    directory: Path, *, resume: str, overwrite: bool, settings: Mapping[str, object], accept: Collection[str]
) -> ResumePoint | None:
    """What `checkpoint.resume` finds for the run in `directory`, whether or not that exists; None: start anew.

    Raises:
        Done: the run is finished, and nothing differs.
        UserError: a path without a checkpoint, or settings that differ from the checkpoint's.
    """
    if resume == "never":
        return None
    status = read_status(directory)
    attempt = status.attempt + 1 if status else 1
    if resume != "auto":
        checkpoint, best, warnings = _read_path(Path(resume).expanduser())
        is_own = checkpoint.path.resolve().parent == (directory / FOLDER).resolve()
        warnings += check_settings(checkpoint, settings, accept)
        return ResumePoint(checkpoint, best, is_own, attempt if is_own else 1, tuple(warnings))
    if status is None:
        return None
    checkpoint, best, warnings = read_newest_usable(directory / FOLDER)
    is_finished = status.state == "finished"
    if checkpoint is None:
        return None if is_finished else ResumePoint(None, None, True, attempt, tuple(warnings))
    found = differences(checkpoint.state["settings"], settings)
    if overwrite and (is_finished or found):
        return None
    warnings += check_settings(checkpoint, settings, accept)
    if is_finished and not found:
        raise Done(
            f"{directory} is finished ({status.step} steps): nothing is left to do. Its result is in result.json; "
            "--run.overwrite trains it again, a larger --optim.epochs goes on from its end."
        )
    return ResumePoint(checkpoint, best, True, attempt, tuple(warnings))


def wanted_later(directory: Path, job: str | None, resume: str, *, overwrite: bool) -> tuple[str, bool]:
    """(checkpoint.resume, run.overwrite) as a later start of `job` is to take them: they said what it was to begin from, and
    what it has done since goes on."""
    status = read_status(directory)
    if status is None or status.job != job:
        return resume, overwrite  # it was stopped before it began
    if resume in ("auto", "never") or checkpoints(directory / FOLDER):
        return "auto", False
    return resume, True  # stopped before its first checkpoint


def _read_path(path: Path) -> tuple[Checkpoint, Checkpoint | None, list[str]]:
    """The checkpoint at `path`, or the newest of the run at `path`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    for folder in (path / FOLDER, path):
        if checkpoints(folder):
            checkpoint, best, warnings = read_newest_usable(folder)
            if checkpoint is not None:
                return checkpoint, best, warnings
            raise DamagedError("; ".join(warnings))
    if not path.is_dir():
        raise UserError(
            f"checkpoint.resume {path}: no such directory, so there is nothing to go on from. Give the path of a checkpoint "
            "(runs/NAME/checkpoints/step-...) or of a run, or auto."
        )
    checkpoint = read_checkpoint(path)
    return checkpoint, _best_of(checkpoint), []


def read_newest_usable(folder: Path) -> tuple[Checkpoint | None, Checkpoint | None, list[str]]:
    """(the newest whole checkpoint, the best epoch that it refers to, a warning for each damaged one that was skipped)."""
    warnings: list[str] = []
    paths = checkpoints(folder)
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            return checkpoint, _best_of(checkpoint), warnings
        except DamagedError as error:
            instead = "there is none before it" if path == paths[-1] else "the one before it is used"
            warnings.append(f"{error} It is skipped, and {instead}.")
    return None, None, warnings


def _best_of(checkpoint: Checkpoint) -> Checkpoint | None:
    name = best_name(checkpoint.state)
    return read_checkpoint(checkpoint.path.with_name(name)) if name else None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (value in the checkpoint, value now), of those that matter."""
    keys = [key for key in {**saved, **now} if key not in IGNORED]
    return {key: (saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)}


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], accept: Collection[str]) -> list[str]:
    """Warnings of what differs and is accepted.

    Raises:
        UserError: something differs that was not accepted, or that cannot be.
    """
    warnings: list[str] = []
    refused: list[str] = []
    acceptable: list[str] = []
    for key, (saved, now) in differences(checkpoint.state["settings"], settings).items():
        line = f"{key} was {saved}, is {now}"
        if key == "optim.epochs" and now > saved:
            warnings.append(
                f"{line}: the learning rate follows the schedule of {now} epochs from here on, so the steps done until now had "
                "lower rates than in a run of that length."
            )
        elif key in accept:
            warnings.append(f"{line}, as accepted: from here on it is another training than the one that began.")
        else:
            refused.append(line)
            if key in ACCEPTABLE:
                acceptable.append(key)
    if refused:
        remedy = "Restore what was"
        if len(acceptable) == len(refused):
            remedy += f", go on all the same with --accept {','.join(acceptable)}"
        raise UserError(
            f"{checkpoint.path} cannot be continued ({'; '.join(refused)}): its next steps would be those of another training. "
            f"{remedy}, or start anew with --checkpoint.resume never and another --run.name (or --run.overwrite)."
        )
    return warnings


def check_prints(checkpoint: Checkpoint, prints: Mapping[str, str]) -> None:
    """Make sure that what does not train is what it was.

    Raises:
        UserError: other data, another tokenizer, or other frozen weights.
    """
    saved = checkpoint.state["fingerprints"]
    differing = [
        f"the {what} had the fingerprint {str(saved.get(name))[:12]}, now {prints[name][:12]}"
        for name, what in WHAT_PRINTS_MEAN.items()
        if saved.get(name) != prints[name]
    ]
    if differing:
        raise UserError(
            f"{checkpoint.path} cannot be continued: {'; '.join(differing)}: what trains has learnt on the former. Restore the "
            "files that were, or start anew with --checkpoint.resume never and another --run.name (or --run.overwrite)."
        )
