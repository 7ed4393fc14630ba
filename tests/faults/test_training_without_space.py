"""A disk that is full or read-only does not end a training, and never leaves a checkpoint that looks whole and is not."""

import re
import subprocess

import pytest
from support.small_run import differences, end, finish, start, told
from support.timeline import Timeline

from agnews_dist.training.checkpoint import checkpoints, read_checkpoint

ARRANGE = "support.faults:arrange"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_training_goes_on_while_the_disk_is_full(small_disk, tmp_path):
    whole = finish(tmp_path / "whole")
    given = ("--run.dir", str(small_disk / "runs"))
    job = start(tmp_path, *given, before=ARRANGE, AT_STEP="20", WHAT="fill", UNTIL="60", FILLED=str(small_disk))
    said = end(job, tmp_path)
    run = small_disk / "runs" / "small"
    assert (
        len(
            re.findall(
                r"warning: the checkpoint of step \d+ could not be written to \S+ \(No space left on device\)", said
            )
        )
        > 1
    )
    assert re.search(
        r"warning: \S+events.jsonl cannot be written \(No space left on device\): what the run says now is kept", said
    )
    assert differences(run, whole) == [], "every step is in the log, and the weights are the same"
    found = [read_checkpoint(path) for path in checkpoints(run / "checkpoints")]
    assert [found[0].state["step"], len(found)] == [225, 2]
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_run_killed_while_the_disk_is_full_goes_on_from_the_last_whole_checkpoint(small_disk, tmp_path):
    whole = finish(tmp_path / "whole")
    given = ("--run.dir", str(small_disk / "runs"))
    job = start(tmp_path, *given, before="support.faults:fill_then_kill", FILLED=str(small_disk))
    end(job, tmp_path, [-9, -9])
    run = small_disk / "runs" / "small"
    assert read_checkpoint(checkpoints(run / "checkpoints")[0]).state["step"] == 14
    (small_disk / "filling").unlink()
    end(start(tmp_path, *given), tmp_path)
    assert "goes on from step 14, attempt 2" in told(tmp_path)
    assert differences(run, whole) == []


def test_a_stop_on_a_full_disk_says_what_is_lost(small_disk, tmp_path):
    given = ("--run.dir", str(small_disk / "runs"))
    job = start(tmp_path, *given, before="support.faults:fill_then_stop", FILLED=str(small_disk))
    said = end(job, tmp_path, 75)
    assert "could not be written" in said
    assert re.search(r"stopped \(SIGTERM\) at step 14, which is saved", said)
    assert Timeline(small_disk / "runs" / "small").saved() == 14
