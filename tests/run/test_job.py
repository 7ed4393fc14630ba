"""slurm/job.sh where Slurm's clients answer what a test cluster cannot be brought to say: away, busy, an array's many tasks."""

import os
import subprocess
from pathlib import Path

import pytest
from support.processes import REPOSITORY

CLIENT = """\
#!/bin/sh
# What was asked goes to a file; the answer is the next line of another, `fail` is none.
echo "${0##*/} $*" >>"$ASKED"
answer=$(sed -n 1p "$ANSWERS/${0##*/}")
sed -i 1d "$ANSWERS/${0##*/}"
[ "$answer" = fail ] && exit 1
[ -z "$answer" ] || echo "$answer"
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a job", "SLURM_JOB_END_TIME": "1", "SLURM_JOB_NUM_NODES": "1"}


class Slurm:
    """Clients that answer as they are told."""

    def __init__(self, place: Path) -> None:
        self.place, self.asked = place, place / "asked"
        self.answers = place / "answers"
        self.answers.mkdir()
        (place / "bin").mkdir()
        for name, text in {"squeue": CLIENT, "scontrol": CLIENT, "sleep": "#!/bin/sh\n"}.items():
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)

    def run(self, *lines: str, squeue: str = "", scontrol: str = "", **environ: str) -> tuple[int, str, list[str]]:
        """(exit code, what was said, what the clients were asked) of a batch script with these lines."""
        for name, answers in {"squeue": squeue, "scontrol": scontrol}.items():
            (self.answers / name).write_text("".join(f"{answer}\n" for answer in answers.split("|")))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        told = {"ASKED": str(self.asked), "ANSWERS": str(self.answers), "SLURM_SUBMIT_DIR": str(self.place)}
        path = f"{self.place}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", "\n".join((f"source '{REPOSITORY}/slurm/job.sh'", *lines))],
            env={**clean, **JOB, **told, "PATH": path, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        asked = self.asked.read_text().splitlines() if self.asked.exists() else []
        return done.returncode, done.stdout, asked


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize(
    ("squeue", "scontrol", "said", "num_requeues"),
    [
        ("RUNNING", "", "job 7: requeued", 1),
        ("CANCELLED", "", "job 7: it is left to Slurm", 0),
        ("COMPLETING", "", "job 7: it is left to Slurm", 0),
        # The controller is busy, or away for a while: no answer is not the answer that the job is over.
        ("fail|fail|RUNNING", "fail|", "job 7: requeued", 2),
        ("fail|fail|fail|fail|fail", "", "job 7: requeued", 1),
        # A site that allows no requeue.
        (
            "RUNNING",
            "fail|fail|fail|fail|fail",
            "error: job 7 was not requeued: it would go on where it was stopped.",
            5,
        ),
    ],
)
def test_back_into_the_queue(slurm: Slurm, squeue: str, scontrol: str, said: str, num_requeues: int) -> None:
    code, out, asked = slurm.run("again", squeue=squeue, scontrol=scontrol)
    assert code == 75
    assert out.startswith(said)
    assert asked.count("scontrol requeue 7") == num_requeues


def test_a_task_of_an_array_means_itself_though_it_may_have_the_arrays_number(slurm: Slurm) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, out, asked = slurm.run("is_taken_away || again", scontrol="PreemptTime=None", squeue="RUNNING", **array)
    assert out == "job 7_3: requeued\n"
    assert asked == ["scontrol show job 7_3", "squeue --noheader --jobs 7_3 --format %T", "scontrol requeue 7_3"]


@pytest.mark.parametrize(("answer", "taken"), [("PreemptTime=None", "no"), ("PreemptTime=2026-01-01T00:00:00", "yes")])
def test_a_preemption_shows_in_slurms_own_record(slurm: Slurm, answer: str, taken: str) -> None:
    assert slurm.run("is_taken_away && echo yes || echo no", scontrol=f"a=1 {answer} b=2")[1] == f"{taken}\n"


def test_a_job_that_is_told_to_stop_before_it_has_begun_goes_back_at_once(slurm: Slurm) -> None:
    """While the environment is set up, or Python starts: nothing handles the ranks' signals yet."""
    runs = ("--run.dir", f"{slurm.place}/runs")
    told = {"INTERPRETER": f"{REPOSITORY}/.venv/bin/python", "OMP_NUM_THREADS": "1"}
    code, out, asked = slurm.run("kill -USR1 $$", f"train_to_the_end {' '.join(runs)}", squeue="RUNNING", **told)
    assert code == 75, out
    assert out.splitlines() == ["job 7: start 1, 0 steps are saved", "job 7: requeued"]
    assert asked[-1] == "scontrol requeue 7"


def test_an_end_that_comes_at_once_is_known(slurm: Slurm) -> None:
    srun = slurm.place / "bin" / "srun"
    srun.write_text('#!/bin/sh\n[ "$1" = --export=ALL ] && exit 3\n')
    srun.chmod(0o755)
    delay = (
        'kill() { command sleep 0.3; builtin kill "$@"; }'  # the step is over, and known to be, before the first look
    )
    code, out, _ = slurm.run(delay, "story train; exit $?")
    assert code == 3, out
    assert f"error: train ended with exit status 3. What each rank said is in {slurm.place}/logs/a job-7." in out


def test_what_a_site_sets_up_need_not_be_strict_and_what_a_shell_exports_does_not_count(slurm: Slurm) -> None:
    setup = 'setup() { : "$THIS_IS_UNSET"; false; }'
    shown = 'echo "${NODES-none} ${NODE-none} ${HEAD-none} $LOGS"'
    said = subprocess.run(
        ["bash", "-c", f"{setup}\nsource '{REPOSITORY}/slurm/job.sh'\n{shown}"],
        env={
            **os.environ,
            **JOB,
            "SLURM_SUBMIT_DIR": "/there",
            "LOGS": "/my logs",
            "NODES": "1",
            "NODE": "0",
            "HEAD": "x",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.stdout, said.stderr) == ("none none none /my logs/a job-7\n", "")


@pytest.mark.parametrize("script", sorted((REPOSITORY / "slurm").glob("*.sbatch")), ids=lambda script: script.stem)
def test_a_copy_that_lies_elsewhere_says_where_it_belongs(slurm: Slurm, script: Path) -> None:
    (slurm.answers / "scontrol").write_text(f"   Command={slurm.place}/a b/mine.sbatch --config x/y.yaml\n")
    told = {"ASKED": str(slurm.asked), "ANSWERS": str(slurm.answers), "PATH": f"{slurm.place}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, **JOB, **told}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: no job.sh in '{slurm.place}/a b': alone this script can do nothing. Keep it in the" in done.stderr
