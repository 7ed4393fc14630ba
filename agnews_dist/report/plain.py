"""The console where the output is a file or a pipe: dated lines, no colours, few enough to read in a job's log."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

import numpy as np

from agnews_dist.evaluation.metrics import per_class
from agnews_dist.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    NonFinite,
    OverfitChecked,
    Profiled,
    Progress,
    Resumed,
    RunDone,
    RunStarted,
    StepDone,
    Warned,
)
from agnews_dist.report.formatting import duration, happened, share, visible, when
from agnews_dist.report.progress import StepProgress, TaskProgress


@dataclass
class _Task:
    pace: TaskProgress
    next_line: float
    """Seconds after the start at which the next line is due; doubles, so that an hour's work takes ten lines."""


class PlainLines:
    """Sink that writes lines beginning with the time of day to `file`.

    Steps: the first, the last, and one every `seconds_between_lines` (all with `every_step`); checkpoints
    likewise. Long work: a line after that many seconds, after twice, four times ... as many, and one at its end.
    """

    def __init__(
        self,
        file: TextIO,
        *,
        every_step: bool = False,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._every_step = every_step
        self._interval = seconds_between_lines
        self._clock = clock
        self._pace = StepProgress(0, clock)
        self._last_line: float | None = None
        self._last_saved = -math.inf
        self._tasks: dict[str, _Task] = {}

    def __call__(self, event: Event) -> None:
        """Write what the event says, if it is due."""
        match event:
            case StepDone():
                self._step(event)
            case Progress():
                self._progress(event)
            case RunStarted():
                self._pace = StepProgress(event.num_steps, self._clock)
                self._last_line = None
                self._started(event)
            case EvalDone():
                self._evaluation(event)
            case Warned():
                self._say(f"warning: {event.message}")
            case NonFinite() | Resumed():
                self._say(happened(event))
            case CheckpointSaved():
                self._saved(event)
            case Profiled():
                self._say(f"profile written to {event.path}\n{event.top_operators.strip()}")
            case OverfitChecked():
                self._say(
                    f"overfit check: {event.num_examples} examples, {event.num_steps} steps: loss "
                    f"{event.first_loss:.4f} -> {event.last_loss:.4f}, accuracy {event.accuracy:.3f}"
                )
            case RunDone():
                self._say("done")
                self._rows(event.facts)
                self._rows(event.paths)

    def close(self) -> None:
        """Nothing is held open; the file belongs to the caller."""

    def _say(self, text: str) -> None:
        first, *rest = visible(text, self._file.encoding or "utf-8").split("\n")
        lines = [f"{datetime.now():%H:%M:%S} {first}", *(f"         {line}" for line in rest)]
        self._file.write("\n".join(lines) + "\n")
        # A log file is block-buffered: without this, the last lines before a kill are never seen.
        self._file.flush()

    def _rows(self, facts: Mapping[str, str]) -> None:
        width = max(map(len, facts), default=0)
        for label, value in facts.items():
            self._say(f"  {label:<{width}}  {value}")

    def _started(self, event: RunStarted) -> None:
        self._say(
            f"run started on {datetime.now():%Y-%m-%d}" + (f", {event.num_steps} steps" if event.num_steps else "")
        )
        self._rows(event.facts)
        if event.parameters:
            trainable, frozen = (sum(counts) for counts in zip(*event.parameters.values(), strict=True))
            self._say(f"parameters: {trainable:,} trainable, {frozen:,} frozen")
            self._rows({part: f"{train:>13,} {still:>13,}" for part, (train, still) in event.parameters.items()})

    def _step(self, event: StepDone) -> None:
        self._pace.add(event)
        now = self._clock()
        due = self._last_line is None or self._pace.is_complete or now - self._last_line >= self._interval
        if due or self._every_step:
            self._last_line = now
            words = [self._pace.step_words(), *self._pace.words(exact=self._every_step), self._pace.eta_words()]
            self._say("  ".join(word for word in words if word))

    def _saved(self, event: CheckpointSaved) -> None:
        now = self._clock()
        if self._every_step or now - self._last_saved >= self._interval:
            self._last_saved = now
            self._say(happened(event))

    def _progress(self, event: Progress) -> None:
        task = self._tasks.setdefault(event.task, _Task(TaskProgress(event, self._clock), next_line=self._interval))
        task.pace.add(event)
        if task.pace.is_complete:
            del self._tasks[event.task]
            self._say(task.pace.line())
        elif task.pace.elapsed >= task.next_line:
            task.next_line = 2 * task.pace.elapsed
            self._say(task.pace.line())

    def _evaluation(self, event: EvalDone) -> None:
        classes = ", ".join(
            f"{name} {share(scores.precision)}/{share(scores.recall)}"
            for name, scores in zip(event.class_names, per_class(np.asarray(event.confusion)), strict=True)
        )
        self._say(
            f"{when(event.split, event.epoch)}: accuracy {event.accuracy:.4f} ({event.num_correct:,} of "
            f"{event.num_examples:,}), macro F1 {event.macro_f1:.4f}, loss {event.loss:.4f}, "
            f"{duration(event.seconds)}; precision/recall: {classes}"
        )
