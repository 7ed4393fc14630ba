"""Input of a tracker: the run, and rows of numbers made from the lines of events.jsonl."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

ATTACHED = ("report", "result")
"""Kinds of the files in `RunDone.paths` that are attached."""
PIECE_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run of which a tracker keeps the record."""

    id: str
    """Kept in the run's directory, so that every start continues the same record."""
    name: str
    directory: str
    settings: Mapping[str, Any]
    """Dotted key -> value of every setting."""


@dataclass(frozen=True)
class Row:
    """Numbers that belong to one step."""

    step: int
    group: str
    """`train`, or the name of the split that was evaluated."""
    time: str
    """ISO 8601, UTC."""
    values: Mapping[str, float]
    """`train/loss` and others; what was not finite is absent."""

    @property
    def timestamp(self) -> float:
        """Seconds since 1970."""
        return datetime.fromisoformat(self.time).timestamp()


class Tracker(Protocol):
    """Client of a tracker. Its constructor takes the `TrackedRun`, and makes its record or opens that of an earlier start.

    After every start of the run, all rows come again from the first one. The record then holds each once.
    """

    def log(self, rows: Sequence[Row]) -> None:
        """Write rows, in order."""
        ...

    def finish(self, scores: Mapping[str, float], step: int, files: Sequence[Path]) -> None:
        """Write final scores, attach files, and mark the record as finished."""
        ...

    def stop(self) -> None:
        """Mark the record of a run that was stopped or failed. The next start may continue it."""
        ...


def to_row(event: Mapping[str, Any]) -> Row | None:
    """Return the numbers of a line of events.jsonl; None if it has none."""
    if event["event"] == "StepDone":
        group, seconds = "train", event["seconds"]
        values = {name: event[name] for name in ("loss", "lr", "grad_norm", "epoch")}
        for unit in ("tokens", "examples"):
            values[f"{unit}_per_second"] = event[f"num_{unit}"] / seconds if seconds else None
    elif event["event"] == "EvalDone":
        group = event["split"]
        values = {name: event[name] for name in ("accuracy", "macro_f1", "loss")}
    else:
        return None
    known = {f"{group}/{name}": float(value) for name, value in values.items() if value is not None}
    return Row(event["step"], group, event["time"], known)


def make_final_row(scores: Mapping[str, float], step: int) -> Row:
    """Return final scores as a row."""
    return Row(step, "final", datetime.now(timezone.utc).isoformat(), scores)


def read_final_scores(paths: Mapping[str, str]) -> dict[str, float]:
    """Read the scores of all splits from result.json."""
    splits = json.loads(Path(paths["result"]).read_text(encoding="utf-8"))["splits"]
    scores = {
        f"final/{split}/{name}": scores[name] for split, scores in splits.items() for name in ("accuracy", "macro_f1", "loss")
    }
    return {name: float(value) for name, value in scores.items() if value is not None}


def attached_files(paths: Mapping[str, str]) -> list[Path]:
    """Return the files to attach that exist."""
    return [Path(paths[kind]) for kind in ATTACHED if kind in paths and Path(paths[kind]).is_file()]


def find_results(directory: str) -> dict[str, str]:
    """Return paths as in `RunDone` if the run has finished; empty otherwise.

    A process that is killed while it writes the report leaves no `RunDone`.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(Path(directory, "status.json").read_bytes())["state"] == "finished":
            return {"result": str(Path(directory, "result.json"))}
    return {}


class EventReader:
    """Reader of a growing events.jsonl, whole lines only."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.position = 0
        """Bytes read."""

    def read(self) -> list[dict[str, Any]]:
        """Return the next lines; empty without a new one."""
        size = PIECE_BYTES
        while True:
            content = os.pread(self._handle, size, self.position)
            if end := content.rfind(b"\n") + 1:
                self.position += end
                return [json.loads(line) for line in content[:end].split(b"\n") if line]
            if len(content) < size:
                return []
            size *= 2
