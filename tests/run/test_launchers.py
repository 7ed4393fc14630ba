"""Every launcher with two ranks on this machine: the ranks' environment, their end, and equal results."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from support import fork_server, small_run
from support.jobs import TorchrunJob
from support.processes import REPOSITORY, TIMEOUT, environment, has_ended, wait_until

from agnews_dist.distributed.node_resources import PORTS
from agnews_dist.distributed.preemption import SIGNALS

SCRIPTS = ("local.sh", "accelerate.sh", "deepspeed.sh")


def start_launcher(script: Path, *arguments: str, cwd: Path = REPOSITORY, **environ: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    env = environment(NPROC="2", **environ)
    # Its own session: `wait_for_end` can end all of its processes together.
    return subprocess.Popen(
        [str(script), *arguments], env=env, stdout=pipe, stderr=pipe, text=True, cwd=cwd, start_new_session=True
    )


def wait_for_end(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a launcher; return its standard error."""
    try:
        _, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"not ended after {TIMEOUT} s: {process.communicate()}") from None
    return err


# --- environment and end of the ranks, with a stand-in for the training ---

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from agnews_dist.distributed.world import detect_world

def run(argv):
    facts = {"pid": os.getpid(), "argv": argv, "world": vars(detect_world(os.environ)), "cwd": os.getcwd()}
    facts |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MASTER_PORT")}
    file = Path(os.environ["FACTS"], f"{facts['world']['rank']}.part")
    file.write_text(json.dumps(facts))
    signal.signal(signal.SIGUSR1, lambda *_: (file.with_suffix(".usr1").touch(), sys.exit(75)))
    parent = os.getppid()
    file.rename(file.with_suffix(".json"))
    while os.getppid() == parent:
        time.sleep(0.1)
    file.with_suffix(".orphan").touch()

# Of `agnews_dist train` the first word is the command.
run(sys.argv[2:] if sys.argv[0].endswith("__main__.py") else sys.argv[1:])
sys.exit()
"""


def make_clone(directory: Path, training: str, interpreter: str) -> Path:
    """Copy what a launch needs, with code that runs in place of the command train, and a script in the interpreter's place."""
    clone = directory / "clone"
    for folder in ("launch", "configs", "agnews_dist"):
        shutil.copytree(REPOSITORY / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(interpreter.replace("{python}", sys.executable), encoding="utf-8")
    python.chmod(0o755)
    (clone / "agnews_dist" / "commands" / "train.py").write_text(training, encoding="utf-8")
    return clone


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A clone in which the command train writes its environment to a file, then waits."""
    return make_clone(tmp_path, STAND_IN, '#!/bin/sh\nexec "{python}" "$@"\n')


@pytest.mark.parametrize("script", SCRIPTS)
def test_launcher_starts_and_ends_two_ranks(stand_in: Path, tmp_path: Path, script: str) -> None:
    # Options that launchers have too, and words that a shell would split.
    arguments = ["--debug", "--quiet", "--module", "--num_processes", "3", "a 'b' $c", "", "--", "-m", "--help"]
    facts = tmp_path / "facts"
    facts.mkdir()
    environ = {"PYTHONPATH": str(stand_in), "FACTS": str(facts), "CUDA_VISIBLE_DEVICES": "6,7"}
    process = start_launcher(stand_in / "launch" / script, *arguments, cwd=tmp_path, **environ)
    try:
        end = time.monotonic() + TIMEOUT
        while len(found := sorted(facts.glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        ranks: list[dict[str, Any]] = [json.loads(file.read_text()) for file in found]
        alive = [psutil.pid_exists(rank["pid"]) for rank in ranks]
    finally:
        # Clusters announce the end with USR1, of which torchrun alone would die while its ranks keep running.
        process.send_signal(signal.SIGUSR1 if script == "local.sh" else signal.SIGTERM)
        err = wait_for_end(process)
    assert list(facts.glob("*.orphan")) == [], "the launcher ends its ranks before itself"
    assert len(list(facts.glob("*.usr1"))) == (2 if script == "local.sh" else 0)
    assert alive == [True, True], err
    default = ["--config", str(stand_in / "configs" / "deepspeed.yaml")] if script == "deepspeed.sh" else []
    for number, rank in enumerate(ranks):
        assert rank["argv"] == default + arguments
        assert rank["world"] == {"rank": number, "num_ranks": 2, "local_rank": number, "ranks_per_node": 2}
        assert (rank["cwd"], rank["OMP_NUM_THREADS"]) == (str(tmp_path), "1")
        assert rank["CUDA_VISIBLE_DEVICES"] == "6,7"
    # One port for both ranks, and not the default, at which two jobs would collide.
    [port] = {rank["MASTER_PORT"] for rank in ranks}
    assert port != "29500"
    # Our script chooses it for DeepSpeed: it must stay free until rank 0 opens it.
    assert script != "deepspeed.sh" or int(port) in PORTS
    assert process.returncode != 0
    assert [rank["pid"] for rank in ranks if psutil.pid_exists(rank["pid"])] == []


SAVES = """
import os, sys, time
from pathlib import Path
from agnews_dist.distributed.preemption import PreemptionHandler, preempted_exit_code

def run():
    file = Path(os.environ["FACTS"], os.environ.get("RANK", "0"))
    handler = PreemptionHandler(os.environ)
    handler.start()
    handler.begin_training()
    file.with_suffix(".ready").write_text(str(os.getpid()))
    while not handler.is_stopping:
        time.sleep(0.02)
    handler.begin_exit()
    file.with_suffix(".saved").write_text(handler.stop_reason)
    handler.close()
    return preempted_exit_code(os.environ)

sys.exit(run())
"""
RECORDER = """#!/bin/sh
case "$*" in
    *torch.distributed.run*|*accelerate.commands.launch*|*deepspeed.launcher.launch*)
        env -0 >"$RECORD.environ"
        printf '%s\\0' "$@" >"$RECORD.words" ;;
    *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Launcher -> (words after python, environment), as the scripts start it; the command train waits for a stop, and saves."""
    clone = make_clone(tmp_path_factory.mktemp("signals"), SAVES, RECORDER)
    own = environment(NPROC="2", PYTHONPATH=str(clone))
    found = {
        "python": (["-m", "agnews_dist.train"], own),
        "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "agnews_dist.train"], own),
    }
    for script in SCRIPTS:
        record = clone / script
        subprocess.run([clone / "launch" / script], env={**own, "RECORD": str(record)}, check=True, timeout=TIMEOUT)
        words, variables = (Path(f"{record}.{name}").read_text().split("\0")[:-1] for name in ("words", "environ"))
        exported = dict(variable.split("=", 1) for variable in variables)
        found[script] = (words, {**exported, "PYTHONPATH": str(clone), "INTERPRETER": sys.executable})
        # The recorder stands for python in the ranks, too.
        found[script][0][:] = [sys.executable if word.endswith(".venv/bin/python") else word for word in words]
    return found


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("launcher", "target"), [*((launcher, "launcher") for launcher in ("python", "torchrun", *SCRIPTS)), ("torchrun", "rank")]
)
def test_every_signal_lets_the_ranks_save(
    launches: dict[str, tuple[list[str], dict[str, str]]], tmp_path: Path, launcher: str, number: signal.Signals, target: str
) -> None:
    """A rank saves after its own signal, one that the launcher passes on, or the end of the launcher."""
    words, environ = launches[launcher]
    log, ranks = tmp_path / "log", 1 if launcher == "python" else 2
    streams = fork_server.Streams(log, log)
    process = fork_server.start(words, {**environ, "FACTS": str(tmp_path)}, streams, directory=tmp_path, new_session=True)
    pids: list[int] = []
    try:
        marks = [tmp_path / f"{rank}.ready" for rank in range(ranks)]
        wait_until(lambda: process.exitcode is not None or all(mark.exists() and mark.stat().st_size for mark in marks))
        assert process.exitcode is None, log.read_text()
        pids = [int(mark.read_text()) for mark in marks]
        os.kill(process.pid if target == "launcher" else pids[-1], number)
        saved = tmp_path / f"{ranks - 1}.saved"
        assert wait_until(saved.exists, 60), log.read_text()
        assert wait_until(lambda: has_ended(pids[-1]))
        if target == "launcher":
            assert wait_until(lambda: len(list(tmp_path.glob("*.saved"))) == ranks), "all ranks have saved"
            process.join(TIMEOUT)
            assert process.exitcode is not None
        else:
            assert saved.read_text() == number.name
    finally:
        for pid in [*pids, process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()


def test_agent_that_dies_while_its_ranks_start_ends_them(tmp_path: Path) -> None:
    job = TorchrunJob(small_run.arguments(tmp_path), tmp_path / "log.txt")
    try:
        assert wait_until(lambda: len(job.workers()) == 2, every=0.002)
        job.signal("agent", signal.SIGKILL)
        assert wait_until(job.has_ended)
        output = (tmp_path / "log.txt").read_text()
        assert output == "" or "torchrun, which listens there before it starts ranks, has ended" in output
        # Its attempts take 10 s each.
        assert "rendezvous" not in output
    finally:
        job.kill()


def test_accelerate_on_a_cpu_without_our_configuration_is_refused() -> None:
    # By default accelerate starts one process instead of two; launch/accelerate.sh brings a configuration for this.
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "agnews_dist.train", "--debug"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode != 0
    assert "accelerate launch started one process" in done.stderr


# --- results of real trainings ---


@dataclass
class Outcome:
    """Results of a run that are compared."""

    result: dict[str, Any]
    steps: list[tuple[float, float]]
    """Loss and gradient norm of every step."""
    predictions: list[int]
    engine: dict[str, Any]
    model: Path


FORKED = "forked ranks"
"""Not a script: ranks as srun starts them."""
JOBS = {
    "torchrun": ("local.sh", (), ("ddp", 2)),
    "accelerate": ("accelerate.sh", (), ("ddp", 2)),
    "deepspeed": ("deepspeed.sh", (), ("deepspeed", 2)),
    "ZeRO 3": (FORKED, ("--engine.backend", "deepspeed", "--engine.zero_stage", "3"), ("deepspeed", 3)),
    "FSDP2": (FORKED, ("--engine.backend", "fsdp"), ("fsdp", 2)),
}
EQUAL = ("num_steps", "num_ranks", "global_batch_size", "padding_efficiency", "critical_path_efficiency", "rank_balance")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    directory = tmp_path_factory.mktemp("launchers")
    outcomes: dict[str, Outcome] = {}
    for name, (script, more, _) in JOBS.items():
        own = ("--optim.epochs", "1", "--run.name", name, *more)
        if script == FORKED:
            small_run.finish(directory, *own)
        else:
            process = start_launcher(REPOSITORY / "launch" / script, *small_run.arguments(directory, *own))
            err = wait_for_end(process)
            assert process.returncode == 0, f"{name}: {err[-6000:]}"
        run = directory / "runs" / name
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
    """Check that counts are equal, and that sums in another order are equal to rounding. Dropout is on."""
    assert {name: found.result[name] for name in EQUAL} == {name: reference.result[name] for name in EQUAL}
    assert found.result["splits"].keys() == reference.result["splits"].keys() == {"validation", "test"}
    for split, of_reference in reference.result["splits"].items():
        scores, expected = dict(found.result["splits"][split]), dict(of_reference)
        assert scores.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
        assert scores == expected
    assert found.predictions == reference.predictions
    assert len(found.steps) == len(reference.steps)
    for step, expected_step in zip(found.steps, reference.steps, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-5)


def test_reference_run_has_two_ranks_and_learns(outcomes: dict[str, Outcome]) -> None:
    # Without learning, equal numbers would prove nothing. Clipping is active at every step.
    reference = outcomes["torchrun"]
    assert reference.result["num_ranks"] == 2
    assert reference.result["num_steps"] == len(reference.steps) == small_run.EPOCH_STEPS
    num_examples = reference.result["splits"]["validation"]["num_examples"]
    assert num_examples == len(reference.predictions) == small_run.SIZES["validation"]
    assert len({round(loss, 2) for loss, _ in reference.steps}) > 4
    assert min(norm for _, norm in reference.steps) > 1


@pytest.mark.parametrize("name", JOBS)
def test_launcher_uses_the_chosen_engine(outcomes: dict[str, Outcome], name: str) -> None:
    engine = outcomes[name].engine
    assert (engine["backend"], engine["zero_stage"]) == JOBS[name][2]


@pytest.mark.parametrize("name", [name for name in JOBS if name != "torchrun"])
def test_launchers_give_the_same_numbers_and_model(outcomes: dict[str, Outcome], name: str) -> None:
    found, reference = outcomes[name], outcomes["torchrun"]
    check_same_numbers(found, reference)
    if found.engine["backend"] == "ddp":
        assert found.steps == reference.steps
    assert sorted(file.name for file in found.model.iterdir()) == sorted(file.name for file in reference.model.iterdir())
    weights, expected = (load_file(outcome.model / "model.safetensors") for outcome in (found, reference))
    assert weights.keys() == expected.keys()
    assert max(float((weights[key] - expected[key]).abs().max()) for key in expected) < 1e-4


@pytest.mark.parametrize("changed_number", ["num_ranks", "padding_efficiency", "confusion", "loss", "prediction", "step"])
def test_comparison_finds_a_changed_number(outcomes: dict[str, Outcome], changed_number: str) -> None:
    reference = outcomes["torchrun"]
    changed = copy.deepcopy(reference)
    scores = changed.result["splits"]["validation"]
    if changed_number in EQUAL:
        changed.result[changed_number] += 1e-9
    elif changed_number == "confusion":
        scores["confusion"][0][0] -= 1
        scores["confusion"][0][1] += 1
    elif changed_number == "loss":
        scores["loss"] *= 1 + 1e-5
    elif changed_number == "prediction":
        changed.predictions[-1] += 1
    else:
        changed.steps[-1] = (changed.steps[-1][0] * (1 + 1e-4), changed.steps[-1][1])
    check_same_numbers(copy.deepcopy(reference), reference)
    with pytest.raises(AssertionError):
        check_same_numbers(changed, reference)
