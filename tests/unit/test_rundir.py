"""The run's directory: claimed once, never overwritten by accident, unwritable places noticed before any work."""

from datetime import datetime
from pathlib import Path

import pytest

from agnews_dist.errors import UserError
from agnews_dist.rundir import Claim, run_name


def test_name_is_made_from_model_and_time():
    now = datetime(2026, 1, 31, 23, 59, 58)
    assert run_name(None, "openai-community/gpt2", now) == "gpt2-20260131-235958"
    assert run_name("mine", "gpt2", now) == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc"])
def test_names_that_leave_the_directory_are_refused(name):
    with pytest.raises(UserError, match=r"no plain directory name.*--run.dir"):
        run_name(name, "gpt2", datetime(2026, 1, 1))


def take(runs: Path, name: str, *, overwrite: bool = False, keep: bool = True) -> Path:
    with Claim(runs, name, overwrite=overwrite, config_yaml="run: {}\n") as claim:
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
    Claim(tmp_path, "new", overwrite=overwrite, config_yaml="").take()
    take(tmp_path, "new", overwrite=overwrite)
    (tmp_path / "new" / "result.json").write_text("{}")
    Claim(tmp_path, "new", overwrite=True, config_yaml="").take()
    assert (tmp_path / "new" / "result.json").exists()
    (tmp_path / "new").rename(tmp_path / ".new.replaced")
    with pytest.raises(UserError, match="exists: its results would be lost"):
        take(tmp_path, "new")
    assert (tmp_path / "new" / "result.json").exists()
    take(tmp_path, "new", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "config.yaml"]


def test_a_claim_never_taken_touches_nothing(tmp_path):
    directory = take(tmp_path / "runs", "a")
    with Claim(tmp_path / "runs", "a", overwrite=True, config_yaml=""):
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
