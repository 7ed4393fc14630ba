"""The progress of a training, read from its run directory by another process."""

from pathlib import Path
from typing import Any

from support.events import read_events

PHASES = ("tokenise", "features", "train", "save", "evaluate", "export")
"""Phases in the order of a run."""


class Timeline:
    """The phases of the attempt that runs in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._old_starts = [event["time"] for event in self.of("RunStarted")]

    def events(self) -> list[dict[str, Any]]:
        """Return the complete lines of events.jsonl."""
        path = self.directory / "events.jsonl"
        return read_events(path) if path.exists() else []

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        return [event for event in self.events() if event["event"] == kind]

    @property
    def has_started(self) -> bool:
        """True once this attempt has logged its start."""
        return any(event["time"] not in self._old_starts for event in self.of("RunStarted"))

    @property
    def steps(self) -> int:
        """Last logged step."""
        return max((event["step"] for event in self.of("StepDone")), default=0)

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        return any(self.directory.glob("checkpoints/.step-*"))

    def saved(self) -> int:
        """Return the step of the newest checkpoint."""
        return max((int(path.name.split("-")[1]) for path in self.directory.glob("checkpoints/step-*")), default=0)

    def phase(self, num_steps: int, num_epochs: int) -> str:
        """Return the current phase of the attempt, one of PHASES; `num_steps`: of the whole run."""
        if not self.has_started:
            return "tokenise"
        events = self.events()
        scored = [event["split"] for event in events if event["event"] == "EvalDone"]
        if "test" in scored:
            return "export"
        if self.is_saving():
            return "save"
        last = max(index for index, event in enumerate(events) if event["event"] == "RunStarted")
        begun = any(event["event"] in ("StepDone", "EvalDone", "CheckpointSaved") for event in events[last:])
        if scored.count("validation") < self.steps * num_epochs // num_steps:
            return "evaluate"
        return "train" if begun else "features"
