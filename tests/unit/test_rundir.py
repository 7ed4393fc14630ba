"""The run's directory: claimed once, never overwritten by accident, unwritable places noticed before any work."""

from datetime import datetime
from pathlib import Path

import pytest

from agnews_dist.errors import UserError
from agnews_dist.rundir import claim, run_name


def test_name_is_made_from_model_and_time():
    now = datetime(2026, 1, 31, 23, 59, 58)
    assert run_name(None, "openai-community/gpt2", now) == "gpt2-20260131-235958"
    assert run_name("mine", "gpt2", now) == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc"])
def test_names_that_leave_the_directory_are_refused(name):
    with pytest.raises(UserError, match=r"no plain directory name.*--run.dir"):
        run_name(name, "gpt2", datetime(2026, 1, 1))


def test_claims_and_refuses_an_existing_run(tmp_path):
    directory = claim(tmp_path / "runs", "a", overwrite=False, config_yaml="run: {}\n")
    assert (directory / "config.yaml").read_text() == "run: {}\n"
    (directory / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"/a exists: its results would be lost.*--run.overwrite"):
        claim(tmp_path / "runs", "a", overwrite=False, config_yaml="")
    assert (directory / "result.json").exists()
    claim(tmp_path / "runs", "a", overwrite=True, config_yaml="new\n")
    assert sorted(path.name for path in directory.iterdir()) == ["config.yaml"]


def test_overwrite_deletes_only_what_a_run_wrote(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no config.yaml.*remove it yourself"):
        claim(tmp_path, "thesis", overwrite=True, config_yaml="")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir to a writable directory"):
        claim(tmp_path / "file", "a", overwrite=False, config_yaml="")
    # A read-only file system that even root cannot write to.
    with pytest.raises(UserError, match=r"cannot be written.*Set --run.dir"):
        claim(Path("/proc/nowhere"), "a", overwrite=False, config_yaml="")
