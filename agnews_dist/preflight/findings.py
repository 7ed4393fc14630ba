"""Results of checks: a verdict with a fix. Equal results of several ranks become one row."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

Verdict = Literal["ok", "warn", "fail"]
WORST_FIRST: Sequence[Verdict] = ("fail", "warn", "ok")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the doctor's table."""

    check: str
    """Name of the check, such as `disk: run.dir`."""
    verdict: Verdict
    """warn: the job runs, slower or with a risk. fail: the job does not run, or its results are wrong."""
    found: str
    """Facts with their values."""
    remedy: str = ""
    """Fix; empty if the verdict is ok, or if `found` is a complete error message."""
    ranks: tuple[int, ...] = ()
    """Ranks with this result; empty: all of them together."""


def merge_findings(by_rank: Sequence[Iterable[Finding]]) -> list[Finding]:
    """Join equal rows into one that lists its ranks. Checks keep the order in which they first occur."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(replace(finding, ranks=()), []).append(rank)
    checks = list(dict.fromkeys(finding.check for finding in ranks))
    rows = [replace(finding, ranks=tuple(own)) for finding, own in ranks.items()]
    return sorted(rows, key=lambda row: checks.index(row.check))


def worst_verdict(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict; ok without findings."""
    verdicts = {finding.verdict for finding in findings}
    for verdict in WORST_FIRST:
        if verdict in verdicts:
            return verdict
    return "ok"


def format_ranks(ranks: Sequence[int], num_ranks: int) -> str:
    """Format rank numbers.

    >>> format_ranks((0, 1, 2, 5), 8), format_ranks((3,), 8), format_ranks((0, 1), 2)
    ('ranks 0-2, 5', 'rank 3', 'all')
    """
    if not ranks or len(ranks) == num_ranks:
        return "all"
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    listed = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """Value or error of a call with a time limit."""

    value: T | None
    error: str | None
    """First line of the exception's text, or that the time limit passed."""
    timed_out: bool = False


_unfinished: list[threading.Thread] = []


def run_with_timeout(seconds: float, call: Callable[[], T]) -> Outcome[T]:
    """Run `call` in a thread and wait `seconds` at most. Catches OSError and RuntimeError, which drivers raise."""
    outcome: Outcome[T] = Outcome(None, f"no answer within {seconds:g} s", timed_out=True)

    def run() -> None:
        nonlocal outcome
        try:
            outcome = Outcome(call(), None)
        except (OSError, RuntimeError) as error:
            outcome = Outcome(None, (str(error).strip().splitlines() or [type(error).__name__])[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _unfinished.append(thread)
    return outcome


def has_unfinished_calls() -> bool:
    """Return whether a call still hangs in a driver. Then only os._exit ends this process for sure."""
    return any(thread.is_alive() for thread in _unfinished)
