"""Shall a job be started again? Never after its end, never for ever, and always where work would otherwise be lost."""

import json

import pytest

from agnews_dist.errors import UserError
from agnews_dist.run import restart_policy as restarts
from agnews_dist.run.restart_policy import Start, at_begin, at_end, fruitless, read_starts, write_starts
from agnews_dist.run.status import Status


def status(state: str, attempt: int, step: int, reason: str = "a fault") -> Status:
    """What a run wrote last."""
    return Status(state=state, attempt=attempt, step=step, reason=reason, job=None, host="here", pid=1, time="now")


def starts(*steps: int) -> list[Start]:
    return [Start(attempt, step) for attempt, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "count"),
    [((), 0), ((0,), 0), ((0, 0), 1), ((0, 0, 0), 2), ((0, 5, 5, 5), 2), ((5, 5, 9), 0), ((7, 0, 0), 2)],
)
def test_starts_that_saved_nothing_new(steps, count):
    assert fruitless(starts(*steps)) == count


def test_a_start_that_is_one_too_many_is_not_made():
    """Three were killed before they could save, or say, anything."""
    assert at_begin(starts(0, 0, 0), limit=3).word == "again"
    answer = at_begin(starts(0, 0, 0, 0), limit=3)
    assert answer.word == "give_up"
    assert answer.reason.startswith("3 starts in a row have saved nothing beyond step 0: another would be no better.")
    assert at_begin(starts(0, 0, 0, 8), limit=3).word == "again", "progress"


@pytest.mark.parametrize(
    ("last", "before", "was_stopped", "word"),
    [
        (status("finished", 1, 100), starts(0), False, "finished"),
        (status("finished", 1, 100), starts(0), True, "finished"),
        (status("preempted", 1, 40), starts(0), False, "again"),
        # The signal came while it saved: the file still says running.
        (status("running", 1, 40), starts(0), True, "again"),
        (None, starts(0), True, "again"),
        (status("failed", 1, 40), starts(0), False, "again"),
        # A wrong path, say: the run never began, and never would.
        (None, starts(0), False, "give_up"),
        (status("failed", 1, 40), [Start(0, 0), Start(1, 40)], False, "give_up"),
        # A node fails at the same step again and again.
        (status("failed", 4, 40), starts(0, 40, 40, 40), False, "give_up"),
        (status("preempted", 4, 40), starts(0, 40, 40, 40), True, "give_up"),
        (status("failed", 4, 41), starts(0, 40, 40, 40), False, "again"),
    ],
)
def test_what_follows_on_an_end(last, before, was_stopped, word):
    answer = at_end(last, before, limit=3, was_stopped=was_stopped)
    assert answer.word == word
    assert answer.reason


def test_starts_are_counted_in_a_file_whose_last_line_a_kill_may_cut(tmp_path):
    file = tmp_path / "logs" / "7" / "starts.jsonl"
    assert read_starts(file) == []
    write_starts(file, starts(0, 12))
    assert read_starts(file) == starts(0, 12)
    file.write_text(file.read_text() + '{"attempt": 2, "st')
    assert read_starts(file) == starts(0, 12)
    file.write_text('[]\n"x"\n{"attempt": null, "step": 1}\n' + json.dumps({"attempt": 0, "step": 3}) + "\n")
    assert read_starts(file) == [Start(0, 3)]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match=r"starts.jsonl cannot be written \(.*\): .* started for ever\. Set LOGS"):
        write_starts(tmp_path / "logs" / "starts.jsonl", starts(0))


@pytest.mark.parametrize("limit", [1, 3])
def test_the_story_counts_and_gives_up(tmp_path, capsys, monkeypatch, limit):
    monkeypatch.chdir(tmp_path)
    words = ("--starts", "starts.jsonl", "--limit", str(limit), "--run.name", "absent")
    for start in range(limit):
        assert restarts.main([*words, "--at", "begin"]) == 0
        assert capsys.readouterr().out == f"again start {start + 1}, 0 steps are saved\n"
    assert restarts.main([*words, "--at", "begin"]) == 0
    assert capsys.readouterr().out.startswith(f"give_up {limit} starts in a row have saved nothing beyond step 0")
    assert len(read_starts(tmp_path / "starts.jsonl")) == limit + 1


def test_settings_with_which_no_training_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert restarts.main(["--optim.lr", "-1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
