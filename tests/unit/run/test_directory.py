"""The run's directory: claimed once, never overwritten by accident, unwritable places noticed before any work."""

import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from support.processes import environment

from agnews_dist.errors import UserError
from agnews_dist.run.directory import RunDirectory, run_name


def test_name_is_made_from_model_and_time():
    now = datetime(2026, 1, 31, 23, 59, 58)
    assert run_name(None, "openai-community/gpt2", now) == "gpt2-20260131-235958"
    assert run_name("mine", "gpt2", now) == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc"])
def test_names_that_leave_the_directory_are_refused(name):
    with pytest.raises(UserError, match=r"no plain directory name.*--run.dir"):
        run_name(name, "gpt2", datetime(2026, 1, 1))


def take(runs: Path, name: str, *, overwrite: bool = False, keep: bool = True) -> Path:
    with RunDirectory(runs, name, overwrite=overwrite, config_yaml="run: {}\n") as claim:
        claim.take()
        assert (claim.staging / "config.yaml").read_text() == "run: {}\n"
        if keep:
            claim.keep()
            assert (claim.directory / "config.yaml").read_text() == "run: {}\n"
    return claim.directory


def test_claims_and_refuses_an_existing_run(tmp_path):
    directory = take(tmp_path / "runs", "a")
    (directory / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"/a exists: its results would be lost.*--run.overwrite"):
        take(tmp_path / "runs", "a")
    assert (directory / "result.json").exists()
    take(tmp_path / "runs", "a", overwrite=True)
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["a", "config.yaml"]


def test_a_run_that_never_began_leaves_everything_as_it_was(tmp_path):
    directory = take(tmp_path / "runs", "a", keep=False)
    assert not directory.exists()
    take(tmp_path / "runs", "a")
    (directory / "result.json").write_text("{}")
    take(tmp_path / "runs", "a", overwrite=True, keep=False)
    assert (directory / "result.json").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_start_that_was_killed_costs_nothing(tmp_path, overwrite):
    """No context is left in order: what a SIGKILL leaves behind, before and in the middle of keep()."""
    RunDirectory(tmp_path, "new", overwrite=overwrite, config_yaml="").take()
    take(tmp_path, "new", overwrite=overwrite)
    (tmp_path / "new" / "result.json").write_text("{}")
    RunDirectory(tmp_path, "new", overwrite=True, config_yaml="").take()
    assert (tmp_path / "new" / "result.json").exists()
    (tmp_path / "new").rename(tmp_path / ".new.replaced")
    with pytest.raises(UserError, match="exists: its results would be lost"):
        take(tmp_path, "new")
    assert (tmp_path / "new" / "result.json").exists()
    take(tmp_path, "new", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "config.yaml"]


def test_a_claim_never_taken_touches_nothing(tmp_path):
    directory = take(tmp_path / "runs", "a")
    with RunDirectory(tmp_path / "runs", "a", overwrite=True, config_yaml=""):
        pass
    assert (directory / "config.yaml").exists()


def test_overwrite_deletes_only_what_a_run_wrote(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no config.yaml.*remove it yourself"):
        take(tmp_path, "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir to a writable directory"):
        take(tmp_path / "file", "a")
    # A file system that even root cannot write to.
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir"):
        take(Path("/proc/nowhere"), "a")


def test_a_run_that_goes_on_keeps_its_files_and_gets_the_new_config(tmp_path):
    directory = take(tmp_path, "a")
    (directory / "events.jsonl").write_text("{}\n")
    with RunDirectory(tmp_path, "a", overwrite=False, config_yaml="run: {seed: 1}\n") as claim:
        claim.lock()
        claim.go_on()
        assert claim.path == directory
        assert (directory / "config.yaml").read_text() == "run: {}\n", "nothing is written before it begins"
        claim.keep()
    assert (directory / "config.yaml").read_text() == "run: {seed: 1}\n"
    assert (directory / "events.jsonl").read_text() == "{}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


HOLDER = """
import sys, time
from pathlib import Path
from agnews_dist.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1]), "a", overwrite=True, config_yaml="") as claim:
    claim.lock()
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    print("let go", flush=True)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_name_belongs_to_one_process_until_its_end(tmp_path, killed):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path, "60"], stdout=subprocess.PIPE, env=environment())
    with holder:
        assert holder.stdout.readline() == b"held\n"
        try:
            with pytest.raises(
                UserError, match=rf"/a is being written by another process \(process {holder.pid} on .*Wait for"
            ):
                RunDirectory(tmp_path, "a", overwrite=True, config_yaml="").lock(0.5)
        finally:
            holder.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
            holder.wait()
    with RunDirectory(tmp_path, "a", overwrite=True, config_yaml="") as claim:
        claim.lock()
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_waited_for_while_its_owner_is_ending(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path, "1"], stdout=subprocess.PIPE, env=environment())
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with RunDirectory(tmp_path, "a", overwrite=True, config_yaml="") as claim:
            claim.lock()
            assert holder.stdout.readline() == b"let go\n"
            # The file of the first owner is gone, and must not be taken for that of this one.
            with pytest.raises(UserError, match="is being written"):
                RunDirectory(tmp_path, "a", overwrite=True, config_yaml="").lock(0.3)
