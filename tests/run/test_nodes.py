"""launch/node.sh on two hosts without any cluster software: a real training, and what it says when they cannot meet."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.network_hosts import Hosts, can_be_made, listening
from support.processes import REPOSITORY, environment

NODE = str(REPOSITORY / "launch" / "node.sh")
QUICKSTART = ("--config", str(REPOSITORY / "configs" / "quickstart.yaml"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if not can_be_made():
        pytest.skip("only root makes network namespaces")
    with Hosts(["first", "second"], tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def start(hosts: Hosts, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(host: str, *arguments: str, script: str = NODE, **environ: str) -> subprocess.Popen[str]:
        number = str(hosts.names.index(host))
        # What Kubernetes' operator tells a pod, which is a node here and no rank.
        pod = {"RANK": number, "WORLD_SIZE": "2"}
        process = subprocess.Popen(
            [*hosts.inside(host), script, *arguments],
            env=environment(
                **{"NODES": "2", "NODE": number, "NPROC": "1", "LOGS": f"{tmp_path}/logs", **pod, **environ}
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_training_on_two_hosts(hosts: Hosts, start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    head = hosts.address("first")
    # The second first, long before anybody listens.
    nodes = [
        start(name, *QUICKSTART, "--run.name", "two hosts", HEAD=head, PORT="29500") for name in ("second", "first")
    ]
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    result = json.loads((tmp_path / "runs" / "two hosts" / "result.json").read_text())
    assert result["num_ranks"] == 2
    story = next(text for text in (tmp_path / "logs" / "rank-0.log").read_text().split("== ") if text)
    assert "ranks      2 (1 per node)" in story
    # Shown as well, by the node that has rank 0, and by no other.
    assert sorted("run started on" in out for out, _ in said) == [False, True]
    ranks = {
        re.findall(r"== (rank \d of 2 on \w+)", path.read_text())[0] for path in (tmp_path / "logs").glob("rank-*")
    }
    assert {rank.rsplit(" ", 1)[1] for rank in ranks} == {"first", "second"}


@pytest.mark.parametrize(
    ("head", "first", "second"),
    [
        ("nobody", "nobody does not resolve on first", "nobody does not resolve on second"),
        (
            "localhost",
            "localhost is 127.0.0.1 on first: every node's own",
            "localhost is 127.0.0.1 on second: every node's",
        ),
        ("second", "which is not first, though this is node 0", None),
        ("198.51.100.7", "which is not first, though this is node 0", "198.51.100.7 cannot be reached from second"),
    ],
)
def test_a_head_that_is_none_is_told_at_once(
    start: Callable[..., subprocess.Popen[str]], head: str, first: str, second: str | None
) -> None:
    for host, expected in (("first", first), ("second", second)):
        node = start(host, HEAD=head, PORT="29501")
        if expected is None:
            continue
        _, err = node.communicate(timeout=30)
        assert node.returncode == 1
        assert "error: rendezvous: " in err
        assert expected in err
        assert "Traceback" not in err


def test_a_taken_port_is_told_with_its_owner(hosts: Hosts, start: Callable[..., subprocess.Popen[str]]) -> None:
    with listening(hosts.inside("first"), 29502) as owner:
        node = start("first", HEAD=hosts.address("first"), PORT="29502")
        _, err = node.communicate(timeout=30)
    assert node.returncode == 1
    assert f"port 29502 of first is taken by process {owner} (python" in err
    assert "Choose another PORT" in err


def test_the_head_may_know_itself_as_loopback(hosts: Hosts, tmp_path: Path) -> None:
    """Debian's way of writing /etc/hosts is a warning on the first node, since the others see another address."""
    (tmp_path / "debian").write_text("127.0.0.1 localhost\n127.0.1.1 first\n")
    look = [
        sys.executable,
        "-m",
        "agnews_dist",
        "doctor",
        "--endpoint",
        "first:29503",
        "--nodes",
        "2",
        "--node",
        "0",
    ]
    done = subprocess.run(
        [
            *hosts.inside("first"),
            "sh",
            "-ec",
            'mount --bind "$0" /etc/hosts; exec "$@"',
            str(tmp_path / "debian"),
            *look,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: rendezvous: first is 127.0.1.1 on itself" in done.stderr


def test_one_node_alone_needs_no_name(hosts: Hosts, tmp_path: Path) -> None:
    """Containers often have one that nothing resolves; torchrun looks for it for a minute and more."""
    done = subprocess.run(
        [*hosts.inside("nameless"), NODE, "--help"],
        env=environment(NODES="1", NPROC="2"),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=45,
    )
    assert done.returncode == 0, done.stderr
    assert "--optim.lr" in done.stdout
    assert "cannot be retrieved" not in done.stderr


@pytest.mark.parametrize("preflight", ["on", "off"])
def test_the_interface_is_the_one_that_leads_to_the_head_unless_told(
    hosts: Hosts, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, preflight: str
) -> None:
    """What torchrun would be started with, and what it would tell gloo and NCCL."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $*"\n')
    show.chmod(0o755)
    # A container's runtime that starts nothing but our own small programs.
    runtime = tmp_path / "runtime"
    runtime.write_text(f'#!/bin/sh\ncase "$3" in agnews_dist.*) exec "$@" ;; *) exec {show} "$@" ;; esac\n')
    runtime.chmod(0o755)
    told = {"HEAD": hosts.address("first"), "CONTAINER": str(runtime), "PREFLIGHT": preflight, "LOGS": ""}
    out, err = start("second", **told).communicate(timeout=60)
    assert out.startswith("eth0 =eth0 "), err
    assert f"--local_addr {hosts.address('second')} " in out
    out, err = start("second", **told, GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="ib0").communicate(timeout=60)
    assert out.startswith("lo ib0 "), err
    assert f"--local_addr {hosts.address('second')} " in out


def test_the_doctor_under_a_bare_srun_where_names_lead_nowhere(hosts: Hosts, tmp_path: Path) -> None:
    """Each node knows itself as loopback, as Debian writes it, and the other not at all; gloo by itself would go by that."""
    ranks: list[subprocess.Popen[str]] = []
    for number, name in enumerate(hosts.names):
        (tmp_path / name).write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        place = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        head = {"MASTER_ADDR": hosts.address("first"), "MASTER_PORT": "29504"}
        own = ["sh", "-ec", 'mount --bind "$0" /etc/hosts; exec "$@"', str(tmp_path / name)]
        doctor = [
            sys.executable,
            "-m",
            "agnews_dist",
            "doctor",
            *QUICKSTART,
            "--json",
            "--run.dir",
            str(tmp_path / "runs"),
        ]
        ranks.append(
            subprocess.Popen(
                [*hosts.inside(name), *own, *doctor],
                env=environment(**place, **head),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
        )
    said = [rank.communicate(timeout=150) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    found = {row["check"]: row["found"] for row in json.loads(said[0][0])["findings"]}
    assert found["world"] == "2 rank(s) on 2 node(s): first, second"
    assert found["host names"] == "first does not know second; second does not know first"
    assert found["pairs of ranks"].startswith("between nodes ")
    assert found["shared: run.dir"] == "seen from every node"


def dry(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """What node.sh would do, from a clean environment."""
    clean = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    return subprocess.run(
        [NODE, "--optim.lr", "1"],
        env={**clean, "DRY_RUN": "1", **environ},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"NODES": "two"}, "NODES='two' is no number"),
        ({"NODES": "2", "NODE": "2", "HEAD": "a"}, "NODE=2 of NODES=2: nodes count from 0"),
        ({"NODES": "2"}, "NODES=2 without HEAD"),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks on 2 node(s)"),
        ({"NODES": "2", "HEAD": "a", "NPROC": "many"}, "NPROC='many' is no count"),
    ],
)
def test_wrong_variables(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    done = dry(tmp_path, **environ)
    assert done.returncode == 2
    assert f"error: {expected}" in done.stderr


def test_a_mig_slice_is_one_device_and_a_container_goes_before_python(tmp_path: Path) -> None:
    shown = {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b", "CONTAINER": "env INSIDE=1"}
    done = dry(tmp_path, NODES="3", NODE="1", HEAD="gpu1", **shown)
    assert done.stdout.startswith("env INSIDE=1 ")
    assert "--nproc_per_node 1 " in done.stdout
    assert "--nnodes 3 --rdzv_backend c10d --rdzv_endpoint gpu1:29400" in done.stdout


def test_kubernetes_pods_start_their_node(tmp_path: Path) -> None:
    manifest: dict[str, Any] = yaml.safe_load((REPOSITORY / "launch" / "kubernetes.yaml").read_text())
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 1}
    assert replicas["Worker"]["template"] == replicas["Master"]["template"]
    [container] = replicas["Worker"]["template"]["spec"]["containers"]
    # The manifest's own words, with the repository where it is here.
    words = [word.replace("/agnews_dist/", f"{REPOSITORY}/") for word in [*container["command"], *container["args"]]]
    own = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"] == "RUN"}
    for told, number in (
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "agnews-master-0"}, "agnews-master-0"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, os.uname().nodename),
    ):
        clean = {name: value for name, value in environment().items() if name not in {"WORLD_SIZE", "RANK"}}
        done = subprocess.run(
            words,
            env={**clean, **own, **told, "MASTER_PORT": "23456", "DRY_RUN": "1"},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert f"--nnodes 2 --rdzv_backend c10d --rdzv_endpoint {number}:23456" in done.stdout
        assert done.stdout.rstrip().endswith("-m agnews_dist train --run.name agnews --config my.yaml")
