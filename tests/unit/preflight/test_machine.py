"""Checks of one rank: GPUs that torch does not see, room for the data at hand."""

import pytest

from agnews_dist.preflight import machine


@pytest.mark.parametrize(
    ("environ", "wanted", "num_gpus"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}, "auto", 8),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "auto", 2),
        # No variable: the device files count, as with a broken driver on a workstation.
        ({}, "auto", 3),
        # A CPU is intended.
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}, "cpu", None),
        ({"CUDA_VISIBLE_DEVICES": ""}, "auto", None),
        ({"SLURM_JOB_ID": "7"}, "auto", None),
    ],
)
def test_check_cpu_fails_if_there_are_gpus_that_torch_does_not_see(tmp_path, monkeypatch, environ, wanted, num_gpus):
    for name in ("nvidia0", "nvidia1", "nvidia15", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "DEVICE_FILES", tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    finding = machine._check_cpu(wanted, "fp32")
    if num_gpus is None:
        assert finding.verdict == "ok"
    else:
        assert finding.verdict == "fail"
        assert f"sees no GPU, though {num_gpus} are here: the job would run on the CPU" in finding.found


def test_room_for_tokens_follows_the_size_of_local_data(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("train.csv", "part/test.csv"):
        (tmp_path / name).write_bytes(b"x" * 400)
    assert machine._estimate_tokens(tmp_path / "train.csv") == 100
    assert machine._estimate_tokens(tmp_path) == 200
    assert machine._estimate_tokens(tmp_path / "owner" / "on_the_hub") == machine.AG_NEWS_TOKENS
