"""The run's directory: one owner, never overwritten by accident, and unwritable places are found before any work."""

import shutil
import signal
import subprocess
import sys
from contextlib import closing
from datetime import datetime
from itertools import islice
from pathlib import Path

import pytest
from support.processes import environment

from agnews_dist.errors import UserError
from agnews_dist.run.directory import RunDirectory, is_in_use, new_names


def test_new_names_are_made_from_model_and_time():
    names = new_names("openai-community/gpt2", datetime(2026, 1, 31, 23, 59, 58))
    assert list(islice(names, 3)) == ["gpt2-20260131-235958", "gpt2-20260131-235958-2", "gpt2-20260131-235958-3"]


def test_reserved_name_belongs_to_one_start(tmp_path):
    create(tmp_path, "finished")
    (tmp_path / ".other.starting").mkdir()  # of another host, whose locks are not seen here
    with closing(RunDirectory(tmp_path, "new", overwrite=False, config_yaml="x")) as run:
        assert run.reserve()
        assert is_in_use(tmp_path, "new")
        for name in ("new", "finished", "other"):
            assert not RunDirectory(tmp_path, name, overwrite=True, config_yaml="").reserve(), name
        run.create()
        run.commit()
        assert (tmp_path / "new" / "config.yaml").read_text() == "x"
    assert not is_in_use(tmp_path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.starting", "finished", "new"]
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir"):
        RunDirectory(tmp_path / "new" / "config.yaml", "a", overwrite=False, config_yaml="").reserve()


def test_directory_that_is_moved_is_followed_and_a_removed_one_is_an_error(tmp_path):
    with closing(RunDirectory(tmp_path / "runs", "a", overwrite=False, config_yaml="")) as run:
        run.lock()
        run.create()
        assert run.locate() == run.staging
        run.commit()
        assert (run.locate(), run.take_notice()) == (tmp_path / "runs" / "a", None)
        (tmp_path / "runs").rename(tmp_path / "old")
        (tmp_path / "runs" / "a").mkdir(parents=True)  # another run of this name is not this one
        assert not run.is_in_place
        moved = tmp_path / "old" / "a"
        assert run.locate() == moved
        notice = f"run {tmp_path}/runs/a: its directory was moved to {moved}, and the run continues there."
        assert (run.take_notice(), run.take_notice()) == (notice, None)
        assert run.is_in_place
        shutil.rmtree(moved)
        with pytest.raises(UserError, match=r"old/a: its directory was removed while the run writes there.*\. Start it"):
            run.locate()
    assert list((tmp_path / "old").iterdir()) == [], "the lock file was found too"


def create(runs: Path, name: str, *, overwrite: bool = False, commit: bool = True) -> Path:
    """Create a run's directory, and begin the run unless `commit` is False; return its path."""
    with closing(RunDirectory(runs, name, overwrite=overwrite, config_yaml="run: {}\n")) as run:
        run.create()
        assert (run.staging / "config.yaml").read_text() == "run: {}\n"
        if commit:
            run.commit()
            assert (run.directory / "config.yaml").read_text() == "run: {}\n"
    return run.directory


def test_create_refuses_an_existing_run_unless_it_may_be_overwritten(tmp_path):
    directory = create(tmp_path / "runs", "a")
    (directory / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"/a exists: its results would be lost.*--run.overwrite"):
        create(tmp_path / "runs", "a")
    assert (directory / "result.json").exists()
    create(tmp_path / "runs", "a", overwrite=True)
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["a", "config.yaml"]


def test_run_that_never_began_leaves_everything_as_it_was(tmp_path):
    directory = create(tmp_path / "runs", "a", commit=False)
    assert not directory.exists()
    create(tmp_path / "runs", "a")
    (directory / "result.json").write_text("{}")
    create(tmp_path / "runs", "a", overwrite=True, commit=False)
    assert (directory / "result.json").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_start_that_was_killed_loses_nothing(tmp_path, overwrite):
    # Nothing is closed: this is the state after a SIGKILL, before and in the middle of `commit()`.
    RunDirectory(tmp_path, "new", overwrite=overwrite, config_yaml="").create()
    create(tmp_path, "new", overwrite=overwrite)
    (tmp_path / "new" / "result.json").write_text("{}")
    RunDirectory(tmp_path, "new", overwrite=True, config_yaml="").create()
    assert (tmp_path / "new" / "result.json").exists()
    (tmp_path / "new").rename(tmp_path / ".new.replaced")
    with pytest.raises(UserError, match="exists: its results would be lost"):
        create(tmp_path, "new")
    assert (tmp_path / "new" / "result.json").exists()
    create(tmp_path, "new", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "config.yaml"]


def test_run_directory_that_is_not_created_touches_nothing(tmp_path):
    directory = create(tmp_path / "runs", "a")
    with closing(RunDirectory(tmp_path / "runs", "a", overwrite=True, config_yaml="")):
        pass
    assert (directory / "config.yaml").exists()


def test_overwrite_deletes_only_directories_of_runs(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no config.yaml.*remove it yourself"):
        create(tmp_path, "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_run_does_not_replace_a_sweep_that_began_after_it(tmp_path):
    with closing(RunDirectory(tmp_path, "a", overwrite=True, config_yaml="")) as run:
        run.create()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "plan.json").write_text("{}")
        with pytest.raises(UserError, match=r"/a: it is a sweep, and not a run\. Choose another --run\.name"):
            run.commit()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "plan.json"]


def test_create_reports_an_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir to a writable directory"):
        create(tmp_path / "file", "a")
    # A file system that even root cannot write to.
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir"):
        create(Path("/proc/nowhere"), "a")


def test_resumed_run_keeps_its_files_and_gets_the_new_config(tmp_path):
    directory = create(tmp_path, "a")
    (directory / "events.jsonl").write_text("{}\n")
    with closing(RunDirectory(tmp_path, "a", overwrite=False, config_yaml="run: {seed: 1}\n")) as run:
        run.lock()
        assert run.path == directory
        assert (directory / "config.yaml").read_text() == "run: {}\n", "nothing is written before the run begins"
        run.commit()
    assert (directory / "config.yaml").read_text() == "run: {seed: 1}\n"
    assert (directory / "events.jsonl").read_text() == "{}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


OWNER = """
import sys, time
from pathlib import Path
from contextlib import closing
from agnews_dist.run.directory import RunDirectory
with closing(RunDirectory(Path(sys.argv[1]), "a", overwrite=True, config_yaml="")) as run:
    run.lock()
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
    print("released", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_lock_excludes_other_processes_until_its_owner_ends(tmp_path, killed):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path, "60"], stdout=subprocess.PIPE, env=environment())
    with owner:
        assert owner.stdout.readline() == b"locked\n"
        try:
            with pytest.raises(UserError, match=rf"/a is being written by another process: process {owner.pid} on .*Wait for"):
                RunDirectory(tmp_path, "a", overwrite=True, config_yaml="").lock(0.5)
        finally:
            owner.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
            owner.wait()
    with closing(RunDirectory(tmp_path, "a", overwrite=True, config_yaml="")) as run:
        run.lock()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_lock_waits_for_an_owner_that_is_ending(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path, "1"], stdout=subprocess.PIPE, env=environment())
    with owner:
        assert owner.stdout.readline() == b"locked\n"
        with closing(RunDirectory(tmp_path, "a", overwrite=True, config_yaml="")) as run:
            run.lock()
            assert owner.stdout.readline() == b"released\n"
            # The lock file of the first owner is gone; the new one is locked as well.
            with pytest.raises(UserError, match="is being written"):
                RunDirectory(tmp_path, "a", overwrite=True, config_yaml="").lock(0.3)
