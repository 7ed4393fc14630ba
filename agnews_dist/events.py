"""Everything that a run reports, as plain records.

Commands emit events, and the sinks in `report` consume them: console and event log. A sink cannot change a run. Only rank 0 has
sinks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

Metric = Literal["accuracy", "macro_f1", "loss"]
SCORES: Mapping[str, str] = {"accuracy": "accuracy", "macro_f1": "macro F1", "loss": "loss"}
"""The scores among the fields of `Scores`, with their names for people."""


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A warning: the run continues."""

    message: str


@dataclass(frozen=True)
class DataFinding:
    """One fact about the data that a user should know."""

    what: str
    """The fact with its count: `3 rows of test have a text that is also in train`."""
    where: str = ""
    """The first examples, with file and row."""
    why: str = ""
    """Consequence of the fact."""
    fix: str = ""
    """Advice, without a full stop."""

    def __str__(self) -> str:
        where, why, fix = self.where and f" ({self.where})", self.why and f": {self.why}", self.fix and f" {self.fix}."
        return f"{self.what}{where}{why}.{fix}" if self.why else f"{self.what}{where}"


@dataclass(frozen=True, kw_only=True)
class DataChecked:
    """The findings about the data, all together: the run continues."""

    findings: tuple[DataFinding, ...]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The first line of a command, before anything heavy is loaded."""

    program: str
    """Name and version."""
    what: str
    """Libraries and model that are loaded."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of long work other than training steps: `done` of `total` units of `task` (total 0: unknown).

    With neither, it is the start of a phase, which lasts until the next report of another task.
    """

    task: str
    done: int
    total: int
    unit: str = ""
    """Counted unit, "tokens" for example; with a unit, sinks show the rate since the first report and the time left."""


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The header of a run. Values are ready to print."""

    facts: Mapping[str, str]
    """Label -> value: run, model, data, device, ranks and others. The first ten matter most."""
    parameters: Mapping[str, tuple[int, int]]
    """Part of the model -> (trainable, frozen) parameter counts, bottom to top."""
    num_steps: int = 0
    """Optimiser steps of the whole run; 0 without training."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimiser step over all ranks; every rank has the same numbers."""

    step: int
    """Steps done so far, from 1."""
    epoch: int
    """Epoch of this step, from 1."""
    loss: float
    """Mean loss over the global batch, before the update (nats)."""
    lr: float
    grad_norm: float | None
    """Global gradient norm before clipping."""
    num_examples: int
    num_tokens: int
    """Real tokens of the global batch."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A step without update: a loss or gradient was NaN or infinite on some rank."""

    step: int
    """Number of the step, from 1."""
    epoch: int
    ids: tuple[int, ...]
    """Rows of the training split, from 0, whose loss was not finite; all of the step if only the gradient was not."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The run resumed from a checkpoint."""

    path: str
    step: int
    attempt: int
    """Starts of this run so far, including this one."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint was written to disk."""

    path: str
    step: int
    num_bytes: int
    stall: float
    """Seconds for which training was interrupted."""
    seconds: float
    """Seconds of writing, in parallel to training."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a split. `confusion[i][j]` counts the examples of true class i that were predicted as class j."""

    num_examples: int
    num_correct: int
    accuracy: float
    macro_f1: float
    loss: float
    """Mean loss per example (nats)."""
    confusion: tuple[tuple[int, ...], ...] | None
    """None if there are more than 256 classes; in events, more than 20."""


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Scores of one class. A ratio with denominator 0 is NaN."""

    name: str
    num_examples: int
    precision: float
    """Correct predictions of this class / predictions of this class."""
    recall: float
    """Correct predictions of this class / examples of this class."""
    f1: float
    """2 x correct predictions / (examples + predictions)."""


@dataclass(frozen=True, kw_only=True)
class EvalDone:
    """One split was evaluated over all ranks. The event log writes the fields of `scores` in place of `scores`."""

    split: str
    epoch: int
    """Number of the training epoch before the evaluation; 0 outside training."""
    step: int = 0
    """Steps done before the evaluation; 0 outside training."""
    scores: Scores
    class_names: tuple[str, ...] | None
    """Names of the rows of `scores.confusion`; None without it."""
    num_classes: int
    classes: tuple[ClassScores, ...]
    """Scores of every class, or of the 5 with the lowest F1 if there are more than 20."""
    seconds: float
    is_best: bool = False
    """True for the best evaluation of a training so far."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One split without labels was predicted over all ranks. It has no scores."""

    split: str
    num_examples: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StoppedEarly:
    """The end of a training that no longer improved."""

    step: int
    """Steps done."""
    epoch: int
    num_worse: int
    """Evaluations in a row that were not better than the best one."""
    metric: str
    """Name of the score that was compared."""
    best_step: int


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """The profiler's trace was written."""

    path: str
    top_operators: str
    """Table of the most expensive operators, ready to print."""


@dataclass(frozen=True, kw_only=True)
class OverfitChecked:
    """Result of the debug check that trains on one batch alone until it is overfitted, or the steps run out."""

    num_examples: int
    num_steps: int
    first_loss: float
    last_loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One combination of settings in the table of a sweep."""

    settings: str
    """Ready to print."""
    state: str
    """`finished`, `halved`, `diverged`, or how many of its members have ended: `2 of 5`."""
    mean: float
    """Mean validation score over the members that have ended."""
    deviation: float
    """Standard deviation over them; NaN for fewer than two."""
    loss: float


@dataclass(frozen=True, kw_only=True)
class SweepUpdated:
    """The settings of a sweep whose members have ended, the best first."""

    metric: str
    rows: tuple[SweepRow, ...]
    num_done: int
    """Members that have ended."""
    num_members: int


@dataclass(frozen=True, kw_only=True)
class RunDone:
    """The final panel."""

    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Label -> value: accuracies, best weights, seconds."""
    paths: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kind of file -> path."""


Event = Union[
    Warned,
    DataChecked,
    Loading,
    Progress,
    RunStarted,
    StepDone,
    NonFinite,
    Resumed,
    CheckpointSaved,
    EvalDone,
    Predicted,
    StoppedEarly,
    Profiled,
    OverfitChecked,
    SweepUpdated,
    RunDone,
]
Emit = Callable[[Event], None]


def begin_phase(task: str) -> Progress:
    """Return the event that begins a phase without a count: `load gpt2`."""
    return Progress(task=task, done=0, total=0)


def ignore_event(_: Event) -> None:
    """Ignore an event: the `Emit` of code without sinks."""
