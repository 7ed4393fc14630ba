"""What a check found, as a verdict with a remedy; equal findings of several ranks become one."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Generic, Literal, TypeVar

Verdict = Literal["ok", "warn", "fail"]
WORST_FIRST: Sequence[Verdict] = ("fail", "warn", "ok")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the doctor's table."""

    check: str
    """What was looked at: `disk runs`."""
    verdict: Verdict
    """ok; warn: the job would run, worse or with a risk; fail: it would not run, or go astray."""
    found: str
    """What is so, with its values."""
    remedy: str = ""
    """What to do; empty where all is well."""
    ranks: tuple[int, ...] = ()
    """Which ranks found it; empty: all of them together."""

    def to_dict(self) -> Mapping[str, object]:
        """For JSON."""
        return asdict(self)


def merged(by_rank: Sequence[Iterable[Finding]]) -> list[Finding]:
    """What the ranks found, equal rows once with all their ranks, in the order of the first rank that has them."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(replace(finding, ranks=()), []).append(rank)
    checks = list(dict.fromkeys(finding.check for finding in ranks))
    rows = [replace(finding, ranks=tuple(own)) for finding, own in ranks.items()]
    return sorted(rows, key=lambda row: checks.index(row.check))


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict on all of them."""
    verdicts = {finding.verdict for finding in findings}
    for verdict in WORST_FIRST:
        if verdict in verdicts:
            return verdict
    return "ok"


def rank_words(ranks: Sequence[int], num_ranks: int) -> str:
    """`all`, `rank 3`, `ranks 0-2, 5`."""
    if not ranks or len(ranks) == num_ranks:
        return "all"
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


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
