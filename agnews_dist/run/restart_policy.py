"""The rule that decides whether a job is started again, and the file that counts its starts."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from agnews_dist.errors import UserError
from agnews_dist.run.status import Status
from agnews_dist.storage.atomic import write_text


@dataclass(frozen=True)
class Start:
    """The state of the run when one start of the job began."""

    attempt: int
    """Earlier attempts of the run. A start that failed before it began the run is not among them."""
    step: int
    """Optimiser steps saved by then."""


@dataclass(frozen=True)
class Answer:
    """Instruction for the batch script, with its reason."""

    word: Literal["again", "finished", "give_up"]
    reason: str


def decide_at_begin(starts: Sequence[Start], limit: int) -> Answer:
    """Decide whether the last of `starts` may proceed.

    `limit`: starts in a row that may save nothing new. A killed start cannot decide at its end, so it is counted here.
    """
    if count_fruitless(starts) >= limit:
        return Answer("give_up", _nothing_new(starts, limit))
    return Answer("again", f"start {len(starts)}, {starts[-1].step} steps are saved")


def decide_at_end(status: Status | None, starts: Sequence[Start], limit: int, *, was_stopped: bool) -> Answer:
    """Decide what follows a start that has ended. `status`: the last one the run wrote."""
    if status is not None and status.state == "finished":
        return Answer("finished", f"after {status.attempt} attempt(s), {status.step} steps")
    if count_fruitless([*starts, start_from_status(status)]) >= limit:
        return Answer("give_up", _nothing_new(starts, limit))
    if was_stopped or (status is not None and status.state == "preempted"):
        return Answer("again", "it was stopped before its end")
    if status is None or (starts and status.attempt <= starts[-1].attempt):
        return Answer("give_up", "this start failed before the run began, so the next one would too: see its error above")
    return Answer("again", f"it failed ({status.reason}) and may get further from step {status.step}")


def count_fruitless(starts: Sequence[Start]) -> int:
    """Count the latest starts in a row that saved nothing new: the next start began at the same step."""
    new_steps = [later.step - earlier.step for earlier, later in pairwise(starts)]
    return next((count for count, new in enumerate(reversed(new_steps)) if new > 0), len(new_steps))


def _nothing_new(starts: Sequence[Start], limit: int) -> str:
    step = starts[-1].step if starts else 0
    return f"{limit} starts in a row have saved nothing beyond step {step}: another would do no better. See their errors above"


def start_from_status(status: Status | None) -> Start:
    """Return the start that `status` describes."""
    return Start(status.attempt, status.step) if status is not None else Start(0, 0)


def read_starts(file: Path) -> list[Start]:
    """Read the starts counted so far, without a line that a kill cut short."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[Start] = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            content = json.loads(line)
            found.append(Start(int(content["attempt"]), int(content["step"])))
    return found


def write_starts(file: Path, starts: Sequence[Start]) -> None:
    """Replace the file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}): the job's starts could not be counted, and it might be "
            "started for ever. Set LOGS to a writable directory."
        ) from error
    write_text(file, [json.dumps(asdict(start), allow_nan=False) + "\n" for start in starts])
