"""A bit that flips on one rank ends the run by name, before wrong weights are scored or saved; the run resumes."""

import json
import os
import re
from pathlib import Path

import collectives
import pytest
from support.processes import TIMEOUT
from support.small_run import differences, finish, read_status, run_directory, start, wait_for


def test_weights_that_differ_are_not_saved_and_the_run_resumes(whole, tmp_path):
    fault = {"FAULT": "flip", "AT_STEP": "10", "ON_RANK": "1"}
    output = wait_for(start(tmp_path, fault="support.faults:inject", **fault), tmp_path, 1)
    (line,) = [line for line in output.splitlines() if "error: " in line]
    # A checkpoint every 7 steps, unless the last one is still being written.
    assert re.match(r"\[rank 1/2\] error: weights after step (14|21|28|35|38) on rank 1: other bits than on rank 0\. A ", line)
    assert "Traceback" not in output
    assert read_status(tmp_path) == {**read_status(tmp_path), "state": "failed", "step": 7}
    assert [path.name for path in (run_directory(tmp_path) / "checkpoints").iterdir()] == ["step-00000007"]
    finish(tmp_path)
    assert differences(run_directory(tmp_path), run_directory(whole)) == []


@pytest.mark.timeout(4 * TIMEOUT)
def test_faults_in_communication_end_right_or_with_a_named_error(tmp_path):
    """Run a sample of the campaign. Repeat a failure by setting AGNEWS_FAULTS_SEED to the printed seed."""
    seed = os.environ.get("AGNEWS_FAULTS_SEED")
    words = ["--sample", "4", "--directory", str(tmp_path / "cases"), "--json", str(tmp_path / "cases.jsonl")]
    assert collectives.main([*words, *(["--seed", seed] if seed else [])]) == 0
    cases = [json.loads(line) for line in Path(tmp_path / "cases.jsonl").read_text().splitlines()]
    assert {case["fault"] for case in cases} == set(collectives.FAULTS)
    assert {case["outcome"] for case in cases} <= set(collectives.RIGHT)
