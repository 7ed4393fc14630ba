"""The run's directory: named, checked and claimed before any work, so that no result is lost or overwritten by accident."""

import shutil
import tempfile
from datetime import datetime
from pathlib import Path

from agnews_dist.errors import UserError

# What a run writes first; its presence tells a run's directory from anything else that must not be deleted.
MARK = "config.yaml"


def run_name(name: str | None, model_name: str, now: datetime) -> str:
    """`name`, or one made from the model and the time: `gpt2-20260131-235959`.

    Raises:
        UserError: the name would leave the directory of runs.
    """
    if name is None:
        return f"{Path(model_name).name or 'run'}-{now:%Y%m%d-%H%M%S}"
    if not name or Path(name).name != name or name in {".", ".."}:
        raise UserError(
            f"run.name {name!r} is no plain directory name: the run would be written outside run.dir. Use letters, digits, "
            "'-', '_' and '.', and set --run.dir for the place."
        )
    return name


def claim(runs: Path, name: str, *, overwrite: bool, config_yaml: str) -> Path:
    """Create `runs/name` with the resolved config in it.

    Raises:
        UserError: it exists and `overwrite` is not set, it is no run's directory, or it cannot be written.
    """
    directory = runs / name
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            if not overwrite:
                raise UserError(
                    f"{directory} exists: its results would be lost. Choose another --run.name, or pass --run.overwrite true."
                )
            if not (directory / MARK).is_file():
                raise UserError(
                    f"{directory} holds no {MARK}: it is not a run's directory, so run.overwrite does not delete it. Choose "
                    "another --run.name, or remove it yourself."
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell (root, read-only mounts, quotas): only a write does.
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"0")
        (directory / MARK).write_text(config_yaml, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}): the run would have nowhere to leave its results. "
            "Set --run.dir to a writable directory."
        ) from error
    return directory
