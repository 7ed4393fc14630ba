"""The batch scripts on a real Slurm of two nodes: time limits, preemption and dead nodes leave the same bits."""

import csv
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
from support import fork_server
from support.network_hosts import listening
from support.processes import REPOSITORY
from support.slurm_cluster import ENDED, Lab

# Jobs wait in a queue, on a machine that may be busy.
pytestmark = pytest.mark.timeout(3600)
SCRIPTS = REPOSITORY / "slurm"
LONG = ("--optim.epochs", "10")
"""380 steps: long enough to be stopped twice."""
SWEPT = ("--optim.lr", "1e-3,2e-3", "--run.seed", "0..3", "--report.write", "false", *LONG)
"""A sweep of four waves, one per seed."""
SECONDS = 600.0
"""Limit for a state of a job, many times what an idle machine needs."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory from which jobs are submitted; they write their files there."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def submit(lab: Lab, environ: dict[str, str], project: Path) -> Callable[..., str]:
    def submit(*arguments: str | Path, **extra: str) -> str:
        return lab.sbatch(*arguments, cwd=project, environ={**environ, **extra})

    return submit


def restarts(lab: Lab, job: str) -> int:
    found = re.search(r"Restarts=(\d+)", lab.client("scontrol", "show", "job", job))
    assert found
    return int(found[1])


def logged_steps(run: Path) -> list[int]:
    """Return the steps in the event log, in order."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # a line that is being written
        if event.get("event") == "StepDone":
            found.append(event["step"])
    return found


def wait_for_step(lab: Lab, job: str, run: Path, step: int) -> None:
    """Wait until a run has reached `step`."""

    def has_step() -> bool:
        if max(logged_steps(run), default=0) >= step:
            return True
        assert lab.state(job) not in ENDED, lab.describe_job(job)
        return False

    lab.wait_for(has_step, SECONDS, lambda: lab.describe_job(job))


@contextmanager
def suspended_rank(job: str) -> Iterator[psutil.Process]:
    """Stop rank 1 of a training for a while; the other rank waits for it, and a signal to it stays pending.

    So the job still runs when Slurm next checks time limits, which it does every 30 s.
    """
    mine = {"SLURM_JOB_ID": job, "RANK": "1"}
    (rank,) = (process for process in psutil.process_iter() if mine.items() <= environment_of(process).items())
    rank.suspend()
    try:
        yield rank
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def environment_of(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def has_pending(number: signal.Signals, process: psutil.Process) -> bool:
    """Return whether a suspended process has been sent a signal."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) & 1 << number - 1)


def read_status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def read_log(project: Path, name: str, job: str) -> str:
    return (project / f"{name}-{job}.log").read_text()


def read_results(run: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return weights, scores and predictions, which must not depend on restarts."""
    result = json.loads((run / "result.json").read_text())
    return (load_file(run / "model" / "model.safetensors"), result["splits"], (run / "predictions-test.jsonl").read_text())


def check_same_results(run: Path, other: Path) -> None:
    (weights, scores, predictions), (theirs, their_scores, their_predictions) = read_results(run), read_results(other)
    assert weights.keys() == theirs.keys()
    assert [name for name, weight in weights.items() if not weight.equal(theirs[name])] == []
    assert (scores, predictions) == (their_scores, their_predictions)


def test_train_starts_one_rank_per_gpu_of_the_job(lab: Lab, submit: Callable[..., str], project: Path) -> None:
    # A task per GPU, as many users write; the script starts one task per node all the same.
    job = submit(
        "--nodes=2", "--gres=gpu:8", "--ntasks-per-node=2", SCRIPTS / "train.sbatch", "--optim.lr", "3e-4 '", DRY_RUN="1"
    )
    assert lab.ends(job, SECONDS) == "COMPLETED", lab.describe_job(job)
    commands = [line for line in read_log(project, "agnews-train", job).splitlines() if "torch.distributed.run" in line]
    assert len(commands) == 2, lab.describe_job(job)
    meeting = f"--rdzv_endpoint {lab.nodes[0]}:{20000 + int(job)} --rdzv_id {job}"
    for command in commands:
        assert f"--nproc_per_node 8 --max_restarts 0 --nnodes 2 --rdzv_backend c10d {meeting}" in command
        assert command.rstrip().endswith(f"-m agnews_dist train --run.name agnews-train-{job} --optim.lr 3e-4\\ \\'")
    # Exactly one node hosts the store.
    assert sorted(re.findall(r"is_host=\d", "".join(commands))) == ["is_host=0", "is_host=1"]
    assert not (project / "runs").exists()


def test_batch_scripts_print_their_commands_in_a_dry_run(lab: Lab, submit: Callable[..., str], project: Path) -> None:
    ranks = {"debug": 1, "sweep": 2, "evaluate": 2, "prepare": 1}
    jobs: dict[str, str] = {}
    for name in ranks:
        options = ("--nodes=2", "--gres=gpu:2", *(("--array=5",) if name == "sweep" else ()))
        settings = {"DRY_RUN": "1"}
        jobs[name] = submit(*options, SCRIPTS / f"{name}.sbatch", "--config", "my file.yaml", **settings)
    debug = f"--debug --run.name agnews-debug-{jobs['debug']} --config my\\ file.yaml"
    expected = {
        "debug": [f"doctor {debug}", f"train {debug}"],
        "sweep": [f"sweep --run.name agnews-sweep-{jobs['sweep']} --config my\\ file.yaml"],
        "evaluate": ["evaluate --config my\\ file.yaml"],
        "prepare": ["prepare --config my\\ file.yaml"],
    }
    for name, job in jobs.items():
        assert lab.ends(job, SECONDS) == "COMPLETED", lab.describe_job(job)
        log = read_log(project, f"agnews-{name}", job)
        commands = re.findall(r"torch\.distributed\.run --nproc_per_node (\d) .* -m agnews_dist (.*) $", log, re.MULTILINE)
        assert commands == [(str(ranks[name]), command) for command in expected[name] for _ in lab.nodes], log
    assert not (project / "runs").exists()


@pytest.fixture(scope="module")
def interrupted(lab: Lab, submit: Callable[..., str], config: Path, project: Path) -> str:
    """A job that was interrupted by a time limit, a preemption and a dead node."""
    job = submit("--nodes=2", "--time=30", SCRIPTS / "train.sbatch", "--config", config, *LONG)
    run = project / "runs" / f"agnews-train-{job}"
    wait_for_step(lab, job, run, 20)
    with suspended_rank(job) as rank:
        ran = lab.client("squeue", "-h", "-j", job, "-o", "%M").split(":")
        # Less than the two minutes before the end at which Slurm sends the signal.
        lab.client("scontrol", "update", f"JobId={job}", f"TimeLimit={int(ran[-2]) + 2}")
        lab.wait_for(lambda: has_pending(signal.SIGUSR1, rank), SECONDS, lambda: lab.describe_job(job))
    lab.wait_for(lambda: lab.state(job) == "PENDING", SECONDS, lambda: lab.describe_job(job))
    lab.client("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    wait_for_step(lab, job, run, read_status(run)["step"] + 20)
    with suspended_rank(job):  # until Slurm sends SIGCONT, before its SIGTERM
        urgent = submit("--nodes=2", "--partition=high", "--exclusive", "--wrap", "sleep 1")
        assert lab.ends(urgent, SECONDS) == "COMPLETED"
    saved = read_status(run)
    assert saved["state"] == "preempted", lab.describe_job(job)
    assert saved["step"] >= 40
    wait_for_step(lab, job, run, saved["step"] + 20)
    with suspended_rank(job):
        lab.set_down(lab.nodes[1])
        lab.set_up(lab.nodes[1])
    assert lab.ends(job, SECONDS) == "COMPLETED", lab.describe_job(job)
    return job


def test_train_is_requeued_and_resumes_after_every_interruption(
    lab: Lab, interrupted: str, config: Path, project: Path, tmp_path: Path
) -> None:
    assert restarts(lab, interrupted) == 3
    run, other = project / "runs" / f"agnews-train-{interrupted}", tmp_path / "undisturbed"
    assert read_status(run)["attempt"] == 4
    own = ("--run.dir", str(tmp_path), "--run.name", other.name, "--data.cache_dir", str(tmp_path / "cache"))
    fork_server.run_ranks(2, "-m", "agnews_dist.train", "--config", str(config), *LONG, *own)
    check_same_results(run, other)
    assert logged_steps(run) == logged_steps(other) == list(range(1, max(logged_steps(run)) + 1))
    log = read_log(project, "agnews-train", interrupted)
    assert "stopped (SIGUSR1) at step" in log, log
    assert f"job {interrupted}: requeued" in log
    assert f"job {interrupted}: train exited with status 0; finished: after 4 attempt(s)" in log


def test_train_appends_to_one_log_per_rank(interrupted: str, project: Path) -> None:
    logs = project / "logs" / f"agnews-train-{interrupted}"
    assert sorted(path.name for path in logs.iterdir()) == [
        *("rank-0.log", "rank-1.log", "starts.jsonl", "torchrun-0.log", "torchrun-1.log")
    ]
    log = (logs / "rank-0.log").read_text()
    assert re.search(r"== rank 0 of 2 on \S+, .*, restart 1\n", log)
    assert log.count("run started on") == 4
    # The first start's lines are still there, its end included.
    assert log.index("stopped (SIGUSR1) at step") < log.index(", restart 1\n") < log.index(" done\n")
    assert "Traceback" not in log + read_log(project, "agnews-train", interrupted)
    assert (logs / "rank-1.log").read_text().count("== rank 1 of 2") == 4


def test_every_signal_to_the_batch_script_saves_and_requeues(
    lab: Lab, submit: Callable[..., str], config: Path, project: Path
) -> None:
    job = submit(SCRIPTS / "train.sbatch", "--config", config, *LONG)
    run = project / "runs" / f"agnews-train-{job}"
    for number, name in enumerate(("HUP", "QUIT", "INT", "USR2")):
        wait_for_step(lab, job, run, read_status(run)["step"] + 10 if number else 10)
        lab.client("scancel", f"--signal={name}", "--batch", job)
        lab.wait_for(lambda before=number: restarts(lab, job) > before, SECONDS, lambda: lab.describe_job(job))
        status = read_status(run)
        assert (status["state"], status["attempt"]) == ("preempted", number + 1), lab.describe_job(job)
    lab.client("scancel", job)
    assert lab.ends(job, SECONDS) == "CANCELLED", lab.describe_job(job)


def test_train_does_not_requeue_a_cancelled_job(lab: Lab, submit: Callable[..., str], config: Path, project: Path) -> None:
    job = submit(SCRIPTS / "train.sbatch", "--config", config, *LONG)
    wait_for_step(lab, job, project / "runs" / f"agnews-train-{job}", 5)
    lab.client("scancel", job)
    lab.wait_for(lambda: lab.state(job) == "CANCELLED", SECONDS, lambda: lab.describe_job(job))
    lab.wait_for(
        lambda: "not requeued by this script" in read_log(project, "agnews-train", job),
        SECONDS,
        lambda: read_log(project, "agnews-train", job),
    )
    time.sleep(2)  # a requeue would be visible by now
    assert (lab.state(job), restarts(lab, job)) == ("CANCELLED", 0)


def test_train_gives_up_after_starts_that_save_nothing(
    lab: Lab, submit: Callable[..., str], config: Path, project: Path
) -> None:
    arguments = (SCRIPTS / "train.sbatch", "--config", config)
    diverging = submit(*arguments, "--optim.lr", "1e30", MAX_FRUITLESS_STARTS="2")
    absent = submit(*arguments, "--data.source", "./nowhere")
    wrong = submit(*arguments, "--optim.lrr", "1")
    assert [lab.ends(job, SECONDS) for job in (wrong, absent, diverging)] == ["FAILED"] * 3
    # Errors in settings or data are not retried.
    assert [restarts(lab, job) for job in (wrong, absent)] == [0, 0]
    assert "Did you mean '--optim.lr'?" in read_log(project, "agnews-train", wrong)
    log = read_log(project, "agnews-train", absent)
    assert "give_up: this start failed before the run began" in log
    assert "./nowhere' does not exist" in log
    assert restarts(lab, diverging) == 1
    log = read_log(project, "agnews-train", diverging)
    assert "give_up: 2 starts in a row have saved nothing beyond step 0" in log, log
    assert f"The ranks' logs are in {project}/logs/agnews-train-{diverging}" in log


def test_train_does_not_start_if_the_doctor_fails(lab: Lab, submit: Callable[..., str], config: Path, project: Path) -> None:
    (project / "file").write_text("")
    options = ("--run.dir", f"{project}/file/runs", "--accept", "optim.lr")
    job = submit(SCRIPTS / "train.sbatch", "--config", config, *options, DOCTOR="1")
    assert lab.ends(job, SECONDS) == "FAILED"
    log = read_log(project, "agnews-train", job)
    assert re.search(r"^fail +disk: run\.dir", log, re.MULTILINE), log
    assert re.search(r"error: \d of \d+ checks failed \(.*disk: run\.dir", log)
    assert "error: doctor exited with status 1. The ranks' logs are in" in log
    assert not (project / "logs" / f"agnews-train-{job}" / "starts.jsonl").exists()


@pytest.fixture(scope="module")
def swept(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The table of an undisturbed sweep in one process."""
    directory = tmp_path_factory.mktemp("swept")
    own = ("--run.dir", str(directory), "--run.name", "whole", "--data.cache_dir", str(directory / "cache"))
    fork_server.run_python("-m", "agnews_dist", "sweep", "--config", str(config), *SWEPT, *own)
    return read_table(directory / "whole")


def read_table(sweep: Path) -> list[list[str]]:
    """Return the rows of sweep.csv without times."""
    rows = [*csv.reader((sweep / "sweep.csv").read_text().splitlines())]
    seconds = rows[0].index("seconds")
    return [row[:seconds] + row[seconds + 1 :] for row in rows]


def count_members(sweep: Path) -> int:
    return len(list((sweep / "members").glob("*.json")))


def test_sweep_continues_after_a_requeue(
    lab: Lab, submit: Callable[..., str], config: Path, project: Path, swept: list[list[str]]
) -> None:
    job = submit("--nodes=2", SCRIPTS / "sweep.sbatch", "--config", config, *SWEPT)
    sweep = project / "runs" / f"agnews-sweep-{job}"
    lab.wait_for(lambda: count_members(sweep) > 0, SECONDS, lambda: lab.describe_job(job))
    lab.client("scancel", "--signal=USR1", "--batch", job)
    lab.wait_for(lambda: restarts(lab, job) == 1, SECONDS, lambda: lab.describe_job(job))
    ended = {path: path.stat().st_mtime_ns for path in (sweep / "members").glob("*.json")}
    assert read_status(sweep)["state"] == "preempted", lab.describe_job(job)
    assert len(ended) < len(swept) - 1
    assert lab.ends(job, SECONDS) == "COMPLETED", lab.describe_job(job)
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    assert read_table(sweep) == swept
    assert (read_status(sweep)["state"], read_status(sweep)["attempt"]) == ("finished", 2)
    log = read_log(project, "agnews-sweep", job)
    assert f"job {job}: requeued" in log
    assert f"job {job}: sweep exited with status 0; finished: after 2 attempt(s)" in log


def test_tasks_of_an_array_share_a_sweep_and_its_features(
    lab: Lab, submit: Callable[..., str], config: Path, project: Path, swept: list[list[str]], tmp_path: Path
) -> None:
    own = ("--data.cache_dir", str(tmp_path))
    array = submit("--array=2-3", SCRIPTS / "sweep.sbatch", "--config", config, *SWEPT, *own)
    sweep = project / "runs" / f"agnews-sweep-{array}"
    both = (sweep / "status-1.json", sweep / "members" / "00002.json")  # the first member of the second task
    lab.wait_for(lambda: all(path.is_file() for path in both), SECONDS, lambda: lab.describe_job(array))
    # The last task has the array's own number, which means all tasks to Slurm's clients.
    task = f"{array}_3"
    assert lab.client("squeue", "-h", "-j", task, "-o", "%A") == array
    lab.client("scancel", "--signal=USR1", "--batch", task)
    assert lab.ends(array, SECONDS) == "COMPLETED", lab.describe_job(array)
    assert (restarts(lab, f"{array}_2"), restarts(lab, task)) == (0, 1)
    assert read_table(sweep) == swept
    assert [json.loads((sweep / name).read_text())["state"] for name in ("status.json", "status-1.json")] == ["finished"] * 2
    log = read_log(project, "agnews-sweep", array)
    assert f"job {task}: requeued" in log, log
    assert any((tmp_path / "features").iterdir())


def test_train_requeues_a_job_that_is_stopped_during_the_doctor(
    lab: Lab, submit: Callable[..., str], config: Path, project: Path
) -> None:
    # Without the user's environment, as some sites require; the scripts' own variables must reach the nodes.
    kept = ",".join(("DOCTOR=1", *(f"{name}={value}" for name, value in lab.environ.items() if name == "SLURM_CONF")))
    job = submit(f"--export={kept}", SCRIPTS / "train.sbatch", "--config", config, "--optim.epochs", "1")
    mine = {"SLURM_JOB_ID": job, "COMMAND": "doctor", "RANK": "0"}
    lab.wait_for(
        lambda: any(mine.items() <= environment_of(process).items() for process in psutil.process_iter()),
        SECONDS,
        lambda: lab.describe_job(job),
    )
    lab.client("scancel", "--signal=USR1", "--batch", job)
    lab.wait_for(lambda: restarts(lab, job) == 1, SECONDS, lambda: lab.describe_job(job))
    lab.client("scancel", job)
    assert lab.ends(job, SECONDS) == "CANCELLED", lab.describe_job(job)
    log = read_log(project, "agnews-train", job)
    assert f"job {job}: requeued" in log, log
    assert f"job {job}: start 1" not in log, "no training was started and counted"


def test_train_ends_at_once_if_a_node_cannot_meet_the_others(
    lab: Lab, submit: Callable[..., str], config: Path, project: Path
) -> None:
    if not lab.is_networked:
        pytest.skip("on loopback both nodes have the same ports")
    with listening(lab.inside(lab.nodes[0]), 23456) as owner:
        job = submit("--nodes=2", SCRIPTS / "train.sbatch", "--config", config, PORT="23456")
        assert lab.ends(job, SECONDS) == "FAILED", lab.describe_job(job)
    log = read_log(project, "agnews-train", job)
    assert f"error: rendezvous: port 23456 of {lab.nodes[0]} is taken by process {owner} (python" in log, log
    assert "give_up: this start failed before the run began" in log
