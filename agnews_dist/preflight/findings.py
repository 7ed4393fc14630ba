"""Results of checks: a verdict with a fix. Equal results of several ranks become one row."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeVar

Verdict = Literal["ok", "warn", "fail"]
CALL_THREAD = "preflight call"
NO_ANSWER = "no answer within"
"""First words of the error of a call that hangs."""
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    check: str
    """Name of the check, such as `disk: run.dir`."""
    verdict: Verdict
    """warn: the job runs, slower or with a risk. fail: the job does not run, or its results are wrong."""
    found: str
    remedy: str = ""
    """Fix; empty if the verdict is ok, or if `found` is a complete error message."""
    ranks: tuple[int, ...] = ()
    """Ranks with this result; empty: all of them together."""


def merge_findings(by_rank: Sequence[Iterable[Finding]]) -> list[Finding]:
    """Join equal rows into one that lists its ranks. Checks keep the order in which they first occur."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    checks = list(dict.fromkeys(finding.check for finding in ranks))
    rows = [replace(finding, ranks=tuple(own)) for finding, own in ranks.items()]
    return sorted(rows, key=lambda row: checks.index(row.check))


def worst_verdict(findings: Iterable[Finding]) -> str:
    """Return the worst verdict; ok without findings."""
    return max((finding.verdict for finding in findings), key=["ok", "warn", "fail"].index, default="ok")


def format_ranks(ranks: Sequence[int]) -> str:
    """Format rank numbers.

    >>> format_ranks((0, 1, 2, 5)), format_ranks((3,))
    ('ranks 0-2, 5', 'rank 3')
    """
    spans: list[str] = []
    for _, group in groupby(enumerate(sorted(ranks)), key=lambda item: item[1] - item[0]):
        numbers = [rank for _, rank in group]
        spans.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(spans)}"


def run_with_timeout(seconds: float, call: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return (value of `call`, None), or (None, first line of its error), after `seconds` at most.

    Catches OSError and RuntimeError, which drivers raise.
    """
    outcome: tuple[T | None, str | None] = None, f"{NO_ANSWER} {seconds:g} s"

    def run() -> None:
        nonlocal outcome
        try:
            outcome = call(), None
        except (OSError, RuntimeError) as error:
            outcome = None, first_line(error)

    thread = threading.Thread(target=run, name=CALL_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome


def has_unfinished_calls() -> bool:
    """Return whether a call still hangs in a driver. Then only os._exit ends this process for sure."""
    return any(thread.name == CALL_THREAD for thread in threading.enumerate())


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
