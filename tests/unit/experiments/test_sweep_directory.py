"""The directory of a sweep: plans, results, claims."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import TIMEOUT, environment, wait_until

from agnews_dist.config.schema import Config
from agnews_dist.errors import ConfigError, UserError
from agnews_dist.experiments.members import Wave, build_members
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.storage import locks

PLAN = {"format": 1, "settings": {"optim.epochs": 3, "data.limit_train": None}, "seeds": (0, 1)}


def result(member: int, **values: object) -> MemberResult:
    fields = {"member": member, "setting": member, "values": {"optim.lr": 0.1}, "seed": 0, "state": "finished", **values}
    return MemberResult(**fields)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    made = SweepDirectory(tmp_path / "runs" / "a")
    made.open(PLAN, overwrite=False)
    return made


def test_equal_plan_continues_and_another_is_named(directory: SweepDirectory) -> None:
    directory.write_result(result(0))
    again = SweepDirectory(directory.path)
    again.open(PLAN, overwrite=False)
    assert len(again.read_results()) == 1
    for plan, name in (
        (PLAN | {"settings": {"optim.epochs": 4, "data.limit_train": None}}, "optim.epochs"),
        (PLAN | {"seeds": (0,)}, "seeds"),
    ):
        with pytest.raises(ConfigError, match=rf"another sweep \(in {name}\)"):
            again.open(plan, overwrite=False)
    with pytest.raises(UserError, match="another process works in it"):
        again.open(PLAN | {"seeds": (0,)}, overwrite=True)
    directory.close()
    again.close()
    again.open(PLAN | {"seeds": (0,)}, overwrite=True)
    assert SweepDirectory(directory.path).read_results() == []


def test_jobs_with_other_numbers_of_ranks_do_not_work_at_the_same_time(directory: SweepDirectory) -> None:
    other = SweepDirectory(directory.path)
    with pytest.raises(UserError, match=r"a job of 1 rank\(s\) works in it, and this one has 2"):
        other.open(PLAN, overwrite=False, num_workers=2)
    directory.close()
    other.open(PLAN, overwrite=False, num_workers=2)
    with pytest.raises(UserError, match=r"a job of 2 rank\(s\) works in it, and this one has 1"):
        directory.open(PLAN, overwrite=False)
    SweepDirectory(directory.path).open(PLAN, overwrite=False, num_workers=2)


def test_new_directory_without_work_is_removed(directory: SweepDirectory) -> None:
    again = SweepDirectory(directory.path)
    again.open(PLAN, overwrite=False)
    again.close()
    assert directory.path.is_dir(), "another process made it"
    directory.close()
    assert not list(directory.path.parent.iterdir())
    for name in ("members/00000.json", "status.json", "status-1.json"):
        directory.open(PLAN, overwrite=False)
        (directory.path / name).write_text("{}")
        directory.close()
        assert (directory.path / name).exists()
        shutil.rmtree(directory.path)


OPEN_AND_DIE = """
import json, os, signal, sys
from pathlib import Path
from agnews_dist.experiments.sweep_directory import SweepDirectory
SweepDirectory(Path(sys.argv[1])).open(json.loads(sys.argv[2]), overwrite=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_replaced_sweep_returns_unless_the_new_one_begins(directory: SweepDirectory) -> None:
    path, other = directory.path, PLAN | {"seeds": (0,)}
    directory.write_result(result(0))
    directory.close()
    new = SweepDirectory(path)
    new.open(other, overwrite=True)
    assert new.read_results() == []
    new.close()
    assert (path / "members/00000.json").is_file(), "the new one was refused"
    command = [sys.executable, "-c", OPEN_AND_DIE, str(path), json.dumps(other)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert SweepDirectory(path).read_results() == []
    directory.open(PLAN, overwrite=False)
    directory.close()
    assert len(SweepDirectory(path).read_results()) == 1
    new.open(other, overwrite=True)
    new.commit()
    new.close()
    assert not list(path.parent.iterdir())


def test_sweep_stopped_before_its_beginning_continues_until_it_fails(directory: SweepDirectory) -> None:
    path, other = directory.path, PLAN | {"seeds": (0,)}
    directory.write_result(result(0))
    directory.close()
    command = [sys.executable, "-c", OPEN_AND_DIE, str(path), json.dumps(other)]
    new = SweepDirectory(path)
    for plan, is_continued in ((other, True), (PLAN, False), (PLAN | {"seeds": (1,)}, False)):
        assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
        (path / "status.json").write_text("{}")
        assert SweepDirectory(path).read_results() == []
        new.open(plan, overwrite=True)
        assert (path / "status.json").exists() == is_continued
        new.close()
        assert len(SweepDirectory(path).read_results()) == 1, "it failed, so the one before it returns"
    assert [each.name for each in path.parent.iterdir() if each.is_dir()] == ["a"]


def test_directory_in_which_another_process_works_stays(directory: SweepDirectory) -> None:
    SweepDirectory(directory.path).open(PLAN, overwrite=False)
    directory.close()
    assert directory.path.is_dir()


def test_other_directories_are_never_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"it exists and is not a sweep's directory"):
            SweepDirectory(tmp_path).open(PLAN, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_results_return_with_their_numbers_and_rungs_apart(directory: SweepDirectory) -> None:
    first = result(1, accuracy=0.1 + 0.2, loss=1 / 3, reason="é")
    directory.write_result(first)
    directory.write_result(result(0, accuracy=math.nan, loss=math.inf, state="diverged"))
    directory.write_result(result(0, accuracy=0.5), rung=0)
    found = SweepDirectory(directory.path).read_results()
    assert found[1] == first
    assert (found[0].state, math.isnan(found[0].accuracy), math.isnan(found[0].loss)) == ("diverged", True, True)
    assert [each.accuracy for each in directory.read_results(0)] == [0.5]
    assert directory.read_results(1) == []


def test_damaged_result_is_a_missing_one(directory: SweepDirectory) -> None:
    directory.write_result(result(0))
    for content in (b"", b"{}", b"[1]", b'{"member": 1, "unknown": 2}'):
        (directory.path / "members/00001.json").write_bytes(content)
        assert [each.member for each in SweepDirectory(directory.path).read_results()] == [0]
        assert not (directory.path / "members/00001.json").exists()


def test_inputs_must_not_change_between_starts(directory: SweepDirectory) -> None:
    inputs = {"tokens": "a", "tokenizer": "b", "frozen_weights": "c", "precision": "fp32", "config": "d"}
    directory.check_inputs(("gpt2", 1), inputs)
    directory.check_inputs(("gpt2", 1), inputs | {"config": "other seeds"})
    directory.check_inputs(("gpt2", 2), inputs | {"frozen_weights": "x"})
    with pytest.raises(UserError, match="frozen weights, precision changed since its first members"):
        SweepDirectory(directory.path).check_inputs(("gpt2", 1), inputs | {"frozen_weights": "x", "precision": "bf16"})


def test_tensors_of_members_that_are_not_best_are_removed(directory: SweepDirectory) -> None:
    for member in range(3):
        directory.write_result(result(member), {"weights.a": torch.full((2,), float(member))})
    directory.keep_tensors([1], [0, 1])
    assert directory.read_tensors(1)["weights.a"].tolist() == [1.0, 1.0]
    assert directory.read_tensors(2)["weights.a"].tolist() == [2.0, 2.0]
    assert directory.read_tensors(0) is None
    (directory.path / "members/00002.safetensors").write_bytes(b"damaged")
    assert directory.read_tensors(2) is None


CLAIM = """
import sys
from pathlib import Path
from agnews_dist.config.schema import Config
from agnews_dist.experiments.members import Wave, build_members
from agnews_dist.experiments.sweep_directory import SweepDirectory
wave = Wave(3, tuple(build_members(Config(), [{"optim.lr": 1.0}], (0,))))
print(SweepDirectory(Path(sys.argv[1])).claim(wave) is not None)
"""


def test_wave_has_one_owner_until_that_one_ends(directory: SweepDirectory) -> None:
    def claim_elsewhere() -> str:
        command = [sys.executable, "-c", CLAIM, str(directory.path)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.strip()

    wave = Wave(3, tuple(build_members(Config(), [{"optim.lr": 1.0}], (0,))))
    lock = directory.claim(wave)
    assert lock is not None
    assert claim_elsewhere() == "False"
    lock.close()
    assert claim_elsewhere() == "True"
    assert not directory.has_ended(wave)
    directory.write_result(result(0))
    assert directory.has_ended(wave)
    assert directory.claim(wave) is None


HOLD = """
import sys, time
from pathlib import Path
from agnews_dist.experiments.sweep_directory import SweepDirectory
lock = SweepDirectory(Path(sys.argv[1])).claim(None)
print("held", flush=True)
time.sleep(600)
"""


def test_process_that_is_waited_for_is_named_and_a_suspended_one_is_an_error(
    directory: SweepDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "SPEAK_SECONDS", 0.0)
    directory.wait_for([None])
    command = [sys.executable, "-c", HOLD, str(directory.path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert directory.claim(None) is None
            directory.wait_for([None])
            assert f"sweep {directory.path}: process {holder.pid} on " in capsys.readouterr().err
            holder.send_signal(signal.SIGSTOP)
            with pytest.raises(UserError, match=rf"process {holder.pid} on .* is suspended\. Let it continue or end it"):
                wait_until(lambda: directory.wait_for([None]), TIMEOUT)
        finally:
            holder.kill()


def test_sweep_is_finished_when_all_that_is_wanted_is_there(directory: SweepDirectory) -> None:
    assert not directory.is_finished()
    (directory.path / "sweep.json").write_text('{"ensemble": [{"name": "ensemble"}]}')
    assert directory.is_finished()
    assert directory.is_finished({"ensemble"})
    assert not directory.is_finished({"ensemble", "distilled"})
