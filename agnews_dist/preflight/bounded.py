"""Work that may hang in a driver, a network or a name server: in a thread of its own, left behind when time is over."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
NO_END = "no end within"
_left_behind: list[threading.Thread] = []


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of it: either of the two."""

    value: T | None
    error: str | None
    """The first line of an exception's text, or that there was no end."""


def within(seconds: float, work: Callable[[], T]) -> Outcome[T]:
    """Do `work`, for `seconds` at most; what it raises is its outcome, if it is a system's or a driver's (RuntimeError)."""
    outcome: Outcome[T] = Outcome(None, f"{NO_END} {seconds:g} s")

    def run() -> None:
        nonlocal outcome
        try:
            outcome = Outcome(work(), None)
        except (OSError, RuntimeError) as error:
            outcome = Outcome(None, (str(error).strip().splitlines() or [type(error).__name__])[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _left_behind.append(thread)
    return outcome


def is_no_end(error: str) -> bool:
    """Whether an outcome's error is that time was over."""
    return error.startswith(NO_END)


def is_anything_left_behind() -> bool:
    """Whether some work still hangs; then only os._exit ends this process for sure."""
    return any(thread.is_alive() for thread in _left_behind)
