"""The batch scripts on a real Slurm: two nodes, two ranks, taken away in every way, and the same bits in the end."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from support.network_hosts import listening
from support.processes import REPOSITORY
from support.slurm_cluster import ENDED, Lab

# Jobs wait in a queue, and what they share two cores with is not theirs to choose.
pytestmark = pytest.mark.timeout(900)
SCRIPTS = REPOSITORY / "slurm"
LONG = ("--optim.epochs", "12")
"""Some hundred steps: enough to be taken away in their midst, twice."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs are submitted, and leave what they leave."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def submit(lab: Lab, environ: dict[str, str], place: Path) -> Callable[..., str]:
    def submit(*arguments: str | Path, **extra: str) -> str:
        return lab.sbatch(*arguments, cwd=place, environ={**environ, **extra})

    return submit


def restarts(lab: Lab, job: str) -> int:
    found = re.search(r"Restarts=(\d+)", lab.client("scontrol", "show", "job", job))
    assert found
    return int(found[1])


def steps(run: Path) -> list[int]:
    """Those logged so far, in order."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # being written
        if event.get("event") == "StepDone":
            found.append(event["step"])
    return found


def at_step(lab: Lab, job: str, run: Path, step: int) -> None:
    """Wait until a run has come that far."""

    def is_there() -> bool:
        if max(steps(run), default=0) >= step:
            return True
        assert lab.state(job) not in ENDED, lab.told(job)
        return False

    lab.wait_for(is_there, 200, lambda: lab.told(job))


@contextmanager
def held(job: str) -> Iterator[psutil.Process]:
    """Rank 1 of a training stands still, and the others wait for it: however fast the machine, the job is still there when
    Slurm looks at time limits, which it does every 30 s. A signal that comes meanwhile waits too."""
    mine = {"SLURM_JOB_ID": job, "RANK": "1"}
    (rank,) = (process for process in psutil.process_iter() if mine.items() <= environ_of(process).items())
    rank.suspend()
    try:
        yield rank
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def environ_of(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def is_waiting(number: signal.Signals, process: psutil.Process) -> bool:
    """Whether a process that stands still has been sent a signal."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) & 1 << number - 1)


def told(place: Path, name: str, job: str) -> str:
    return (place / f"{name}-{job}.log").read_text()


def results(run: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What must not depend on how often a run was stopped: weights, scores, predictions."""
    result = json.loads((run / "result.json").read_text())
    return (
        load_file(run / "model" / "model.safetensors"),
        result["splits"],
        (run / "predictions-test.jsonl").read_text(),
    )


def assert_same(run: Path, other: Path) -> None:
    (weights, scores, predictions), (theirs, their_scores, their_predictions) = results(run), results(other)
    assert weights.keys() == theirs.keys()
    assert [name for name, weight in weights.items() if not weight.equal(theirs[name])] == []
    assert (scores, predictions) == (their_scores, their_predictions)


def test_fake_gpus_give_the_world_in_a_dry_run(lab: Lab, submit: Callable[..., str], place: Path) -> None:
    # As many of us write by habit: a task per GPU. Nodes start their ranks themselves.
    job = submit(
        "--nodes=2",
        "--gres=gpu:8",
        "--ntasks-per-node=2",
        SCRIPTS / "train.sbatch",
        "--optim.lr",
        "3e-4 '",
        DRY_RUN="1",
    )
    assert lab.ends(job) == "COMPLETED", lab.told(job)
    commands = [line for line in told(place, "agnews-train", job).splitlines() if "torch.distributed.run" in line]
    assert len(commands) == 2, lab.told(job)
    meeting = f"--rdzv_endpoint {lab.nodes[0]}:{20000 + int(job)} --rdzv_id {job}"
    for command in commands:
        assert f"--nproc_per_node 8 --max_restarts 0 --nnodes 2 --rdzv_backend c10d {meeting}" in command
        assert command.rstrip().endswith(f"-m agnews_dist train --run.name agnews-train-{job} --optim.lr 3e-4\\ \\'")
    # One of the nodes hosts the store.
    assert sorted(re.findall(r"is_host=\d", "".join(commands))) == ["is_host=0", "is_host=1"]
    assert not (place / "runs").exists()


def test_every_script_has_a_dry_run(lab: Lab, submit: Callable[..., str], place: Path) -> None:
    """Each prints what torchrun would start on both nodes, and leaves nothing."""
    ranks = {"debug": 1, "sweep": 2, "evaluate": 2, "prepare": 1}
    jobs: dict[str, str] = {}
    for name in ranks:
        options = ("--nodes=2", "--gres=gpu:2", *(("--array=5",) if name == "sweep" else ()))
        settings = {"DRY_RUN": "1"}
        jobs[name] = submit(*options, SCRIPTS / f"{name}.sbatch", "--config", "my file.yaml", **settings)
    debug = f"--debug --run.name agnews-debug-{jobs['debug']} --config my\\ file.yaml"
    (sweep,) = lab.client("squeue", "-h", "-t", "all", "-j", jobs["sweep"], "-o", "%A").split()
    expected = {
        "debug": [f"doctor {debug}", f"train {debug}"],
        "sweep": [f"train --run.name agnews-sweep-5-{sweep} --config my\\ file.yaml --run.seed 5"],
        "evaluate": ["evaluate --config my\\ file.yaml"],
        "prepare": ["prepare --config my\\ file.yaml"],
    }
    for name, job in jobs.items():
        assert lab.ends(job) == "COMPLETED", lab.told(job)
        said = told(place, f"agnews-{name}", f"{job}_5" if name == "sweep" else job)
        commands = re.findall(
            r"torch\.distributed\.run --nproc_per_node (\d) .* -m agnews_dist\.(.*) $", said, re.MULTILINE
        )
        assert commands == [(str(ranks[name]), story) for story in expected[name] for _ in lab.nodes], said
    assert not (place / "runs").exists()


@pytest.fixture(scope="module")
def two_at_once(lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path) -> tuple[str, str]:
    """The same training twice, on the same nodes at the same time: one runs undisturbed, one into its time limit."""
    arguments = ("--nodes=2", "--time=30", SCRIPTS / "train.sbatch", "--config", quickstart, *LONG)
    limited, undisturbed = submit(*arguments), submit(*arguments)
    at_step(lab, limited, place / "runs" / f"agnews-train-{limited}", 20)
    with held(limited) as rank:
        ran = lab.client("squeue", "-h", "-j", limited, "-o", "%M").split(":")
        # Less than the two minutes before the end at which Slurm was asked to warn.
        lab.client("scontrol", "update", f"JobId={limited}", f"TimeLimit={int(ran[-2]) + 2}")
        lab.wait_for(lambda: is_waiting(signal.SIGUSR1, rank), 60, lambda: lab.told(limited))
    lab.wait_for(lambda: lab.state(limited) == "PENDING", 60, lambda: lab.told(limited))
    lab.client("scontrol", "update", f"JobId={limited}", "TimeLimit=30")
    assert lab.ends(limited, 300) == "COMPLETED", lab.told(limited)
    assert lab.ends(undisturbed, 300) == "COMPLETED", lab.told(undisturbed)
    return limited, undisturbed


def test_a_job_comes_back_after_its_time_limit(lab: Lab, two_at_once: tuple[str, str], place: Path) -> None:
    limited, undisturbed = two_at_once
    assert (restarts(lab, limited), restarts(lab, undisturbed)) == (1, 0)
    run, other = (place / "runs" / f"agnews-train-{job}" for job in two_at_once)
    assert_same(run, other)
    assert steps(run) == steps(other) == list(range(1, max(steps(run)) + 1))
    said = told(place, "agnews-train", limited)
    assert "stopped (SIGUSR1) at step" in said, said
    assert f"job {limited}: requeued" in said
    assert f"job {limited}: the training ended with exit status 0; finished: after 2 attempt(s)" in said


def test_logs_are_one_per_rank_and_the_first_a_story(two_at_once: tuple[str, str], place: Path) -> None:
    logs = place / "logs" / f"agnews-train-{two_at_once[0]}"
    assert sorted(path.name for path in logs.iterdir()) == [
        *("rank-0.log", "rank-1.log", "starts.jsonl", "torchrun-0.log", "torchrun-1.log"),
    ]
    story = (logs / "rank-0.log").read_text()
    assert re.search(r"== rank 0 of 2 on \S+, .*, restart 1\n", story)
    assert story.count("run started on") == 2
    # Appended: what the first start said is still there, its end included.
    assert story.index("stopped (SIGUSR1) at step") < story.index(", restart 1\n") < story.index(" done\n")
    assert "Traceback" not in story + told(place, "agnews-train", two_at_once[0])
    assert (logs / "rank-1.log").read_text().count("== rank 1 of 2") == 2


def test_preempted_and_then_on_a_dead_node(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path, two_at_once: tuple[str, str]
) -> None:
    job = submit("--nodes=2", SCRIPTS / "train.sbatch", "--config", quickstart, *LONG, "--run.name", "taken")
    run = place / "runs" / "taken"
    at_step(lab, job, run, 20)
    with held(job):  # until Slurm's SIGCONT, which goes before its SIGTERM
        urgent = submit("--nodes=2", "--partition=high", "--exclusive", "--wrap", "sleep 1")
        assert lab.ends(urgent) == "COMPLETED"
    saved = json.loads((run / "status.json").read_text())
    assert saved["state"] == "preempted", lab.told(job)
    assert saved["step"] >= 20
    at_step(lab, job, run, saved["step"] + 20)
    with held(job):
        lab.set_down(lab.nodes[1])
        lab.set_up(lab.nodes[1])
    assert lab.ends(job, 300) == "COMPLETED", lab.told(job)
    assert restarts(lab, job) == 2, lab.told(job)
    assert_same(run, place / "runs" / f"agnews-train-{two_at_once[1]}")
    assert json.loads((run / "status.json").read_text())["attempt"] == 3


def test_a_cancelled_job_stays_away(lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path) -> None:
    job = submit(SCRIPTS / "train.sbatch", "--config", quickstart, *LONG)
    at_step(lab, job, place / "runs" / f"agnews-train-{job}", 5)
    lab.client("scancel", job)
    lab.wait_for(lambda: lab.state(job) == "CANCELLED", 20, lambda: lab.told(job))
    lab.wait_for(
        lambda: "it is left to Slurm" in told(place, "agnews-train", job), 30, lambda: told(place, "agnews-train", job)
    )
    time.sleep(2)  # a requeue would show by now
    assert (lab.state(job), restarts(lab, job)) == ("CANCELLED", 0)


def test_starts_that_save_nothing_are_given_up(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path
) -> None:
    arguments = (SCRIPTS / "train.sbatch", "--config", quickstart)
    diverging = submit(*arguments, "--optim.lr", "1e30", MAX_FRUITLESS_STARTS="2")
    absent = submit(*arguments, "--data.source", "./nowhere")
    wrong = submit(*arguments, "--optim.lrr", "1")
    assert [lab.ends(job) for job in (wrong, absent, diverging)] == ["FAILED"] * 3
    # What cannot get better is not tried again.
    assert [restarts(lab, job) for job in (wrong, absent)] == [0, 0]
    assert "Did you mean '--optim.lr'?" in told(place, "agnews-train", wrong)
    said = told(place, "agnews-train", absent)
    assert "give_up: this start failed before the run began" in said
    assert "./nowhere' does not exist" in said
    assert restarts(lab, diverging) == 1
    said = told(place, "agnews-train", diverging)
    assert "give_up: 2 starts in a row have saved nothing beyond step 0" in said, said
    assert f"What each rank said is in {place}/logs/agnews-train-{diverging}" in said


def test_a_cluster_that_is_not_fit_is_told_before_a_training_starts(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path
) -> None:
    (place / "file").write_text("")
    options = ("--run.dir", f"{place}/file/runs", "--accept", "optim.lr")
    job = submit(SCRIPTS / "train.sbatch", "--config", quickstart, *options, DOCTOR="1")
    assert lab.ends(job) == "FAILED"
    said = told(place, "agnews-train", job)
    assert re.search(r"disk: run\.dir +│ fail ", said), said
    assert re.search(r"error: \d of \d+ checks failed \(.*disk: run\.dir", said)
    assert "error: doctor ended with exit status 1. What each rank said is in" in said
    assert not (place / "logs" / f"agnews-train-{job}" / "starts.jsonl").exists()


def test_an_array_takes_lines_of_settings(lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path) -> None:
    (place / "rates.txt").write_text("--optim.lr 1e-3 --optim.epochs 1\n--optim.lr 2e-3  --optim.epochs 1\n")
    job = submit("--nodes=2", "--array=1-3", SCRIPTS / "sweep.sbatch", "--config", quickstart, SETTINGS="rates.txt")
    assert lab.ends(job) == "COMPLETED FAILED", lab.told(job)
    rates = {
        re.search(r"sweep-(\d)", path.parent.name)[1]: re.search(r"lr: (\S+)", path.read_text())[1]  # pyright: ignore[reportOptionalSubscript]
        for path in place.glob("runs/agnews-sweep-*/config.yaml")
    }
    assert rates == {"1": "0.001", "2": "0.002"}
    assert "error: rates.txt has no line 3" in (place / f"agnews-sweep-{job}_3.log").read_text()
    results = [json.loads(path.read_text()) for path in place.glob("runs/agnews-sweep-*/result.json")]
    assert [result["num_ranks"] for result in results] == [2, 2]


def test_what_comes_before_and_after_a_training_runs_on_two_nodes_too(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path, two_at_once: tuple[str, str]
) -> None:
    run, num_hosts = place / "runs" / f"agnews-train-{two_at_once[1]}", 2 if lab.is_networked else 1
    scored = ("--config", run / "config.yaml", "--model.name", run, "--split", "test", "--output", "scores")
    stories = {
        "prepare": submit("--nodes=2", SCRIPTS / "prepare.sbatch", "--config", quickstart, "--data.cache_dir", "fresh"),
        # The doctor minds two nodes of one name, as they have on loopback.
        "debug": submit(
            f"--nodes={num_hosts}", SCRIPTS / "debug.sbatch", "--config", quickstart, "--optim.epochs", "1"
        ),
        "evaluate": submit("--nodes=2", SCRIPTS / "evaluate.sbatch", *map(str, scored)),
    }
    for job in stories.values():
        assert lab.ends(job, 240) == "COMPLETED", lab.told(job)
    assert len(list(place.glob("fresh/*/meta.json"))) == 1
    small = place / "runs" / f"agnews-debug-{stories['debug']}"
    assert json.loads((small / "result.json").read_text())["num_ranks"] == num_hosts
    found, trained = (json.loads(path.read_text()) for path in (place / "scores" / "result.json", run / "result.json"))
    assert found["num_ranks"] == 2
    for name in ("num_correct", "num_examples"):
        assert found["splits"]["test"][name] == trained["splits"]["test"][name]
    assert len(list(place.glob("copies/*/meta.json"))) == 1


def test_a_task_of_an_array_goes_back_alone(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path
) -> None:
    """One of the tasks has the array's own number, with which Slurm's clients mean all of them."""
    array = submit("--array=1-2", SCRIPTS / "sweep.sbatch", "--config", quickstart, *LONG, "--run.dir", "swept")
    lab.wait_for(lambda: lab.state(array) == "RUNNING", 30, lambda: lab.told(array))
    numbers = lab.client("squeue", "-h", "-r", "-j", array, "-o", "%A %i").split()
    task = dict(zip(numbers[::2], numbers[1::2], strict=True))[array]
    (other,) = {f"{array}_1", f"{array}_2"} - {task}
    at_step(lab, array, place / "swept" / f"agnews-sweep-{task[-1]}-{array}", 20)
    lab.client("scancel", "--signal=USR1", "--batch", task)
    assert lab.ends(array, 200) == "COMPLETED", lab.told(array)
    assert (restarts(lab, task), restarts(lab, other)) == (1, 0)
    said = (place / f"agnews-sweep-{task}.log").read_text()
    assert f"job {task}: requeued" in said
    assert f"job {task}: the training ended with exit status 0; finished: after 2 attempt(s)" in said


def test_a_job_stopped_while_the_cluster_is_checked_comes_back(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path
) -> None:
    # Without the user's environment, as many sites would have it: what the scripts tell each other must reach the nodes.
    kept = ",".join(("DOCTOR=1", *(f"{name}={value}" for name, value in lab.environ.items() if name == "SLURM_CONF")))
    job = submit(f"--export={kept}", SCRIPTS / "train.sbatch", "--config", quickstart, "--optim.epochs", "1")
    mine = {"SLURM_JOB_ID": job, "COMMAND": "doctor", "RANK": "0"}
    lab.wait_for(
        lambda: any(mine.items() <= environ_of(process).items() for process in psutil.process_iter()),
        60,
        lambda: lab.told(job),
    )
    lab.client("scancel", "--signal=USR1", "--batch", job)
    assert lab.ends(job, 200) == "COMPLETED", lab.told(job)
    assert restarts(lab, job) == 1
    said = told(place, "agnews-train", job)
    assert said.index(f"job {job}: requeued") < said.index(f"job {job}: start 1, 0 steps are saved"), said


def test_a_node_that_cannot_meet_the_others_does_not_keep_them(
    lab: Lab, submit: Callable[..., str], quickstart: Path, place: Path
) -> None:
    if not lab.is_networked:
        pytest.skip("on loopback every port is both nodes'")
    with listening(lab.inside(lab.nodes[0]), 23456) as owner:
        job = submit("--nodes=2", SCRIPTS / "train.sbatch", "--config", quickstart, PORT="23456")
        assert lab.ends(job, 60) == "FAILED", lab.told(job)
    said = told(place, "agnews-train", job)
    assert f"error: rendezvous: port 23456 of {lab.nodes[0]} is taken by process {owner} (python" in said, said
    assert "give_up: this start failed before the run began" in said
