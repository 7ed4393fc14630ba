"""A training of some seconds, on text and a model made on the spot, and what it leaves that must not depend on its fate."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.jobs import NUM_RANKS, ForkedJob, wait_until
from support.timeline import Timeline

EPOCHS, TIMEOUT = 3, 10
SIZES = {"train": 1200, "validation": 300, "test": 300}
GLOBAL_BATCH = 16
EPOCH_STEPS = SIZES["train"] // GLOBAL_BATCH
NUM_STEPS = EPOCHS * EPOCH_STEPS


def arguments(directory: Path, *more: str) -> list[str]:
    """Of the run in `directory`/runs/small; what is in `more` wins."""
    limits = [word for split, size in SIZES.items() for word in (f"--data.limit_{split}", str(size))]
    return [
        *("--data.source", "synthetic", "--model.name", "embedded", *limits, "--optim.epochs", str(EPOCHS)),
        *("--run.dir", str(directory / "runs"), "--run.name", "small", "--data.cache_dir", str(directory / "cache")),
        *("--batch.global_batch_size", str(GLOBAL_BATCH), "--checkpoint.every_steps", "7", "--optim.lr", "2e-3"),
        *("--engine.timeout_seconds", str(TIMEOUT), *more),
    ]


def start(directory: Path, *more: str, num_ranks: int = NUM_RANKS, before: str = "", **environ: str) -> ForkedJob:
    """An attempt; what its ranks say is in `directory`/log.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    log.unlink(missing_ok=True)
    return ForkedJob(arguments(directory, *more), log, num_ranks, before=before, **environ)


def told(directory: Path) -> str:
    """What the last attempt said."""
    log = directory / "log.txt"
    return log.read_text() if log.exists() else ""


def end(job: ForkedJob, directory: Path, codes: Sequence[int] | int = 0, timeout: float = 100) -> str:
    """Wait for the end with these exit codes (one for all ranks, or one for each); what the attempt said."""
    try:
        if not wait_until(job.ended, timeout, every=0.05):
            job.say_where()
            raise AssertionError(f"no end after {timeout} s:\n{told(directory)[-8000:]}")
        expected = [codes] * len(job.pids) if isinstance(codes, int) else list(codes)
        assert job.codes() == expected, f"exit codes {job.codes()}:\n{told(directory)[-8000:]}"
    finally:
        job.kill()
    return told(directory)


def finish(directory: Path, *more: str, num_ranks: int = NUM_RANKS, before: str = "", **environ: str) -> Path:
    """An attempt that nothing happens to; the run's directory."""
    end(start(directory, *more, num_ranks=num_ranks, before=before, **environ), directory)
    return directory / "runs" / "small"


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves which does not depend on the time of day."""
    timeless = [
        {key: value for key, value in event.items() if key not in ("time", "seconds")}
        for event in Timeline(run).events()
        if event["event"] in ("StepDone", "EvalDone", "NonFinite")
    ]
    return {
        "weights": (run / "model" / "model.safetensors").read_bytes(),
        "predictions": [path.read_bytes() for path in sorted(run.glob("predictions-*.jsonl"))],
        "scores": json.loads((run / "result.json").read_text())["splits"],
        "steps": timeless,
        "status": json.loads((run / "status.json").read_text())["state"],
    }


def differences(run: Path, other: Path) -> list[str]:
    """The names of what they leave otherwise. Not the contents: pytest would compare megabytes line by line."""
    left, right = outcome(run), outcome(other)
    return [name for name in left if left[name] != right[name]]


def status(directory: Path) -> dict[str, Any]:
    """status.json of the run in `directory`."""
    return json.loads((directory / "runs" / "small" / "status.json").read_text())
