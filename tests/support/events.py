"""Events of runs: a reader of events.jsonl, a clock for tests, and sample events."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from agnews_dist.events import Emit, Event, Progress, StepDone


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the complete lines of an event log, oldest first; `kind`: only events of this class.

    A line that a kill cut short is left out. Tuples come back as lists, non-finite numbers as None.
    """
    events = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [event for event in events if kind is None or event["event"] == kind]


def recorder(events: list[Event]) -> Emit:
    """Return an `Emit` that appends to `events` all but the progress, which depends on the speed of the machine."""

    def record(event: Event) -> None:
        if not isinstance(event, Progress):
            events.append(event)

    return record


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_step(number: int, **changes: float) -> StepDone:
    """Return a step of 32 examples and 1,000 tokens in 0.25 s."""
    event = StepDone(step=number, epoch=1, loss=0.5, lr=1e-3, grad_norm=2.0, num_examples=32, num_tokens=1000, seconds=0.25)
    return dataclasses.replace(event, **changes)


def make_progress(done: int, total: int = 6_200_000, unit: str = "tokens") -> Progress:
    """Return a report of the task `frozen prefix`."""
    return Progress(task="frozen prefix", done=done, total=total, unit=unit)
