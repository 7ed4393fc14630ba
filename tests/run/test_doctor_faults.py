"""The command doctor on machines with planted faults: it finds each fault, names it, and reports no other failure."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fork_server, small_run
from support.hub_server import cache_copy
from support.processes import REPOSITORY, TIMEOUT, environment
from support.tools import requires_tool

DOCTOR = ("-m", "agnews_dist", "doctor")


@dataclass
class Rank:
    """A rank that differs from the others."""

    prefix: Sequence[str] = ()
    """Words before the interpreter, which then starts cold. Without them the rank is forked, with imports done."""
    arguments: Sequence[str] = ()
    environ: dict[str, str] = field(default_factory=dict)
    after_start: Callable[[int], object] = lambda _: None
    """Called with the process id of a forked rank."""


@dataclass
class Report:
    """Output of all ranks."""

    codes: list[int]
    result: dict[str, Any]
    err: str

    def found(self, verdict: str) -> dict[str, str]:
        """Return check -> facts of the findings with this verdict."""
        return {row["check"]: row["found"] for row in self.result["findings"] if row["verdict"] == verdict}


def training() -> tuple[str, ...]:
    """Return the settings of a small training."""
    return tuple(word for key, value in small_run.settings().items() for word in (f"--{key}", str(value)))


def run_doctor(*ranks: Rank, folder: Path, arguments: Sequence[str] | None = None, program: Sequence[str] = DOCTOR) -> Report:
    """Run the doctor on these ranks; their output goes to files in `folder`. `arguments`: by default those of `training`."""
    arguments = training() if arguments is None else arguments
    worlds = fork_server.rank_variables(len(ranks)) if len(ranks) > 1 else [{}]
    waits = [
        start_rank(rank, [*program, *arguments, "--json", *rank.arguments], world, folder / f"rank-{number}")
        for number, (rank, world) in enumerate(zip(ranks, worlds, strict=True))
    ]
    codes = [wait() for wait in waits]
    out, err = (folder / "rank-0.out").read_text(), "".join(path.read_text() for path in folder.glob("rank-*.err"))
    assert out, err
    return Report(codes, json.loads(out), err)


def start_rank(rank: Rank, command: list[str], world: Mapping[str, str], log: Path) -> Callable[[], int]:
    """Start a rank; return a function that waits for its exit code."""
    environ = environment(**{**world, **rank.environ})
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    out.write_text("")
    err.write_text("")
    if not rank.prefix:
        forked = fork_server.start(command, environ, fork_server.Streams(out, err))
        assert forked.pid is not None
        rank.after_start(forked.pid)

        def wait_for_forked() -> int:
            forked.join(TIMEOUT)
            fork_server.abort(forked)
            assert forked.exitcode is not None
            return forked.exitcode

        return wait_for_forked
    with out.open("w") as to_out, err.open("w") as to_err:
        cold = subprocess.Popen(
            [*rank.prefix, sys.executable, *command], env=environ, stdout=to_out, stderr=to_err, cwd=REPOSITORY
        )

    def wait_for_cold() -> int:
        try:
            return cold.wait(TIMEOUT)
        finally:
            cold.kill()

    return wait_for_cold


def test_two_healthy_ranks(tmp_path: Path) -> None:
    directories = ("--run.dir", str(tmp_path / "a" / "runs"), "--data.cache_dir", str(tmp_path / "b" / "cache"))
    report = run_doctor(Rank(), Rank(), folder=tmp_path, arguments=(*training(), *directories))
    assert report.codes == [0, 0], report.err
    assert report.found("fail") == {}
    found = report.found("ok")
    assert found["world"].startswith("2 rank(s) on 1 node(s)")
    assert found["all-reduce"] == "right over gloo"
    assert found["pairs of ranks"] == "1 of 1 pairs exchange data"
    assert found["versions"] == found["configuration"] == "the same on all ranks"
    assert report.result["fits"] is True
    # The probes leave no file, and no directory that they created.
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


ON_ITS_OWN_HOST = """
import os, socket, sys
from agnews_dist.__main__ import main
socket.gethostname = lambda: f"host{os.environ['RANK']}"
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_one_rank_on_each_of_two_nodes(tmp_path: Path) -> None:
    node = Rank(environ={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    report = run_doctor(node, node, folder=tmp_path, program=("-c", ON_ITS_OWN_HOST))
    assert report.codes == [0, 0], report.err
    found = report.found("ok")
    assert found["world"] == "2 rank(s) on 2 node(s): host0, host1"
    assert found["pairs of ranks"] == "1 of 1 pairs exchange data"
    assert found["shared: run.dir"] == "visible on every node"


def test_different_versions_and_settings_and_a_missing_rank(tmp_path: Path) -> None:
    other = tmp_path / "accelerate-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 9.9.9\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    odd = Rank(arguments=("--optim.lr", "0.5"), environ=paths)
    report = run_doctor(Rank(), odd, folder=tmp_path, arguments=(*training(), "--ranks", "4"))
    assert report.codes == [1, 1], report.err
    failures = report.found("fail")
    assert set(failures) == {"versions", "configuration", "world"}
    assert re.fullmatch(r"accelerate \S+ on rank 0, 9\.9\.9 on rank 1", failures["versions"])
    assert failures["configuration"] == "optim.lr 0.002 on rank 0, 0.5 on rank 1"
    assert failures["world"].startswith("2 rank(s) on 1 node(s)")
    assert failures["world"].endswith("4 were expected")
    assert "error: 3 of " in report.err


@requires_tool("faketime")
def test_a_wrong_clock(tmp_path: Path) -> None:
    ahead = Rank(prefix=("faketime", "-f", "+1h"))
    report = run_doctor(Rank(), Rank(), ahead, folder=tmp_path)
    assert report.codes == [1, 1, 1], report.err
    failures = report.found("fail")
    assert set(failures) == {"clocks"}
    assert re.fullmatch(r"rank 2 on \S+ is 3,(600|599)\.\d s ahead", failures["clocks"])


def test_a_rank_on_a_busy_core(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    busy_loop = ("taskset", "-c", str(cores[0]), sys.executable, "-c", "while True: pass")
    busy = [subprocess.Popen(busy_loop) for _ in range(3)]
    try:
        ranks = Rank(after_start=bind(cores[1])), Rank(after_start=bind(cores[0]))
        report = run_doctor(*ranks, folder=tmp_path)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert report.codes == [0, 0], report.err
    assert share_of_rank_1(report) < 35


@requires_tool("cpulimit")
def test_a_rank_with_little_cpu_time(tmp_path: Path) -> None:
    limits: list[subprocess.Popen[bytes]] = []

    def limit(pid: int) -> None:
        limits.append(subprocess.Popen(["cpulimit", "--quiet", f"--pid={pid}", "--limit=25"]))

    try:
        report = run_doctor(Rank(), Rank(after_start=limit), folder=tmp_path)
    finally:
        for process in limits:
            process.kill()
            process.wait()
    assert report.codes == [0, 0], report.err
    assert share_of_rank_1(report) < 50


def share_of_rank_1(report: Report) -> int:
    """Return the percentage of time in which rank 1 ran. Other tests may slow rank 0 as well."""
    speed = report.found("warn")["speed"]
    found = re.search(rf"rank 1 on {re.escape(socket.gethostname())} [^;]*gets (\d+)% of the time", speed)
    assert found, speed
    return int(found[1])


def bind(core: int) -> Callable[[int], object]:
    return lambda pid: os.sched_setaffinity(pid, [core])


ON_BAD_DISKS = """
import ctypes, pathlib, subprocess, sys
from agnews_dist.__main__ import main
full, fixed = sys.argv[1:3]
CLONE_NEWNS = 0x20000
assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", full], check=True)
pathlib.Path(full, "filler").write_bytes(bytes(1900 * 1024))
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=2m", "none", fixed], check=True)
sys.exit(main(["doctor", *sys.argv[3:]]))
"""


def test_unwritable_disks(tmp_path: Path) -> None:
    full, fixed = (tmp_path / name for name in ("full", "fixed"))
    for directory in (full, fixed):
        directory.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    directories = ("--run.dir", str(fixed / "runs"), "--data.cache_dir", str(full / "cache"))
    program = ("-c", ON_BAD_DISKS, str(full), str(fixed))
    report = run_doctor(Rank(), folder=tmp_path, arguments=(*training(), *directories), program=program)
    assert report.codes == [1]
    failures = report.found("fail")
    assert set(failures) == {"disk: run.dir", "disk: data.cache_dir"}
    assert failures["disk: run.dir"] == f"{fixed}/runs is not writable: Read-only file system"
    assert failures["disk: data.cache_dir"] == f"{full}/cache is full: No space left on device"


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    impatient = "import sys; from agnews_dist.__main__ import main; from agnews_dist.preflight import runner; "
    impatient += "runner.MEETING_SECONDS = 4; sys.exit(main(['doctor', *sys.argv[1:]]))"
    environ = fork_server.rank_variables(2)[0]
    report = run_doctor(Rank(environ=environ), folder=tmp_path, program=("-c", impatient))
    assert report.codes == [1]
    [(check, found)] = report.found("fail").items()
    assert check == "rendezvous"
    assert "1/2 clients joined" in found
    assert "1/2 clients joined" in report.err
    assert "Traceback" not in report.err
    # The rank's own findings are reported all the same.
    assert "disk: run.dir" in report.found("ok")


@pytest.fixture
def cached_model(shared: Path, tmp_path: Path) -> Path:
    """The model me/mini as the hub's cache at `tmp_path` holds it."""
    snapshot = tmp_path / "hub" / "models--me--mini" / "snapshots" / "abc"
    shutil.copytree(shared / "checkpoints" / "gpt2-mini", snapshot)
    (tmp_path / "hub" / "models--me--mini" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--mini" / "refs" / "main").write_text("abc")
    return snapshot


HUB_NAMES = ("--model.name", "me/mini", "--data.source", "owner/BigNews")


def test_hub_files_that_are_not_cached_in_offline_mode(cached_model: Path, tmp_path: Path) -> None:
    # A model without its weights is not complete.
    for weights in cached_model.glob("*.safetensors"):
        weights.unlink()
    rank = Rank(prefix=("env",), environ={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    report = run_doctor(rank, folder=tmp_path, arguments=HUB_NAMES)
    assert report.codes == [1]
    found = f"not in {tmp_path}/hub: me/mini (model.safetensors), owner/BigNews (no file): HF_HUB_OFFLINE is set. Run"
    assert list(report.found("fail")) == ["hub"]
    assert report.found("fail")["hub"].startswith(found)


def test_a_hub_that_does_not_answer_is_asked_once_per_node(cached_model: Path, tmp_path: Path) -> None:
    # A node behind a firewall: the tokenizer alone would wait for minutes, although it is cached.
    cache_copy(tmp_path, "datasets--owner--BigNews", {"train.csv": b"text,label\na,0\n"})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        rank = Rank(prefix=("env",), environ={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint})
        report = run_doctor(rank, rank, folder=tmp_path, arguments=HUB_NAMES)
        assert report.codes == [0, 0], report.err
        used = f"me/mini, owner/BigNews in {tmp_path}/hub used as before. Set HF_HUB_OFFLINE=1 where no network is"
        assert report.found("warn")["hub"] == f"{endpoint} does not answer within 10 s: {used}"
        assert count_connections(silent) == 2, "one for the model and one for the data"


def count_connections(server: socket.socket) -> int:
    """Accept and count the connections that wait in the queue of `server`."""
    server.setblocking(False)
    for count in range(1000):
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
    raise AssertionError("the queue does not end")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees GPUs here")
def test_gpus_that_torch_does_not_see(tmp_path: Path) -> None:
    # A container without --nv, a CPU build of torch, or a broken driver: the job would take hours on the CPU.
    rank = Rank(environ={"CUDA_VISIBLE_DEVICES": "0,1"})
    report = run_doctor(rank, folder=tmp_path)
    assert report.codes == [1]
    found = report.found("fail")
    assert set(found) == {"device"}
    assert "sees no GPU, though 2 are here: the job would run on the CPU" in found["device"]
    assert run_doctor(rank, folder=tmp_path, arguments=(*training(), "--engine.device", "cpu")).codes == [0]


BROKEN_NETWORK = """
import os, sys, time
from agnews_dist.__main__ import main
from agnews_dist.distributed import collectives
from agnews_dist.preflight import network
network.SUM_SECONDS = 3.0
def broken(*_):
    if sys.argv[1] == "hangs" or os.environ["RANK"] == "0":
        time.sleep(600)
    raise RuntimeError("NCCL error: unhandled system error\\nmore")
setattr(collectives, sys.argv[2], broken)
sys.exit(main(["doctor", *sys.argv[3:]]))
"""


@pytest.mark.parametrize(
    ("fault", "function", "check", "error"),
    [
        ("raises", "all_reduce", "all-reduce", "gloo: NCCL error: unhandled system error on rank 1; no answer within"),
        ("hangs", "all_reduce", "all-reduce", "no answer within 3 s on rank 0; no answer within 3 s on rank 1"),
        ("hangs", "exchange", "pairs of ranks", "cannot talk: no answer within 3 s"),
    ],
)
def test_a_broken_network(tmp_path: Path, fault: str, function: str, check: str, error: str) -> None:
    # NCCL behind a wrong interface or a firewall: an error on one rank, or no answer; the other rank waits.
    report = run_doctor(Rank(), Rank(), folder=tmp_path, program=("-c", BROKEN_NETWORK, fault, function))
    assert report.codes == [1, 1], report.err
    found = report.found("fail")
    assert set(found) == {check}
    assert error in found[check]
    # The other findings are reported as well.
    assert report.found("ok")["versions"] == "the same on all ranks"
    assert f"error: 1 of {len(report.result['findings'])} checks failed ({check})" in report.err


def test_an_interface_that_does_not_exist(tmp_path: Path) -> None:
    wrong = Rank(environ={"GLOO_SOCKET_IFNAME": "nonesuch0"})
    report = run_doctor(wrong, wrong, folder=tmp_path)
    assert report.codes == [1, 1]
    found = report.found("fail")
    assert set(found) == {"rendezvous"}
    assert "nonesuch0" in found["rendezvous"]
    assert "GLOO_SOCKET_IFNAME" in found["rendezvous"]
    assert "Traceback" not in report.err


def test_a_rank_that_dies_during_the_measurements(tmp_path: Path) -> None:
    dies = "import os, sys; from agnews_dist.__main__ import main; from agnews_dist.preflight import network\n"
    dies += "if os.environ['RANK'] == '1': network.check_pairs = lambda *_: os._exit(9)\n"
    report = run_doctor(Rank(), Rank(), folder=tmp_path, program=("-c", dies + "sys.exit(main(['doctor', *sys.argv[1:]]))"))
    assert report.codes == [1, 9]
    found = report.found("fail")
    assert set(found) == {"rendezvous"}
    assert found["rendezvous"].startswith("a rank was lost during the measurements (")
    assert "disk: run.dir" in report.found("ok")
    assert "Traceback" not in report.err
