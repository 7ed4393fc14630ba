"""slurm/job.sh with stand-ins for Slurm's clients: answers that the test cluster does not give."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import REPOSITORY

CLIENT = """\
#!/bin/sh
# Append the call to a log, then print the next line of a file of answers; `fail` fails.
echo "${0##*/} $*" >>"$CALLS"
answer=$(sed -n 1p "$ANSWERS/${0##*/}")
sed -i 1d "$ANSWERS/${0##*/}"
[ "$answer" = fail ] && exit 1
[ -z "$answer" ] || echo "$answer"
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a job", "SLURM_JOB_END_TIME": "1", "SLURM_JOB_NUM_NODES": "1"}
BATCH_SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))


class FakeSlurm:
    """Clients with scripted answers, and a log of their calls."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.calls, self.answers = directory, directory / "calls", directory / "answers"
        self.answers.mkdir()
        (directory / "bin").mkdir()
        for name, text in {"squeue": CLIENT, "scontrol": CLIENT, "sleep": "#!/bin/sh\n"}.items():
            self.add_client(name, text)

    def add_client(self, name: str, text: str) -> None:
        """Write a program of this name."""
        path = self.directory / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def environ(self, **extra: str) -> dict[str, str]:
        """Return the variables of a batch script."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        own = {"CALLS": str(self.calls), "ANSWERS": str(self.answers), "SLURM_SUBMIT_DIR": str(self.directory)}
        return {**clean, **JOB, **own, "PATH": f"{self.directory}/bin:{os.environ['PATH']}", **extra}

    def run(self, *lines: str, squeue: str = "", scontrol: str = "", **environ: str) -> tuple[int, str, list[str]]:
        """Run `lines` after job.sh; return exit code, output and the clients' calls. Answers are separated by `|`."""
        for name, answers in {"squeue": squeue, "scontrol": scontrol}.items():
            (self.answers / name).write_text("".join(f"{answer}\n" for answer in answers.split("|")))
        done = subprocess.run(
            ["bash", "-c", "\n".join((f"source '{REPOSITORY}/slurm/job.sh'", *lines))],
            env=self.environ(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return done.returncode, done.stdout, calls


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


@pytest.mark.parametrize(
    ("squeue", "scontrol", "expected", "num_requeues"),
    [
        ("RUNNING", "", "job 7: requeued", 1),
        ("CANCELLED", "", "job 7: state CANCELLED, not requeued by this script", 0),
        ("COMPLETING", "", "job 7: state COMPLETING, not requeued by this script", 0),
        # The controller is busy or down for a while: no answer does not mean that the job has ended.
        ("fail|fail|RUNNING", "fail|", "job 7: requeued", 2),
        ("fail|fail|fail|fail|fail", "", "job 7: requeued", 1),
        # The site forbids requeues.
        ("RUNNING", "fail|fail|fail|fail|fail", "error: job 7: Slurm refused to requeue it.", 5),
    ],
)
def test_requeue_job(slurm: FakeSlurm, squeue: str, scontrol: str, expected: str, num_requeues: int) -> None:
    code, out, calls = slurm.run("requeue_job", squeue=squeue, scontrol=scontrol)
    assert code == 75
    assert out.startswith(expected)
    assert calls.count("scontrol requeue 7") == num_requeues


def test_requeue_job_requeues_one_task_of_an_array(slurm: FakeSlurm) -> None:
    # One task has the array's own number, which means all tasks to Slurm's clients.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, out, calls = slurm.run("is_preempted || requeue_job", scontrol="PreemptTime=None", squeue="RUNNING", **array)
    assert out == "job 7_3: requeued\n"
    assert calls == ["scontrol show job 7_3", "squeue --noheader --jobs 7_3 --format %T", "scontrol requeue 7_3"]


@pytest.mark.parametrize(("answer", "expected"), [("PreemptTime=None", "no"), ("PreemptTime=2026-01-01T00:00:00", "yes")])
def test_is_preempted_reads_the_jobs_record(slurm: FakeSlurm, answer: str, expected: str) -> None:
    assert slurm.run("is_preempted && echo yes || echo no", scontrol=f"a=1 {answer} b=2")[1] == f"{expected}\n"


def test_run_to_end_requeues_a_job_that_is_stopped_before_the_ranks_start(slurm: FakeSlurm) -> None:
    # While the environment is set up, no rank handles signals yet.
    environ = {"INTERPRETER": f"{REPOSITORY}/.venv/bin/python", "OMP_NUM_THREADS": "1"}
    arguments = f"--run.dir {slurm.directory}/runs"
    code, out, calls = slurm.run("kill -USR1 $$", f"run_to_end train {arguments}", squeue="RUNNING", **environ)
    assert code == 75, out
    assert out.splitlines() == ["job 7: start 1, 0 steps are saved", "job 7: requeued"]
    assert calls[-1] == "scontrol requeue 7"


def test_run_command_returns_the_status_of_a_step_that_ends_at_once(slurm: FakeSlurm) -> None:
    slurm.add_client("srun", '#!/bin/sh\n[ "$1" = --export=ALL ] && exit 3\n')
    # Delay the first look at the step until it has ended.
    delay = 'kill() { command sleep 0.3; builtin kill "$@"; }'
    code, out, _ = slurm.run(delay, "run_command train; exit $?")
    assert code == 3, out
    assert f"error: train exited with status 3. The ranks' logs are in {slurm.directory}/logs/a job-7." in out


def test_job_accepts_a_careless_setup_and_ignores_exported_node_variables(slurm: FakeSlurm) -> None:
    setup = 'setup() { : "$THIS_IS_UNSET"; false; }'
    show = 'echo "${NODES-none} ${NODE-none} ${HEAD-none} $LOGS"'
    exported = {"SLURM_SUBMIT_DIR": "/there", "LOGS": "/my logs", "NODES": "1", "NODE": "0", "HEAD": "x"}
    done = subprocess.run(
        ["bash", "-c", f"{setup}\nsource '{REPOSITORY}/slurm/job.sh'\n{show}"],
        env=slurm.environ(**exported),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("none none none /my logs/a job-7\n", "")


def test_logs_in_quotes_are_expanded_and_site_env_may_have_crlf(slurm: FakeSlurm, tmp_path: Path) -> None:
    for name in ("slurm", "agnews_dist"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
    settings = ["LOGS='~/my logs/$SITE'", "setup() {", "    export OFFLINE=1", "}"]
    (tmp_path / "slurm" / "site.env").write_text("".join(f"{line}\r\n" for line in settings), newline="")
    done = subprocess.run(
        ["bash", "-c", f"source '{tmp_path}/slurm/job.sh'\necho \"$LOGS $OFFLINE\""],
        env=slurm.environ(HOME="/home/me", SITE="north", INTERPRETER=sys.executable),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("/home/me/my logs/north/a job-7 1\n", "")


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda script: script.stem)
def test_batch_script_sources_job_sh_of_the_submitted_file(slurm: FakeSlurm, script: Path) -> None:
    # Slurm runs a copy; one record per task of an array names the submitted file and its arguments.
    folder = slurm.directory / "a b"
    record = f"   JobId=7\n   Command={folder}/mine.sbatch --config x/y.yaml\n   WorkDir=/tmp\n"
    slurm.add_client("scontrol", f"#!/bin/sh\nprintf '%s' '{record * 2}'\n")

    def run_copy() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(script)]
        return subprocess.run(command, env=slurm.environ(), capture_output=True, text=True, check=False)

    done = run_copy()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{folder}/job.sh: No such file" in done.stderr
    assert "error: no job.sh next to the submitted file. Keep NAME.sbatch in the repository's slurm/." in done.stderr
    folder.mkdir()
    (folder / "job.sh").write_text("echo found\nexit 3\n")
    done = run_copy()
    assert (done.returncode, done.stdout) == (3, "found\n")
