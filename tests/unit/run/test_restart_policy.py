"""The rule for restarts: never after the end, not for ever, and always while progress would be lost."""

import json

import pytest

from agnews_dist.errors import UserError
from agnews_dist.run.restart_policy import Start, count_fruitless, decide_at_begin, decide_at_end, read_starts, write_starts
from agnews_dist.run.status import Status


def status(state: str, attempt: int, step: int, reason: str = "a fault") -> Status:
    """Return the status that a run wrote last."""
    return Status(state=state, attempt=attempt, step=step, reason=reason, job=None, host="here", pid=1, time="now")


def starts(*steps: int) -> list[Start]:
    """Return consecutive attempts that began at these steps."""
    return [Start(attempt, step) for attempt, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "count"), [((), 0), ((0,), 0), ((0, 0), 1), ((0, 0, 0), 2), ((0, 5, 5, 5), 2), ((5, 5, 9), 0), ((7, 0, 0), 2)]
)
def test_count_fruitless_counts_starts_that_saved_nothing_new(steps, count):
    assert count_fruitless(starts(*steps)) == count


def test_decide_at_begin_gives_up_after_the_limit():
    # Three starts were killed before they could save anything, or record their end.
    assert decide_at_begin(starts(0, 0, 0), limit=3).word == "again"
    answer = decide_at_begin(starts(0, 0, 0, 0), limit=3)
    assert answer.word == "give_up"
    assert answer.reason.startswith("3 starts in a row have saved nothing beyond step 0: another would do no better.")
    assert decide_at_begin(starts(0, 0, 0, 8), limit=3).word == "again", "progress"


@pytest.mark.parametrize(
    ("last", "before", "was_stopped", "word"),
    [
        (status("finished", 1, 100), starts(0), False, "finished"),
        (status("finished", 1, 100), starts(0), True, "finished"),
        (status("preempted", 1, 40), starts(0), False, "again"),
        # The signal came while it saved: the file still says `running`.
        (status("running", 1, 40), starts(0), True, "again"),
        (None, starts(0), True, "again"),
        (status("failed", 1, 40), starts(0), False, "again"),
        # For example a wrong path: the run did not begin, and never would.
        (None, starts(0), False, "give_up"),
        (status("failed", 1, 40), [Start(0, 0), Start(1, 40)], False, "give_up"),
        # A node fails at the same step again and again.
        (status("failed", 4, 40), starts(0, 40, 40, 40), False, "give_up"),
        (status("preempted", 4, 40), starts(0, 40, 40, 40), True, "give_up"),
        (status("failed", 4, 41), starts(0, 40, 40, 40), False, "again"),
    ],
)
def test_decide_at_end(last, before, was_stopped, word):
    answer = decide_at_end(last, before, limit=3, was_stopped=was_stopped)
    assert answer.word == word
    assert answer.reason


def test_read_starts_skips_lines_that_a_kill_cut(tmp_path):
    file = tmp_path / "logs" / "7" / "starts.jsonl"
    assert read_starts(file) == []
    write_starts(file, starts(0, 12))
    assert read_starts(file) == starts(0, 12)
    file.write_text(file.read_text() + '{"attempt": 2, "st')
    assert read_starts(file) == starts(0, 12)
    file.write_text('[]\n"x"\n{"attempt": null, "step": 1}\n' + json.dumps({"attempt": 0, "step": 3}) + "\n")
    assert read_starts(file) == [Start(0, 3)]


def test_write_starts_reports_an_unwritable_file(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match=r"starts.jsonl cannot be written \(.*\): .* started for ever\. Set LOGS"):
        write_starts(tmp_path / "logs" / "starts.jsonl", starts(0))
