"""The doctor on machines that are wrong on purpose: what is planted is found, named, and nothing else is called a failure."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fork_server
from support.processes import REPOSITORY, environment

CONFIG = ("--config", str(REPOSITORY / "configs" / "quickstart.yaml"))
SECONDS = 150


@dataclass
class Rank:
    """How one rank differs from the others."""

    before: Sequence[str] = ()
    """Words before the interpreter; without any it starts from the fork server, and what libraries read at their import is as in all tests."""
    arguments: Sequence[str] = ()
    environ: dict[str, str] = field(default_factory=dict)
    after: Callable[[int], object] = lambda _: None
    """What is done to its process as soon as it is there."""


@dataclass
class Told:
    """What the ranks said."""

    codes: list[int]
    out: dict[str, Any]
    err: str

    def verdicts(self, verdict: str) -> dict[str, str]:
        """What was found, by check."""
        return {row["check"]: row["found"] for row in self.out["findings"] if row["verdict"] == verdict}


def doctor(
    *ranks: Rank,
    place: Path,
    arguments: Sequence[str] = CONFIG,
    program: Sequence[str] = ("-m", "agnews_dist", "doctor"),
) -> Told:
    """Run it on these ranks, each a process of its own; what they say goes to files in `place`."""
    worlds = fork_server.rank_variables(len(ranks)) if len(ranks) > 1 else [{}]
    ended = [
        start(rank, [*program, *arguments, "--json", *rank.arguments], world, place / f"rank {number}")
        for number, (rank, world) in enumerate(zip(ranks, worlds, strict=True))
    ]
    codes = [wait() for wait in ended]
    out, err = (place / "rank 0.out").read_text(), "".join(path.read_text() for path in place.glob("rank *.err"))
    assert out, err
    return Told(codes, json.loads(out), err)


def start(rank: Rank, command: list[str], world: Mapping[str, str], log: Path) -> Callable[[], int]:
    """A rank at work; what waits for it and gives its exit code."""
    environ = environment(**world, **rank.environ)
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    for path in (out, err):
        path.write_text("")
    if not rank.before:
        process = fork_server.start(command, environ, fork_server.Streams(out, err))
        rank.after(process.pid)

        def wait() -> int:
            process.join(SECONDS)
            process.kill()
            process.join()
            return process.exitcode

        return wait
    with out.open("w") as to_out, err.open("w") as to_err:
        cold = subprocess.Popen(
            [*rank.before, sys.executable, *command], env=environ, stdout=to_out, stderr=to_err, cwd=REPOSITORY
        )

    def wait_for_cold() -> int:
        try:
            return cold.wait(SECONDS)
        finally:
            cold.kill()

    return wait_for_cold


def test_two_healthy_ranks(tmp_path: Path) -> None:
    places = ("--run.dir", str(tmp_path / "a" / "runs"), "--data.cache_dir", str(tmp_path / "b" / "cache"))
    told = doctor(Rank(), Rank(), place=tmp_path, arguments=(*CONFIG, *places))
    assert told.codes == [0, 0], told.err
    assert told.verdicts("fail") == {}
    found = told.verdicts("ok")
    assert found["world"].startswith("2 rank(s) on 1 node(s)")
    assert found["all-reduce"].startswith("right, ")
    assert found["versions"] == found["configuration"] == "the same on all ranks"
    assert told.out["expected_seconds"] > 1
    assert told.out["fits"] is True
    # Nothing of the probes is left, nor a directory that was not there.
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()


def test_other_versions_settings_clocks_and_counts(tmp_path: Path) -> None:
    other = tmp_path / "accelerate-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 9.9.9\n")
    odd = Rank(
        before=("env",),
        arguments=("--optim.lr", "0.5"),
        environ={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
    )
    ahead = Rank(before=("faketime", "-f", "+1h"))
    expected = ("--ranks", "4")
    told = doctor(Rank(), odd, ahead, place=tmp_path, arguments=(*CONFIG, *expected))
    assert told.codes == [1, 1, 1], told.err
    failures = told.verdicts("fail")
    assert set(failures) == {"versions", "configuration", "clocks", "world"}
    assert failures["versions"].startswith("accelerate ")
    assert failures["versions"].endswith("on rank 0, 9.9.9 on rank 1")
    assert failures["configuration"] == "optim.lr 0.002 on rank 0, 0.5 on rank 1"
    assert failures["clocks"].startswith("rank 2 on ")
    assert " 3,600." in failures["clocks"] or " 3,599." in failures["clocks"]
    assert failures["clocks"].endswith("s ahead")
    assert failures["world"].startswith("3 rank(s) on 1 node(s)")
    assert failures["world"].endswith("where 4 were expected")
    assert "error: 4 of " in told.err


def test_a_rank_on_a_busy_core(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    on_first = ("taskset", "-c", str(cores[0]), sys.executable, "-c", "while True: pass")
    busy = [subprocess.Popen(on_first) for _ in range(3)]
    try:
        told = doctor(Rank(after=bind(cores[1])), Rank(after=bind(cores[0])), place=tmp_path)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert told.codes == [0, 0], told.err
    assert share_of_rank_1(told) < 35


def share_of_rank_1(told: Told) -> int:
    """Percent of the time in which it ran. Where other tests compute meanwhile, rank 0 may be told as well."""
    speed = told.verdicts("warn")["speed"]
    found = re.search(rf"rank 1 on {re.escape(socket.gethostname())} [^;]*gets (\d+)% of the time", speed)
    assert found, speed
    return int(found[1])


def bind(core: int) -> Callable[[int], object]:
    return lambda pid: os.sched_setaffinity(pid, [core])


def test_a_rank_with_little_cpu_time(tmp_path: Path) -> None:
    limits: list[subprocess.Popen[bytes]] = []

    def limit(pid: int) -> None:
        limits.append(subprocess.Popen(["cpulimit", "--quiet", f"--pid={pid}", "--limit=25"]))

    try:
        told = doctor(Rank(), Rank(after=limit), place=tmp_path)
    finally:
        for process in limits:
            process.kill()
            process.wait()
    assert told.codes == [0, 0], told.err
    assert share_of_rank_1(told) < 50


def test_disks_that_cannot_be_written_and_no_compiler(tmp_path: Path) -> None:
    full, fixed, empty = (tmp_path / name for name in ("full", "fixed", "empty"))
    for directory in (full, fixed, empty):
        directory.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    mounts = (
        f"mount -t tmpfs -o size=2m none {full} && head -c 1900k /dev/zero >{full}/filler && "
        f'mount -t tmpfs -o ro,size=2m none {fixed} && exec "$@"'
    )
    places = ("--run.dir", str(fixed / "runs"), "--data.cache_dir", str(full / "cache"), "--engine.compile", "always")
    told = doctor(
        Rank(before=("unshare", "--mount", "sh", "-c", mounts, "sh", "env", f"PATH={empty}")),
        place=tmp_path,
        arguments=(*CONFIG, *places),
    )
    assert told.codes == [1]
    failures = told.verdicts("fail")
    assert set(failures) == {"disk: run.dir", "disk: data.cache_dir", "C++ compiler"}
    assert failures["disk: run.dir"] == f"{fixed}/runs is not writable: Read-only file system"
    assert failures["disk: data.cache_dir"] == f"{full}/cache is full: No space left on device"
    assert failures["C++ compiler"].startswith("none: ")


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    impatient = "import sys; from agnews_dist.commands import doctor; doctor.MEETING_SECONDS = 4; sys.exit(doctor.main(sys.argv[1:]))"
    environ = fork_server.rank_variables(2)[0]
    told = doctor(Rank(environ=environ), place=tmp_path, program=("-c", impatient))
    assert told.codes == [1]
    [(check, found)] = told.verdicts("fail").items()
    assert check == "rendezvous"
    assert "1/2 clients joined" in found
    assert "1/2 clients joined" in told.err
    assert "Traceback" not in told.err
    # What it found alone is told all the same.
    assert "disk: run.dir" in told.verdicts("ok")


def test_what_only_the_hub_has_is_a_failure_without_it(tmp_path: Path) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    news = ("--model.name", "embedded", "--data.source", "somebody/BigNews")
    told = doctor(Rank(before=("env",), environ=environ), place=tmp_path, arguments=news)
    assert told.codes == [1]
    found = f"somebody/BigNews: not whole below {tmp_path}, and HF_HUB_OFFLINE is set"
    assert told.verdicts("fail") == {"hub": found}
    # As `datasets` names what it has made of a data set.
    (tmp_path / "datasets" / "somebody___big_news" / "default" / "0.0.0" / "abc").mkdir(parents=True)
    told = doctor(Rank(before=("env",), environ=environ), place=tmp_path, arguments=news)
    assert told.codes == [0]
    assert told.verdicts("ok")["hub"].startswith(f"all is below {tmp_path}")


def test_a_hub_that_does_not_answer_is_asked_once(shared: Path, tmp_path: Path) -> None:
    """A node behind a firewall: by itself the tokenizer alone waits for minutes, though it is cached."""
    snapshot = tmp_path / "hub" / "models--me--mini" / "snapshots" / "abc"
    shutil.copytree(shared / "checkpoints" / "gpt2-mini", snapshot)
    (tmp_path / "hub" / "models--me--mini" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--mini" / "refs" / "main").write_text("abc")
    model = ("--model.name", "me/mini", "--data.source", "synthetic")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environ = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        begun = time.monotonic()
        told = doctor(Rank(before=("env",), environ=environ), place=tmp_path, arguments=model)
        assert time.monotonic() - begun < 60, "the hub was asked again"
        assert told.codes == [0], told.err
        assert told.verdicts("warn")["hub"] == f"{endpoint} cannot be reached (timed out); all is below {tmp_path}"
        # A model is its weights too.
        for weights in snapshot.glob("*.safetensors"):
            weights.unlink()
        told = doctor(Rank(before=("env",), environ=environ), place=tmp_path, arguments=model)
    assert told.codes == [1]
    found = f"me/mini: not whole below {tmp_path}, and {endpoint} cannot be reached (timed out)"
    assert told.verdicts("fail") == {"hub": found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch sees GPUs")
def test_gpus_that_torch_does_not_see(tmp_path: Path) -> None:
    """A container without --nv, a CPU build of torch, or a broken driver: the job would take hours on its GPUs' CPU."""
    given = {"CUDA_VISIBLE_DEVICES": "0,1"}
    told = doctor(Rank(environ=given), place=tmp_path)
    assert told.codes == [1]
    found = told.verdicts("fail")
    assert set(found) == {"device"}
    assert "sees no GPU, though 2 are here: the job would run on the CPU" in found["device"]
    meant = (*CONFIG, "--engine.device", "cpu")
    assert doctor(Rank(environ=given), place=tmp_path, arguments=meant).codes == [0]


BROKEN = """
import os, sys, time
from agnews_dist.commands import doctor
from agnews_dist.distributed import collectives
from agnews_dist.preflight import network
network.SUM_SECONDS = 3.0
def broken(*_):
    if sys.argv[1] == "hangs" or os.environ["RANK"] == "0":
        time.sleep(600)
    raise RuntimeError("NCCL error: unhandled system error\\nmore")
setattr(collectives, sys.argv[2], broken)
sys.exit(doctor.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("way", "what", "check", "error"),
    [
        ("raises", "all_reduce", "all-reduce", "gloo: NCCL error: unhandled system error on rank 1; no end"),
        ("hangs", "all_reduce", "all-reduce", "no end within 3 s on rank 0; no end within 3 s on rank 1"),
        ("hangs", "exchange", "pairs of ranks", "cannot talk: no end within 3 s"),
    ],
)
def test_a_network_that_breaks_while_it_is_measured(
    tmp_path: Path, way: str, what: str, check: str, error: str
) -> None:
    """As NCCL does behind a wrong interface or a firewall: an error on one rank, or no end; the other waits for it."""
    told = doctor(Rank(), Rank(), place=tmp_path, program=("-c", BROKEN, way, what))
    assert told.codes == [1, 1], told.err
    found = told.verdicts("fail")
    assert set(found) == {check}
    assert error in found[check]
    # What else was found is told as well, and in one line what is wrong.
    assert told.verdicts("ok")["versions"] == "the same on all ranks"
    assert f"error: 1 of {len(told.out['findings'])} checks failed ({check})" in told.err


def test_an_interface_that_is_none(tmp_path: Path) -> None:
    wrong = Rank(environ={"GLOO_SOCKET_IFNAME": "nonesuch0"})
    told = doctor(wrong, wrong, place=tmp_path)
    assert told.codes == [1, 1]
    found = told.verdicts("fail")
    assert set(found) == {"rendezvous"}
    assert re.match(
        r"the ranks met at 127\.0\.0\.1:\d+ but could not connect .*nonesuch0.* set GLOO_SOCKET_IFNAME",
        found["rendezvous"],
    )
    assert "Traceback" not in told.err


def test_a_rank_that_dies_while_it_measures(tmp_path: Path) -> None:
    dies = "import os, sys; from agnews_dist.commands import doctor; from agnews_dist.preflight import network\n"
    dies += "if os.environ['RANK'] == '1': network.check_pairs = lambda *_: os._exit(9)\n"
    told = doctor(Rank(), Rank(), place=tmp_path, program=("-c", dies + "sys.exit(doctor.main(sys.argv[1:]))"))
    assert told.codes == [1, 9]
    found = told.verdicts("fail")
    assert set(found) == {"rendezvous"}
    assert found["rendezvous"].startswith("the ranks lost each other while they measured (")
    assert "disk: run.dir" in told.verdicts("ok")
    assert "Traceback" not in told.err
