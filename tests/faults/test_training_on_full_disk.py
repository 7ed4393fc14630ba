"""A full disk does not end a training, and never leaves a checkpoint that looks complete and is not."""

import re
import subprocess

import pytest
from support.small_run import NUM_STEPS, differences, read_log, run_directory, start, wait_for
from support.timeline import Timeline

from agnews_dist.training.checkpoint import list_checkpoints, read_checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_training_continues_while_the_disk_is_full(whole, small_disk, tmp_path):
    options = ("--run.dir", str(small_disk / "runs"))
    fault = {"AT_STEP": "20", "FAULT": "fill", "UNTIL": "60", "FILLED": str(small_disk)}
    output = wait_for(start(tmp_path, *options, fault="support.faults:inject", **fault), tmp_path)
    run = run_directory(small_disk)
    failed = r"warning: checkpoint of step \d+: cannot be written to \S+ \(No space left on device\)"
    assert len(re.findall(failed, output)) > 1
    assert re.search(r"warning: \S+events.jsonl cannot be written \(No space left on device\)", output)
    assert differences(run, run_directory(whole)) == [], "the log has every step, and the weights are the same"
    found = [read_checkpoint(path) for path in list_checkpoints(run / "checkpoints")]
    assert [found[0].state["step"], len(found)] == [NUM_STEPS, 2]
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_run_killed_on_a_full_disk_resumes_from_the_last_complete_checkpoint(whole, small_disk, tmp_path):
    options = ("--run.dir", str(small_disk / "runs"))
    job = start(tmp_path, *options, fault="support.faults:fill_then_kill", FILLED=str(small_disk))
    wait_for(job, tmp_path, [-9, -9])
    run = run_directory(small_disk)
    assert read_checkpoint(list_checkpoints(run / "checkpoints")[0]).state["step"] == 14
    (small_disk / "filling").unlink()
    wait_for(start(tmp_path, *options), tmp_path)
    assert "resumed from step 14, attempt 2" in read_log(tmp_path)
    assert differences(run, run_directory(whole)) == []


def test_stop_on_a_full_disk_reports_the_step_that_is_saved(small_disk, tmp_path):
    options = ("--run.dir", str(small_disk / "runs"))
    job = start(tmp_path, *options, fault="support.faults:fill_then_stop", FILLED=str(small_disk))
    output = wait_for(job, tmp_path, 75)
    assert "cannot be written to" in output
    assert re.search(r"stopped \(SIGTERM\) at step 14, which is saved", output)
    assert Timeline(run_directory(small_disk)).saved() == 14
