"""A sweep in the list of runs: its state over all processes, its progress, its best scores, what it varies."""

import fcntl
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from agnews_dist.experiments.stored_sweeps import find_sweeps, list_sweep_facts
from agnews_dist.run.status import StatusFile
from agnews_dist.run.stored_runs import find_runs

EMPTY: Mapping[int, str] = {}
NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
PLAN = {
    "settings": {"optim.epochs": 2, "optim.best_metric": "loss", "data.seed": 0},
    "varied settings": {"optim.lr": [0.001, 0.01], "optim.schedule": ["linear"]},
    "seeds": [0, 1],
    "samples": None,
}


def make_sweep(
    path: Path, losses: Mapping[int, float | None] | None = None, states: Mapping[int, str] = EMPTY, **plan: Any
) -> Path:
    """Make the directory of a sweep. `losses`: of the members that have ended; `states`: of those that halving ended."""
    (path / "members").mkdir(parents=True)
    (path / "plan.json").write_text(json.dumps(PLAN | plan))
    for member, loss in (losses or {}).items():
        score = {"accuracy": None if loss is None else 1 - loss, "macro_f1": None if loss is None else 0.5, "loss": loss}
        fields = {"member": member, "setting": member // 2, "values": {}, "seed": member % 2, "num_steps": 10, "seconds": 1.5}
        fields |= {"state": states.get(member, "finished" if loss is not None else "diverged"), **score}
        (path / "members" / f"{member:05}.json").write_text(json.dumps(fields))
    return path


def leave(sweep: Path, state: Any, time: str, *, file: str = "status.json", host: str = "elsewhere") -> None:
    StatusFile(lambda: sweep, attempt=3, step=20, job=None, file=file).write(state, f"it is {state}")
    content = json.loads((sweep / file).read_text())
    (sweep / file).write_text(json.dumps({**content, "time": time, "host": host}))


def test_list_sweep_facts_of_an_unfinished_sweep_has_the_best_setting_so_far(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "lr", {0: 0.5, 1: 0.3, 2: 0.2, 3: None})
    leave(sweep, "preempted", "2026-01-01T00:00:00+00:00")
    facts = list_sweep_facts(sweep, NOW)
    assert (facts.name, facts.state, facts.step, facts.attempt, facts.seconds) == ("lr", "preempted", 40, 3, 6)
    assert facts.reason == "4 of 4 members have ended; it is preempted"
    # A member of the other setting diverged.
    assert facts.scores["validation"] == pytest.approx({"accuracy": 0.6, "macro_f1": 0.5, "loss": 0.4})
    assert facts.changed == {"optim.lr": "{0.001, 0.01}", "run.seed": "{0, 1}", "optim.epochs": 2, "optim.best_metric": "loss"}
    assert facts.age_seconds == 86400


def test_list_sweep_facts_takes_the_best_setting_whose_members_have_all_finished(tmp_path: Path) -> None:
    # Setting 1 has one seed of two so far, halving ended setting 2.
    sweep = make_sweep(tmp_path / "lr", {0: 0.5, 1: 0.3, 2: 0.1, 4: 0.1, 5: 0.1}, {4: "halved", 5: "halved"})
    assert list_sweep_facts(sweep, NOW).scores["validation"]["loss"] == pytest.approx(0.4)
    assert list_sweep_facts(make_sweep(tmp_path / "begun", {0: 0.5}), NOW).scores == {}


def test_list_sweep_facts_of_a_finished_sweep_has_the_means_of_the_selected_setting(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "lr", {0: 0.5}, samples=["random", 20, 0])
    score = {name: {"mean": 0.75, "values": [0.7, 0.8]} for name in ("accuracy", "macro_f1", "loss")}
    report = {"selected": {"values": {}, "validation": score | {"num_examples": 9}}}
    (sweep / "sweep.json").write_text(json.dumps(report))
    facts = list_sweep_facts(sweep, NOW)
    assert (facts.state, facts.time, facts.age_seconds) == ("finished", None, None)
    assert facts.scores == {"validation": {"accuracy": 0.75, "macro_f1": 0.75, "loss": 0.75, "num_examples": 9}}


def test_list_sweep_facts_takes_the_state_of_the_process_that_lives_or_was_last(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "lr", samples=["random", 20, 0])
    assert list_sweep_facts(sweep, NOW).state == "unknown"
    leave(sweep, "running", "2026-01-01T00:00:00+00:00")
    assert list_sweep_facts(sweep, NOW).state == "killed"
    leave(sweep, "failed", "2026-01-01T01:00:00+00:00", file="status-1.json")
    facts = list_sweep_facts(sweep, NOW)
    assert (facts.state, facts.reason) == ("failed", "0 of 40 members have ended; it is failed")
    with (sweep / ".status.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert list_sweep_facts(sweep, NOW).state == "running"


def test_find_sweeps_finds_sweeps_alone_and_not_their_runs(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "lr")
    for run in (tmp_path / "run", sweep / "best"):
        run.mkdir()
        (run / "config.yaml").write_text("")
    assert find_sweeps(tmp_path) == [sweep]
    assert find_runs(tmp_path) == [tmp_path / "run"]
