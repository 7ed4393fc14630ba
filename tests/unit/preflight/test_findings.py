"""Findings: equal rows of several ranks become one, and calls have a time limit."""

import threading

import pytest

from agnews_dist.preflight.findings import (
    Finding,
    format_ranks,
    has_unfinished_calls,
    merge_findings,
    run_with_timeout,
    worst_verdict,
)

FINE = Finding(check="disk", verdict="ok", found="writable")
FULL = Finding(check="disk", verdict="fail", found="full", remedy="Free some space")
CORES = Finding(check="cores", verdict="warn", found="1 core", remedy="Ask for more")


def test_merge_findings_joins_equal_rows():
    rows = merge_findings([[FINE, CORES], [FULL], [FINE, CORES]])
    assert [(row.check, row.verdict, row.ranks) for row in rows] == [
        ("disk", "ok", (0, 2)),
        ("disk", "fail", (1,)),
        ("cores", "warn", (0, 2)),
    ]
    assert worst_verdict(rows) == "fail"


def test_worst_verdict():
    assert worst_verdict([FINE, CORES]) == "warn"
    assert worst_verdict([FINE]) == worst_verdict([]) == "ok"


@pytest.mark.parametrize(
    ("ranks", "text"), [((3,), "rank 3"), ((0, 1, 2, 3), "ranks 0-3"), ((0, 1, 2, 5), "ranks 0-2, 5"), ((5, 1), "ranks 1, 5")]
)
def test_format_ranks(ranks, text):
    assert format_ranks(ranks) == text


def test_run_with_timeout_returns_value_error_or_timeout():
    def fail():
        raise RuntimeError("CUDA error: no device\nStack trace")

    assert run_with_timeout(30, lambda: 7) == (7, None)
    assert run_with_timeout(30, fail) == (None, "CUDA error: no device")
    assert not has_unfinished_calls()
    blocked = threading.Event()
    assert run_with_timeout(0.05, blocked.wait) == (None, "no answer within 0.05 s")
    assert has_unfinished_calls()
    blocked.set()
