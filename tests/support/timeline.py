"""Where a training stands, seen from outside: from what its run's directory holds."""

import json
from pathlib import Path
from typing import Any

PHASES = ("tokenise", "features", "train", "save", "evaluate", "export")
"""In the order in which a run passes through them."""


class Timeline:
    """The phases of the attempt that is running in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._old_starts = [event["time"] for event in self.of("RunStarted")]

    def events(self) -> list[dict[str, Any]]:
        """The whole lines of events.jsonl."""
        try:
            lines = (self.directory / "events.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind."""
        return [event for event in self.events() if event["event"] == kind]

    @property
    def has_started(self) -> bool:
        """Whether this attempt has said what it is going to do."""
        return any(event["time"] not in self._old_starts for event in self.of("RunStarted"))

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((event["step"] for event in self.of("StepDone")), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.directory.glob("checkpoints/.step-*"))

    def saved(self) -> int:
        """Steps of the newest checkpoint."""
        return max((int(path.name.split("-")[1]) for path in self.directory.glob("checkpoints/step-*")), default=0)

    def phase(self, num_steps: int, num_epochs: int) -> str:
        """The one of PHASES that the attempt is in; `num_steps` of the whole run."""
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
