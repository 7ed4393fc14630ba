"""Everything a run ever says, as plain records.

The stories emit events; the sinks in report/ consume them (console, run log). Nothing flows back: a sink cannot change a run.
Ranks other than 0 emit to no sink.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Union


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something the user should know that does not stop the job."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Long work that is not a training step: `done` of `total` units of `task` (total 0: unknown)."""

    task: str
    done: int
    total: int
    unit: str = ""
    """What is counted, "tokens" for example; with it, rate and time left are shown, judged from the first report on."""


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The header: what runs where. Values are ready to print."""

    facts: Mapping[str, str]
    """Label -> value: ranks, device, precision, model, data ..., in the order to show."""
    parameters: Mapping[str, tuple[int, int]]
    """Part of the model -> (trainable, frozen) parameter counts, bottom to top."""
    num_steps: int = 0
    """Optimiser steps of the whole run; 0 when nothing trains."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimiser step, the same numbers on every rank."""

    step: int
    """Steps done so far, from 1."""
    epoch: int
    """Epoch this step belongs to, from 1."""
    loss: float
    """Mean loss over the global batch, before the update (nats)."""
    lr: float
    grad_norm: float | None
    """Global gradient norm before clipping."""
    num_examples: int
    """Examples of the global batch."""
    num_tokens: int
    """Real tokens of the global batch."""
    seconds: float
    """Wall time of the step."""


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A step without update: a loss or gradient was NaN or infinite on some rank."""

    step: int
    """The step that it was to be, from 1."""
    epoch: int
    ids: tuple[int, ...]
    """Rows of the training split, from 0, whose loss was not finite; all of the step where only the gradient was not."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The run goes on from a checkpoint."""

    path: str
    step: int
    attempt: int
    """Starts of this run so far, this one included."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is on the disk."""

    path: str
    step: int
    num_bytes: int
    stall: float
    """Seconds for which training stood still."""
    seconds: float
    """In which it was written, beside training."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a split. `confusion[i][j]` counts the examples of true class i that were predicted as class j."""

    num_examples: int
    num_correct: int
    accuracy: float
    macro_f1: float
    loss: float
    """Mean loss per example (nats)."""
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class EvalDone:
    """One split was evaluated over all ranks. The event log writes the fields of `scores` in place of `scores`."""

    split: str
    epoch: int
    """Number of the training epoch before the evaluation; 0 outside training."""
    scores: Scores
    class_names: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """The profiler's trace was written."""

    path: str
    top_operators: str
    """A ready table of the most expensive operators."""


@dataclass(frozen=True, kw_only=True)
class OverfitChecked:
    """Debug mode: one batch was trained alone until it was learnt (or not)."""

    num_examples: int
    num_steps: int
    first_loss: float
    last_loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RunDone:
    """The final panel."""

    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Label -> value: accuracies, best epoch, seconds."""
    paths: Mapping[str, str] = field(default_factory=dict[str, str])
    """What was written -> where."""


Event = Union[
    Warned,
    Progress,
    RunStarted,
    StepDone,
    NonFinite,
    Resumed,
    CheckpointSaved,
    EvalDone,
    Profiled,
    OverfitChecked,
    RunDone,
]
Emit = Callable[[Event], None]


def silent(_: Event) -> None:
    """Where nobody listens."""
