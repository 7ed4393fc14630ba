"""Disk checks: nodes that probe a new directory at the same time, and leave nothing behind."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from agnews_dist.preflight.disks import list_missing_parents, probe_directory, remove_empty, wait_for_file


def test_probe_directory_on_several_nodes_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            directory = tmp_path / str(number) / "runs"
            created = list_missing_parents(directory)
            findings = list(pool.map(lambda _, path=directory: probe_directory("run.dir", path, 1), range(8)))
            assert {finding.verdict for finding in findings} == {"ok"}, findings
            remove_empty(created)
            assert list(tmp_path.iterdir()) == []


def test_probe_directory_without_enough_space(tmp_path):
    too_much = 10**18
    assert probe_directory("run.dir", tmp_path, too_much).verdict == "fail"
    assert probe_directory("run.dir", tmp_path, 1, optional_bytes=too_much).verdict == "warn"
    assert probe_directory("run.dir", tmp_path, 1).verdict == "ok"


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
