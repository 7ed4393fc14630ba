"""Atomic publishing: a file or directory has its name only when it is whole. Kills are in tests/faults."""

import errno
import os
from pathlib import Path

import pytest

from agnews_dist.errors import UserError
from agnews_dist.storage import atomic


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_text_keeps_the_old_file_if_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic.write_text(path, ["old"])

    def pieces():
        yield "new, " * 100_000
        raise RuntimeError("failed half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        atomic.write_text(path, pieces())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_write_text_does_not_change_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic.write_text(path, ["old"])
    with path.open() as reader:
        atomic.write_text(path, ["new, ", "and longer"])
        assert reader.read() == "old"
    assert path.read_text() == "new, and longer"


def test_write_text_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot write .*missing/file \(No such file or directory\): "):
        atomic.write_text(tmp_path / "missing" / "file", ["x"])


def test_new_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    with atomic.new_directory(path) as staging:
        (staging / "file").write_text("x")
        assert staging.parent == path.parent
        assert staging.name.startswith(".")
        assert not path.exists()
    assert (path / "file").read_text() == "x"
    assert names(path.parent) == ["model"]


def test_new_directory_replaces_an_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "stale").touch()
    with atomic.new_directory(path) as staging:
        (staging / "file").touch()
        assert names(path) == ["stale"]
    assert names(path) == ["file"]
    assert names(tmp_path) == ["model"]


def test_new_directory_is_removed_if_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()

    def fail() -> None:
        with atomic.new_directory(path) as staging:
            (staging / "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["model"]
    assert names(path) == []


def test_new_directory_syncs_its_files_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.name))
    with atomic.new_directory(tmp_path / "model") as staging:
        (staging / "file").touch()
    assert synced == ["file", staging.name, tmp_path.name]
    with atomic.new_directory(tmp_path / "model", sync_files=False) as staging:
        (staging / "file").touch()
    assert synced[3:] == [staging.name, tmp_path.name]


def test_replace_restores_the_old_directory_if_the_rename_fails(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "file").touch()
    with pytest.raises(FileNotFoundError):
        atomic.replace(tmp_path / "missing", path, aside=tmp_path / "aside")
    assert names(tmp_path) == ["run"]
    assert names(path) == ["file"]


def test_discard_removes_files_and_directories_and_ignores_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "kept").touch()
    atomic.discard([tmp_path / name for name in ("directory", "file", "missing")])
    assert names(tmp_path) == ["kept"]


def test_sweep_removes_leftovers_of_matching_names_only(tmp_path: Path) -> None:
    for name in (f".model.{'0' * 32}", f".old-model.{'1' * 32}"):
        (tmp_path / name).mkdir()
    kept = ["model", ".model.short", f".models.{'0' * 32}", f"model.{'0' * 32}"]
    for name in kept:
        (tmp_path / name).mkdir()
    atomic.sweep(tmp_path, "model")
    assert names(tmp_path) == sorted(kept)
    atomic.sweep(tmp_path / "missing", "model")


def test_sync_accepts_a_file_system_that_cannot_sync_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int):
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    atomic.sync(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        atomic.sync(tmp_path)
