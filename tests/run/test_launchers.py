"""Every launcher for real, two ranks on this machine: what the ranks are told, how they end, and the same numbers from all."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from support.processes import REPOSITORY, environment

from agnews_dist.distributed.node_resources import PORTS

SCRIPTS = ("local.sh", "accelerate.sh", "deepspeed.sh")
SECONDS = 120


def start(script: Path, *arguments: str, cwd: Path = REPOSITORY, **environ: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    env = environment(NPROC="2", **environ)
    # In a session of its own: what a failed test leaves running is ended as one.
    return subprocess.Popen(
        [str(script), *arguments], env=env, stdout=pipe, stderr=pipe, text=True, cwd=cwd, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it said on standard error, once it has ended."""
    try:
        _, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {SECONDS} s: {process.communicate()}") from None
    return err


# --- what the ranks are told, with a stand-in for the training ---

STAND_IN = """
import json, os, sys, time
from pathlib import Path
from agnews_dist.distributed.world import detect_world

told = {"pid": os.getpid(), "argv": sys.argv[1:], "world": vars(detect_world(os.environ)), "cwd": os.getcwd()}
told |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MASTER_PORT")}
file = Path(os.environ["TOLD"], f"{told['world']['rank']}.part")
file.write_text(json.dumps(told))
file.rename(file.with_suffix(".json"))
time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A clone with the real launchers, where `agnews_dist.train` writes down what it was told, then waits."""
    for folder in ("launch", "configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "clone" / folder)
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    package = tmp_path / "clone" / "agnews_dist"
    package.mkdir()
    for name in ("__init__.py", "world.py", "errors.py", "node.py"):
        shutil.copy(REPOSITORY / "agnews_dist" / name, package / name)
    (package / "train.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path / "clone"


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_hear_the_arguments_and_end_with_their_launcher(stand_in: Path, tmp_path: Path, script: str) -> None:
    # Words that the launchers know too, and what a shell would take apart.
    arguments = ["--debug", "--quiet", "--module", "--num_processes", "3", "a 'b' $c", "", "--", "-m", "--help"]
    told = tmp_path / "told"
    told.mkdir()
    environ = {"PYTHONPATH": str(stand_in), "TOLD": str(told), "CUDA_VISIBLE_DEVICES": "6,7"}
    process = start(stand_in / "launch" / script, *arguments, cwd=tmp_path, **environ)
    try:
        end = time.monotonic() + SECONDS
        while len(found := sorted(told.glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        ranks: list[dict[str, Any]] = [json.loads(file.read_text()) for file in found]
        alive = [psutil.pid_exists(rank["pid"]) for rank in ranks]
    finally:
        process.terminate()
        err = finish(process)
    assert alive == [True, True], err
    default = ["--config", str(stand_in / "configs" / "deepspeed.yaml")] if script == "deepspeed.sh" else []
    for number, rank in enumerate(ranks):
        assert rank["argv"] == default + arguments
        assert rank["world"] == {"rank": number, "num_ranks": 2, "local_rank": number, "ranks_per_node": 2}
        assert (rank["cwd"], rank["OMP_NUM_THREADS"]) == (str(tmp_path), "1")
        assert rank["CUDA_VISIBLE_DEVICES"] == "6,7"
    # Both meet at one port, and not at the one that every other job would take.
    [port] = {rank["MASTER_PORT"] for rank in ranks}
    assert port != "29500"
    # The others' launchers open theirs themselves; here it must stay free until rank 0 does.
    assert script != "deepspeed.sh" or int(port) in PORTS
    assert process.returncode != 0
    assert [rank["pid"] for rank in ranks if psutil.pid_exists(rank["pid"])] == []


def test_accelerate_on_a_cpu_without_our_configuration_is_refused() -> None:
    """accelerate's own way starts one process for two: the reason why launch/accelerate.sh brings a configuration."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "agnews_dist.train", "--debug"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode != 0
    assert "accelerate launch was asked for several processes" in done.stderr


# --- the shared real data job ---


@dataclass
class Outcome:
    """What is compared of a run."""

    result: dict[str, Any]
    steps: list[tuple[float, float]]
    """Loss and gradient norm of every step."""
    predictions: list[int]
    engine: dict[str, Any]
    model: Path


ZERO_3 = ("--engine.backend", "deepspeed", "--engine.zero_stage", "3")
JOBS = {
    "torchrun": ("local.sh", (), ("ddp", 2)),
    "accelerate": ("accelerate.sh", (), ("ddp", 2)),
    "deepspeed": ("deepspeed.sh", (), ("deepspeed", 2)),
    "torchrun with ZeRO 3": ("local.sh", ZERO_3, ("deepspeed", 3)),
    "accelerate with FSDP2": ("accelerate.sh", ("--engine.backend", "fsdp"), ("fsdp", 2)),
}
EQUAL = (
    "num_steps",
    "num_ranks",
    "global_batch_size",
    "padding_efficiency",
    "critical_path_efficiency",
    "rank_balance",
)


@pytest.fixture(scope="module")
def outcomes(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    directory = tmp_path_factory.mktemp("launchers")
    outcomes: dict[str, Outcome] = {}
    for name, (script, arguments, _) in JOBS.items():
        process = start(
            REPOSITORY / "launch" / script,
            *("--config", "configs/gpt2_mini_cpu.yaml", "--data.source", str(shared / "data" / "ag_news")),
            *("--model.name", str(shared / "checkpoints" / "gpt2-mini"), "--data.cache_dir", str(directory / "cache")),
            *("--data.limit_train", "256", "--data.limit_validation", "64", "--optim.epochs", "1"),
            *("--run.dir", str(directory), "--run.name", name, *arguments),
        )
        err = finish(process)
        assert process.returncode == 0, f"{name}: {err[-6000:]}"
        run = directory / name
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        rows = [json.loads(line) for line in (run / "predictions-validation.jsonl").read_text().splitlines()]
        outcomes[name] = Outcome(
            result=json.loads((run / "result.json").read_text()),
            steps=[(event["loss"], event["grad_norm"]) for event in events if event["event"] == "StepDone"],
            predictions=[row["prediction"] for row in rows],
            engine=yaml.safe_load((run / "config.yaml").read_text())["engine"],
            model=run / "model",
        )
    return outcomes


def check_same_numbers(found: Outcome, reference: Outcome) -> None:
    """Counts are equal; what is summed in another order is equal to rounding. Dropout is on: each rank draws the same masks."""
    assert {name: found.result[name] for name in EQUAL} == {name: reference.result[name] for name in EQUAL}
    assert found.result["splits"].keys() == reference.result["splits"].keys() == {"validation"}
    scores, expected = dict(found.result["splits"]["validation"]), dict(reference.result["splits"]["validation"])
    assert scores.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert scores == expected
    assert found.predictions == reference.predictions
    assert len(found.steps) == len(reference.steps)
    for step, expected_step in zip(found.steps, reference.steps, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-5)


def test_the_reference_has_two_ranks_and_learns(outcomes: dict[str, Outcome]) -> None:
    """Without learning equal numbers would show nothing; clipping is active at every step."""
    reference = outcomes["torchrun"]
    assert reference.result["num_ranks"] == 2
    assert reference.result["num_steps"] == len(reference.steps) == 8
    assert reference.result["splits"]["validation"]["num_examples"] == len(reference.predictions) == 64
    assert len({round(loss, 2) for loss, _ in reference.steps}) > 4
    assert min(norm for _, norm in reference.steps) > 1


@pytest.mark.parametrize("name", JOBS)
def test_the_engine_is_the_one_asked_for(outcomes: dict[str, Outcome], name: str) -> None:
    engine = outcomes[name].engine
    assert (engine["backend"], engine["zero_stage"]) == JOBS[name][2]


@pytest.mark.parametrize("name", [name for name in JOBS if name != "torchrun"])
def test_every_launcher_gives_the_same_numbers_and_model(outcomes: dict[str, Outcome], name: str) -> None:
    found, reference = outcomes[name], outcomes["torchrun"]
    check_same_numbers(found, reference)
    if found.engine["backend"] == "ddp":
        assert found.steps == reference.steps
    assert sorted(file.name for file in found.model.iterdir()) == sorted(
        file.name for file in reference.model.iterdir()
    )
    weights, expected = (load_file(outcome.model / "model.safetensors") for outcome in (found, reference))
    assert weights.keys() == expected.keys()
    assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) < 1e-4


@pytest.mark.parametrize("what", ["num_ranks", "padding_efficiency", "confusion", "loss", "prediction", "step"])
def test_another_number_would_be_seen(outcomes: dict[str, Outcome], what: str) -> None:
    reference = outcomes["torchrun"]
    changed = copy.deepcopy(reference)
    scores = changed.result["splits"]["validation"]
    if what in EQUAL:
        changed.result[what] += 1e-9
    elif what == "confusion":
        scores["confusion"][0][0] -= 1
        scores["confusion"][0][1] += 1
    elif what == "loss":
        scores["loss"] *= 1 + 1e-5
    elif what == "prediction":
        changed.predictions[-1] += 1
    else:
        changed.steps[-1] = (changed.steps[-1][0] * (1 + 1e-4), changed.steps[-1][1])
    check_same_numbers(copy.deepcopy(reference), reference)
    with pytest.raises(AssertionError):
        check_same_numbers(changed, reference)
