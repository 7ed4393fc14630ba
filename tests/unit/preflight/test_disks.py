"""Disk checks: probes write where a run would create its directory, and leave nothing behind."""

import errno
import fcntl
import os

import pytest

from agnews_dist.preflight.disks import probe_directory, wait_for_file


def test_probe_directory_creates_no_directory(tmp_path):
    assert probe_directory("run.dir", tmp_path / "a" / "runs", 1).verdict == "ok"
    assert list(tmp_path.iterdir()) == []


def test_probe_directory_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert probe_directory("run.dir", tmp_path / "file", 1).found == f"{tmp_path}/file is Not a directory"
    assert probe_directory("run.dir", tmp_path / "file" / "runs", 1).verdict == "fail"
    assert probe_directory("run.dir", tmp_path / "link" / "runs", 1).verdict == "fail"


def test_probe_directory_without_enough_space(tmp_path):
    too_much = 10**18
    assert probe_directory("run.dir", tmp_path, too_much).verdict == "fail"
    assert probe_directory("run.dir", tmp_path, 1, optional_bytes=too_much).verdict == "warn"
    assert probe_directory("run.dir", tmp_path, 1).verdict == "ok"


def test_probe_directory_without_locks_is_a_warning(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    finding = probe_directory("run.dir", tmp_path, 1)
    assert (finding.verdict, finding.remedy) == ("warn", "Mount it with locks")
    assert finding.found.endswith("; it has no file locks, so features are not kept there")


def test_wait_for_file_finds_a_file(tmp_path):
    (tmp_path / "marker").touch()
    assert wait_for_file(tmp_path / "marker")


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (errno.ENOSPC, "is full: No space left on device"),
        (errno.EROFS, "is not writable: Read-only file system"),
        (errno.EIO, "is Input/output error"),
    ],
)
def test_probe_directory_explains_failures(tmp_path, monkeypatch, number, found):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    finding = probe_directory("run.dir", tmp_path, 1)
    assert (finding.verdict, finding.found) == ("fail", f"{tmp_path} {found}")
    assert list(tmp_path.iterdir()) == []
