"""Job identity and time limit from Slurm's and torchrun's variables."""

import pytest

from agnews_dist.distributed.slurm import identify_job, is_restarted, slurm_count, slurm_seconds_left


@pytest.mark.parametrize("end", ["", "Unknown", "NONE", "1e9", "999", "²"])
def test_slurm_seconds_left_ignores_impossible_limits(end):
    """999 is in the past at time 1000: a shell keeps the variable of a job that has ended."""
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": end}, 1000.0) is None


def test_slurm_seconds_left_counts_to_the_limit():
    assert slurm_seconds_left({}, 1000.0) is None
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": "1600"}, 1000.5) == 599.5


@pytest.mark.parametrize(("text", "count"), [("8", 8), ("0", 0), ("(null)", None), ("", None), ("-1", None)])
def test_slurm_count_reads_numbers_only(text, count):
    assert slurm_count({"SLURM_GPUS_ON_NODE": text}, "SLURM_GPUS_ON_NODE") == count
    assert slurm_count({}, "SLURM_GPUS_ON_NODE") is None


def test_identify_job_is_the_same_for_all_starts_of_a_job():
    assert identify_job({}) is None
    assert identify_job({"SLURM_JOB_ID": "12", "TORCHELASTIC_RUN_ID": "x"}) == "slurm 12"
    assert identify_job({"TORCHELASTIC_RUN_ID": "mine"}) == "torchrun mine"
    unnamed = identify_job({"TORCHELASTIC_RUN_ID": "none"})
    assert unnamed is not None
    assert unnamed.startswith("torchrun on ")
    assert unnamed == identify_job({"TORCHELASTIC_RUN_ID": "none"}), "named by the agent"


@pytest.mark.parametrize(
    ("environ", "restarted"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "x"}, False),
    ],
)
def test_is_restarted_after_a_first_start(environ, restarted):
    assert is_restarted(environ) is restarted
