"""Whole commands against a local stand-in of the hub: asked once per node, in bounded time, not at all once all is cached."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import fork_server, small_run
from support.hub_server import RUN, HubServer, cache_copy, serve_hub
from support.processes import REPOSITORY, environment, torchrun
from support.tools import requires_tool

pytestmark = pytest.mark.slow
LIMITS = ("--data.limit_train", "32", "--data.limit_test", "8", "--optim.epochs", "1", "--data.max_length", "64")


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Some rows in the layout of AG News on the hub."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "data").mkdir()
    for split, size in (("train", 96), ("test", 16)):
        rows = {"text": [f"story {i} of {split} on topic {i % 4}" for i in range(size)], "label": [i % 4 for i in range(size)]}
        pq.write_table(pa.table(rows), directory / "data" / f"{split}-00000-of-00001.parquet")
    return read_files(directory)


@pytest.fixture
def hub(data: dict[str, bytes]) -> Iterator[HubServer]:
    with serve_hub() as server:
        server.repositories["gpt2"] = {"main": read_files(small_run.write_inputs() / "model")}
        server.datasets["fancyzhx/ag_news"] = {"main": data}
        yield server


def run(num_ranks: int, command: str, folder: Path, name: str, *more: str, home: Path, **environ: str):
    """Run a command with the default model and data, few rows, and a token cache of its own."""
    places = ("--run.dir", str(folder / "runs"), "--run.name", name, "--data.cache_dir", str(folder / f"cache-{name}"))
    program = ("-c", RUN, command, *LIMITS, *places, *more)
    environ = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environ}
    return fork_server.run_ranks(num_ranks, *program, **environ)


def test_the_hub_is_asked_once_per_node_and_not_needed_once_all_is_cached(hub: HubServer, tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"

    def count(num_ranks: int, name: str, **more) -> int:
        hub.requests.clear()
        run(num_ranks, "train", tmp_path, name, HF_ENDPOINT=hub.address, **more)
        return len(hub.requests)

    run(1, "prepare", tmp_path, "prepared", home=home, HF_ENDPOINT=hub.address)
    num_cold = len(hub.requests)
    # Repositories are asked for once each, and files by two requests.
    assert num_cold == 2 + 2 * sum(request.startswith("HEAD") for request in hub.requests)
    assert count(2, "cold", home=other) == num_cold
    assert count(1, "warm-1", home=home) == count(2, "warm-2", home=home) == 2

    # A firewall that swallows everything: one warning of rank 0, and the same training.
    hub.faults["/"] = "stay_silent"
    done = run(2, "train", tmp_path, "silent", home=home, HF_ENDPOINT=hub.address)
    reason = f"{hub.address} does not answer within 10 s"
    assert (done.stdout + done.stderr).count(reason) == 1
    assert f"[rank 0/2] ask {hub.address} for gpt2, fancyzhx/ag_news, 10 s at most" in done.stderr
    assert "[rank 1" not in done.stdout + done.stderr

    # Offline: not a word about caches, and not a request.
    hub.requests.clear()
    done = run(2, "train", tmp_path, "offline", home=home, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert str(home) not in done.stdout + done.stderr
    weights = {
        (tmp_path / "runs" / name / "model" / "model.safetensors").read_bytes() for name in ("cold", "silent", "offline")
    }
    assert len(weights) == 1


def test_all_models_of_a_sweep_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["other"] = {"main": read_files(small_run.write_inputs() / "model")}
    more = ("--model.name", "gpt2,other", "--report.write", "false")
    run(1, "sweep", tmp_path, "models", *more, home=tmp_path / "home", HF_ENDPOINT=hub.address)
    assert (tmp_path / "runs/models/members/00001.json").exists()


def test_a_download_that_takes_longer_than_a_collective_may_is_waited_for(hub: HubServer, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = "send_late"
    timeout = ("--engine.timeout_seconds", "6")
    done = run(2, "train", tmp_path, "late", *timeout, home=tmp_path / "home", HF_ENDPOINT=hub.address)
    assert f"[rank 0/2] download 4 files of gpt2 from {hub.address}: " in done.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "plan", "prepare", "doctor"])
def test_every_command_refuses_what_is_neither_cached_nor_to_be_had(command: str, tmp_path: Path) -> None:
    arguments = {"predict": ("--model.name", "me/classifier", "a text")}.get(command, ())
    done = fork_server.run_python(
        "-c", RUN, command, *arguments, check=False, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", PWD=str(tmp_path)
    )
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "error: not in " in line
    assert "HF_HUB_OFFLINE is set. Run 'python -m agnews_dist prepare'" in line
    assert done.stderr.splitlines()[-1] == line


def test_without_a_cache_and_a_network_the_one_message_comes_soon_and_last(tmp_path: Path) -> None:
    """As users start it: under torchrun, without any argument."""
    begin = time.monotonic()
    done = torchrun(
        2, "-m", "agnews_dist.train", check=False, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"
    )
    # The imports take ten seconds, and more where others compute.
    assert time.monotonic() - begin < 90
    assert done.returncode == 1
    message = f"not in {tmp_path}/hub: gpt2 (no file), fancyzhx/ag_news (no file): http://127.0.0.1:9 cannot be reached"
    lines = done.stderr.splitlines()
    assert sum("error: " in line for line in lines) == 1
    assert not [line for line in lines if "Retrying" in line or "thrown while" in line]
    assert f"[rank 0/2] error: {message}" in done.stderr
    # torchrun's own summary comes after it, and ends with the message.
    assert [line for line in lines if line.strip("= ")][-1].startswith(f"  traceback : {message}")


@requires_tool("unshare")
def test_a_read_only_cache_as_the_hubs_own_tool_leaves_it(data: dict[str, bytes], tmp_path: Path) -> None:
    """Copies of `hf download`, on a file system that is mounted read-only: nothing else is needed."""
    home = tmp_path / "home"
    cache_copy(home, "models--openai-community--gpt2", read_files(small_run.write_inputs() / "model"))
    cache_copy(home, "datasets--fancyzhx--ag_news", data)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'
    command = [sys.executable, "-m", "agnews_dist", "plan", *LIMITS, "--data.cache_dir", str(tmp_path / "cache")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, str(home), *command],
        env=environment(HF_HOME=str(home), HF_HUB_OFFLINE="1"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gpt2 on fancyzhx/ag_news" in done.stdout
