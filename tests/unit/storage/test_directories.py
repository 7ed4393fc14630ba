"""Cache root, used and free disk space."""

import pwd
import re
import shutil
from pathlib import Path

import pytest

from agnews_dist.storage.directories import cache_root, check_directory_name, expand_path, free_disk_bytes, used_disk_bytes


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs", "runs"),
        ("./a//b/", "./a//b/"),
        ("~", "/home/me"),
        ("~/runs", "/home/me/runs"),
        ("a/~/b", "a/~/b"),
        ("./~/b", "./~/b"),
        ("$SCRATCH/runs", "/scratch/runs"),
        ("${SCRATCH}2/runs", "/scratch2/runs"),
        ("a$$b/$SCRATCH", "a$b//scratch"),
        ("$$SCRATCH", "$SCRATCH"),
        ("$$$$", "$$"),
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"),
    ],
)
def test_expand_path_replaces_home_and_variables(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert expand_path(text) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOPE/runs", "the variable 'NOPE' is not set"),
        ("a/${NOPE}", "the variable 'NOPE' is not set"),
        ("$EMPTY", "the variable 'EMPTY' is empty. Set it"),
        ("${NOPE:-/tmp}", "a $ without a name"),
        ("$(date)", "a $ without a name"),
        ("${HOME", "a $ without a name"),
        ("${{HOME}}", "a $ without a name"),
        ("a$", "a $ without a name"),
        ("a\0b", "a path has no NUL character"),
        ("~no_such_user/x", "the user 'no_such_user' does not exist"),
    ],
)
def test_expand_path_refuses_what_it_cannot_replace(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError, match=re.escape(message)):
        expand_path(text)


def test_check_directory_name_refuses_names_that_leave_the_directory() -> None:
    for name in ("mine", "gpt2-20260131", "a.b", "café", ".hidden", "a b"):
        assert check_directory_name(name) == name
    for name in ("", ".", "..", "a/b", "/a", "../a", "a/", "a\nb", "a\0b", "\x1b[31m"):
        with pytest.raises(ValueError, match=r"plain directory name. Use letters.*run.dir"):
            check_directory_name(name)


def test_cache_root_follows_setting_then_xdg_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(str(tmp_path / "mine")) == tmp_path / "mine"
    assert cache_root(None) == tmp_path / "xdg" / "agnews_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == tmp_path / "home" / ".cache" / "agnews_dist"


def test_used_disk_bytes_counts_written_files_below(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    empty = used_disk_bytes(tmp_path)
    (tmp_path / "below" / "file").write_bytes(b"x" * 100_000)
    assert 100_000 <= used_disk_bytes(tmp_path) - empty < 200_000
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(10**9)
    assert used_disk_bytes(tmp_path) < 10**6


def test_free_disk_bytes_of_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert free > 0
    assert free_disk_bytes(tmp_path / "a" / "b" / "c") == pytest.approx(free, rel=0.1)
    assert free_disk_bytes(Path("relative") / "to" / "the" / "working" / "directory") > 0


def test_free_disk_bytes_is_that_of_the_directorys_file_system(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    free = shutil.disk_usage(shared).free
    assert abs(free - shutil.disk_usage(tmp_path).free) > 10**8, "the test needs two that differ"
    assert free_disk_bytes(shared / "new") == pytest.approx(free, abs=10**7)
