"""One cluster per test file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm_cluster as cluster
from support.processes import REPOSITORY, environment


@pytest.fixture(scope="module")
def lab() -> Iterator[cluster.Lab]:
    """Two nodes, up until the file's last test."""
    if lacking := cluster.missing():
        pytest.skip(f"no {', '.join(lacking)}: apt-get install slurm-wlm munge")
    with cluster.Lab() as running:
        yield running


@pytest.fixture(scope="module")
def environ(lab: cluster.Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a user's shell on the login node exports."""
    # Compilers and caches see the nodes' common file system, which here is everything.
    settings = environment(XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")))
    del settings["CUDA_VISIBLE_DEVICES"]  # Slurm's to say
    # On loopback every node has the first one's address, which the check refuses, and there may be no other way.
    on_loopback = {"PREFLIGHT": "off", "GLOO_SOCKET_IFNAME": "lo", "ADDRESS": "127.0.0.1"}
    return settings if lab.is_networked else settings | on_loopback


@pytest.fixture(scope="module")
def quickstart() -> Path:
    """The configuration of a short real training."""
    return REPOSITORY / "configs" / "quickstart.yaml"
