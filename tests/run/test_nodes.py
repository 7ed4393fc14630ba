"""launch/node.sh on two simulated hosts: a real training, the rendezvous check, and what it starts in a dry run."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import small_run
from support.network_hosts import Hosts, can_be_made, listening
from support.processes import REPOSITORY, TIMEOUT, environment
from support.tools import skip_without

NODE = str(REPOSITORY / "launch" / "node.sh")
START = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    skip_without("ip")
    if not can_be_made():
        pytest.skip("only root creates network namespaces")
    with Hosts(["first", "second"], tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def start(hosts: Hosts, tmp_path: Path) -> Iterator[START]:
    """Start node.sh on a host, with the variables that a Kubernetes operator sets as well."""
    started: list[subprocess.Popen[str]] = []

    def start_node(host: str, *arguments: str, command: Sequence[str] = (NODE,), **environ: str) -> subprocess.Popen[str]:
        number = str(hosts.names.index(host))
        of_pod = {"RANK": number, "WORLD_SIZE": "2"}
        own = {"NODES": "2", "NODE": number, "NPROC": "1", "LOGS": f"{tmp_path}/logs", **of_pod, **environ}
        process = subprocess.Popen(
            [*hosts.inside(host), *command, *arguments],
            env=environment(**own),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield start_node
    for process in started:
        process.kill()
        process.communicate()


def sky_command(directory: Path) -> str:
    """Return `run` of launch/sky.yaml with places and settings of a small training."""
    task: dict[str, Any] = yaml.safe_load((REPOSITORY / "launch" / "sky.yaml").read_text())
    sections: dict[str, dict[str, object]] = {}
    for key, value in {**small_run.settings(), "optim.epochs": 1, "data.cache_dir": f"{directory}/cache"}.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    (directory / "my.yaml").write_text(yaml.safe_dump(sections))
    return task["run"].replace("launch/node.sh", NODE).replace("/runs", f"{directory}/runs")


@pytest.mark.parametrize("launcher", ["node", "sky"])
def test_node_trains_on_two_hosts(hosts: Hosts, start: START, tmp_path: Path, launcher: str) -> None:
    # The second host starts first, before anything listens.
    if launcher == "node":
        words = small_run.arguments(tmp_path, "--run.name", "two hosts", "--optim.epochs", "1")
        nodes = [start(name, *words, HEAD=hosts.address("first"), PORT="29500") for name in ("second", "first")]
    else:
        ips = "".join(f"{hosts.address(name)}\n" for name in hosts.names)
        task = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": ips, "SKYPILOT_NUM_GPUS_PER_NODE": "0"}
        task["SKYPILOT_TASK_ID"] = "two hosts"
        command = ["bash", "-c", sky_command(tmp_path)]
        nodes = [
            start(name, command=command, NODES="", NODE="", NPROC="", SKYPILOT_NODE_RANK=rank, **task)
            for name, rank in (("second", "1"), ("first", "0"))
        ]
    outputs = [node.communicate(timeout=TIMEOUT) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    result = json.loads((tmp_path / "runs" / "two hosts" / "result.json").read_text())
    assert result["num_ranks"] == 2
    log = next(text for text in (tmp_path / "logs" / "rank-0.log").read_text().split("== ") if text)
    assert "ranks      2 (1 per node)" in log
    # Only the node of rank 0 shows the run.
    assert sorted("run started on" in out for out, _ in outputs) == [False, True]
    headers = {re.findall(r"== (rank \d of 2 on \w+)", path.read_text())[0] for path in (tmp_path / "logs").glob("rank-*")}
    assert {header.rsplit(" ", 1)[1] for header in headers} == {"first", "second"}


@pytest.mark.parametrize(
    ("head", "first", "second"),
    [
        ("nowhere", "nowhere does not resolve on first", "nowhere does not resolve on second"),
        (
            "localhost",
            "localhost is 127.0.0.1 on first, which means each node itself",
            "localhost is 127.0.0.1 on second, which means each node itself",
        ),
        ("second", "which is not first, though this is node 0", None),
        ("198.51.100.7", "which is not first, though this is node 0", "198.51.100.7 cannot be reached from second"),
    ],
)
def test_node_refuses_a_wrong_head(start: START, head: str, first: str, second: str | None) -> None:
    for host, expected in (("first", first), ("second", second)):
        node = start(host, HEAD=head, PORT="29501")
        if expected is None:
            continue
        _, err = node.communicate(timeout=TIMEOUT)
        assert node.returncode == 1
        assert "error: rendezvous: " in err
        assert expected in err
        assert "Traceback" not in err


def test_node_names_the_owner_of_a_taken_port(hosts: Hosts, start: START) -> None:
    with listening(hosts.inside("first"), 29502) as owner:
        node = start("first", HEAD=hosts.address("first"), PORT="29502")
        _, err = node.communicate(timeout=TIMEOUT)
    assert node.returncode == 1
    assert f"port 29502 of first is taken by process {owner} (python" in err
    assert "Choose another PORT" in err


def test_rendezvous_check_warns_if_the_head_is_loopback_on_itself(hosts: Hosts, tmp_path: Path) -> None:
    # Debian's default /etc/hosts: the other nodes see another address.
    (tmp_path / "debian").write_text("127.0.0.1 localhost\n127.0.1.1 first\n")
    mount = ["sh", "-ec", 'mount --bind "$0" /etc/hosts; exec "$@"', str(tmp_path / "debian")]
    check = ["-m", "agnews_dist.preflight.rendezvous_check", "--endpoint", "first:29503", "--nodes", "2", "--node", "0"]
    done = subprocess.run(
        [*hosts.inside("first"), *mount, sys.executable, *check], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning: rendezvous: first is 127.0.1.1 on itself" in done.stderr


def test_node_alone_resolves_no_name(hosts: Hosts, tmp_path: Path) -> None:
    # In containers the host name often does not resolve; torchrun would look it up for a minute.
    done = subprocess.run(
        [*hosts.inside("nameless"), NODE, "--help"],
        env=environment(NODES="1", NPROC="2"),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert "--optim.lr" in done.stdout
    assert "cannot be retrieved" not in done.stderr


@pytest.mark.parametrize("preflight", ["on", "off"])
def test_node_chooses_the_interface_that_leads_to_the_head(hosts: Hosts, start: START, tmp_path: Path, preflight: str) -> None:
    # The output: interfaces of gloo and NCCL, and the arguments of torchrun. The user's values win.
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $*"\n')
    show.chmod(0o755)
    # A container runtime that runs only the small modules, and prints the command of torchrun.
    runtime = tmp_path / "runtime"
    runtime.write_text(f'#!/bin/sh\ncase "$3" in agnews_dist.*) exec "$@" ;; *) exec {show} "$@" ;; esac\n')
    runtime.chmod(0o755)
    environ = {"HEAD": hosts.address("first"), "CONTAINER": str(runtime), "PREFLIGHT": preflight, "LOGS": ""}
    out, err = start("second", **environ).communicate(timeout=TIMEOUT)
    assert out.startswith("eth0 =eth0 "), err
    assert f"--local_addr {hosts.address('second')} " in out
    chosen = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}
    out, err = start("second", **environ, **chosen).communicate(timeout=TIMEOUT)
    assert out.startswith("lo ib0 "), err
    assert f"--local_addr {hosts.address('second')} " in out


def dry_run(tmp_path: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `command`, by default node.sh, with DRY_RUN=1, outside of Slurm."""
    clean = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    return subprocess.run(
        command or [NODE, "--optim.lr", "1"],
        env={**clean, "DRY_RUN": "1", **environ},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"NODES": "two"}, "NODES='two': must be a number"),
        ({"NODES": "2", "NODE": "2", "HEAD": "a"}, "NODE=2 of NODES=2: nodes count from 0"),
        ({"NODES": "2"}, "NODES=2 without HEAD"),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks on 2 node(s)"),
        ({"NODES": "2", "HEAD": "a", "NPROC": "many"}, "NPROC='many': "),
        ({"STORY": "evaluate"}, "STORY=evaluate: the variable is now COMMAND"),
    ],
)
def test_node_refuses_wrong_variables(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    done = dry_run(tmp_path, **environ)
    assert done.returncode == 2
    assert f"error: {expected}" in done.stderr


def test_node_counts_mig_slices_as_one_device_and_uses_a_container(tmp_path: Path) -> None:
    visible = {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b", "CONTAINER": "env INSIDE=1"}
    done = dry_run(tmp_path, NODES="3", NODE="1", HEAD="gpu1", **visible)
    assert done.stdout.startswith("env INSIDE=1 ")
    assert "--nproc_per_node 1 " in done.stdout
    assert "--nnodes 3 --rdzv_backend c10d --rdzv_endpoint gpu1:29400" in done.stdout


def trainjob_command() -> list[str]:
    """Return the command of launch/trainjob.yaml, with this repository in place of the image's."""
    trainer = yaml.safe_load((REPOSITORY / "launch" / "trainjob.yaml").read_text())["spec"]["trainer"]
    return [word.replace("/agnews_dist/", f"{REPOSITORY}/") for word in [*trainer["command"], *trainer["args"]]]


def pod(node: int, **environ: str) -> dict[str, str]:
    """Return the variables that Kubeflow Trainer sets in a pod of two."""
    operator = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "late", "MASTER_PORT": "29504", "NPROC_PER_NODE": "3"}
    return {**{f"PET_{name}": value for name, value in operator.items()}, "NODES": "", "NODE": "", "NPROC": "", **environ}


@pytest.mark.parametrize(
    ("environ", "ranks"), [({}, "3"), ({"PET_NPROC_PER_NODE": "auto"}, "1"), ({"NPROC": "2"}, "2"), ({"RANK": "7"}, "3")]
)
def test_node_takes_the_variables_of_a_pod(tmp_path: Path, environ: dict[str, str], ranks: str) -> None:
    done = dry_run(tmp_path, *trainjob_command(), **pod(1, **environ))
    assert done.returncode == 0, done.stderr
    assert f"--nproc_per_node {ranks} " in done.stdout
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint late:29504 " in done.stdout
    assert "is_host=0" in done.stdout
    assert done.stdout.rstrip().endswith("-m agnews_dist train --run.name agnews --config my.yaml")


def test_launchers_on_one_node_ignore_a_pods_number_of_nodes(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text('#!/bin/sh\ncase "$3" in agnews_dist.*) exec "$@" ;; *) env; exec echo "$$ $*" ;; esac\n')
    runtime.chmod(0o755)
    process = subprocess.Popen(
        [str(REPOSITORY / "launch" / "local.sh")],
        env=environment(**pod(1, CONTAINER=str(runtime))) | {"SLURM_STEP_NUM_NODES": ""},
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    out, _ = process.communicate(timeout=TIMEOUT)
    *variables, command = out.splitlines()
    # torchrun takes defaults from PET_*, and would wait for the second node.
    assert sorted(line.split("=")[0] for line in variables if line.startswith("PET_")) == ["PET_SIGNALS_TO_HANDLE"]
    # Signals reach torchrun: it is the process that the caller started.
    assert command.startswith(f"{process.pid} ")
    assert " --standalone " in command


def test_node_waits_for_the_name_of_the_first_pod(hosts: Hosts, start: START, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text('#!/bin/sh\ncase "$3" in agnews_dist.*) exec "$@" ;; *) exec echo "$@" ;; esac\n')
    runtime.chmod(0o755)
    node = start("second", command=trainjob_command(), **pod(1, CONTAINER=str(runtime), LOGS=""))
    assert node.stderr is not None
    assert node.stderr.readline().startswith("rendezvous: late does not resolve on second (")
    with (hosts.directory / "hosts").open("a") as file:
        file.write(f"{hosts.address('first')} late\n")
    out, err = node.communicate(timeout=TIMEOUT)
    assert (node.returncode, err) == (0, "")
    assert "--rdzv_endpoint late:29504 " in out
