"""Fixtures of the Slurm tests: one cluster of two nodes per test file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import slurm_cluster as cluster
from support import small_run
from support.processes import environment
from support.settings import group_by_section
from support.tools import skip_without


@pytest.fixture(scope="module")
def lab() -> Iterator[cluster.Lab]:
    """A cluster of two nodes."""
    skip_without(*cluster.PROGRAMS)
    with cluster.Lab() as running:
        yield running


@pytest.fixture(scope="module")
def environ(lab: cluster.Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a user's shell on the login node."""
    # A new cache, on a file system that the nodes share: here every file system.
    settings = environment(XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")))
    del settings["CUDA_VISIBLE_DEVICES"]  # set by Slurm
    # On loopback all nodes have the first one's address, which the rendezvous check refuses.
    on_loopback = {"PREFLIGHT": "off", "GLOO_SOCKET_IFNAME": "lo", "ADDRESS": "127.0.0.1"}
    return settings if lab.is_networked else settings | on_loopback


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a short real training."""
    path = tmp_path_factory.mktemp("config") / "short.yaml"
    path.write_text(yaml.safe_dump(group_by_section({**small_run.settings(), "optim.epochs": 1})))
    return path
