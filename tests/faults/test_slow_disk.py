"""A disk on which rank 0 works for longer than `engine.timeout_seconds`: the other ranks wait for it, and say so."""

import re

from support.small_run import differences, finish, read_log, run_directory

TIME_LIMIT = 3
SLOW = {"SLOW_IN": "_begin write_checkpoint export_model", "SLOW_SECONDS": str(TIME_LIMIT + 6)}
"""The begin of the run, a checkpoint in the thread, and the export."""


def test_ranks_wait_for_a_disk_that_is_slower_than_their_time_limit(whole, tmp_path):
    finish(tmp_path, "--engine.timeout_seconds", str(TIME_LIMIT), fault="support.faults:slow_disk", **SLOW)
    output = read_log(tmp_path)
    assert sorted(re.findall(r"^slow fsync in (\w+)$", output, re.M)) == sorted(SLOW["SLOW_IN"].split()), output
    waits = re.findall(
        r"^\[rank 1/2\] waits \d+ s so far: rank 0 \(process \d+ on \S+\) (.+); no time limit while it", output, re.M
    )
    # Of its wait for the checkpoint a busy machine may take so much for the steps that no line is due.
    assert {"begins", "writes"} <= {wait.split(" ")[0] for wait in waits}, output
    assert differences(run_directory(tmp_path), run_directory(whole)) == []
