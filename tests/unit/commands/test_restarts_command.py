"""The command that batch scripts ask whether to start a job again."""

import pytest

from agnews_dist.__main__ import main
from agnews_dist.run.restart_policy import read_starts
from agnews_dist.run.status import StatusFile


@pytest.mark.parametrize("limit", [1, 3])
def test_restarts_counts_starts_and_gives_up(tmp_path, capsys, monkeypatch, limit):
    monkeypatch.chdir(tmp_path)
    words = ("--starts", "starts.jsonl", "--limit", str(limit), "--run.name", "absent")
    for start in range(limit):
        assert main(["restarts", *words, "--at", "begin"]) == 0
        assert capsys.readouterr().out == f"again start {start + 1}, 0 steps are saved\n"
    assert main(["restarts", *words, "--at", "begin"]) == 0
    assert capsys.readouterr().out.startswith(f"give_up {limit} starts in a row have saved nothing beyond step 0")
    assert len(read_starts(tmp_path / "starts.jsonl")) == limit + 1


def test_restarts_refuses_settings_that_train_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["restarts", "--optim.lr", "-1"]) == 2
    assert "optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(("job", "word"), [("6", "finished"), ("7", "give_up")])
def test_restarts_does_not_take_a_replaced_run_for_the_new_one(tmp_path, capsys, monkeypatch, job, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    StatusFile(lambda: tmp_path / "runs/a", attempt=1, step=9, job="slurm 6").try_to_write("finished", "done")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    words = ("restarts", "--run.name", "a", "--run.overwrite", "true", "--starts", "starts.jsonl")
    assert main([*words, "--at", "begin"]) == 0
    assert main([*words, "--at", "end"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == word
