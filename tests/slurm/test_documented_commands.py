"""The commands of docs/clusters.md on a real Slurm, and slurm/submit.sh."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import REPOSITORY, environment
from support.slurm_cluster import Lab
from support.small_run import SIZES

pytestmark = pytest.mark.timeout(3600)
PAGE = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## Slurm\n")[1].split("\n## ")[0]


def read_commands() -> list[str]:
    """Return the lines of the section's first block, without comments."""
    block = re.split(r"```(?:bash)?\n", SECTION)[1]
    return [re.split(r"\s{2,}#", line)[0] for line in block.splitlines() if line]


def make_clone(repository: Path, target: Path) -> Path:
    """Copy the tracked files and link the environment, as after `git clone` and launch/env.sh."""
    for name in ("agnews_dist", "configs", "launch", "slurm"):
        shutil.copytree(repository / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
    (target / ".venv").symlink_to(repository / ".venv", target_is_directory=True)
    return target


def test_documented_commands_run(lab: Lab, environ: dict[str, str], config: Path, tmp_path: Path) -> None:
    lines = read_commands()
    assert lines[:2] == ["cp slurm/site.env.example slurm/site.env", "source slurm/site.env"]
    # The page shows every script; submit.sh uses prepare.
    scripts = {path.name for path in [*(REPOSITORY / "slurm").glob("*.sbatch"), REPOSITORY / "slurm" / "submit.sh"]}
    assert {name for name in scripts if any(f"slurm/{name}" in line for line in lines)} == scripts - {"prepare.sbatch"}
    clone = make_clone(REPOSITORY, tmp_path / "clone")
    shutil.copy(config, clone / "my.yaml")
    # "edit its first three lines": this cluster has another partition, no accounts, and no real GPUs.
    edit = "sed -i -e s/=gpu/=main/ -e /SBATCH_ACCOUNT/d -e /SBATCH_GPUS_PER_NODE=/d slurm/site.env"
    assert re.search(r"edit its first three lines", SECTION)
    # A site's own commands, such as modules and conda, read unset variables.
    own = "echo 'setup() { : \"$NOT_SET\"; false; }' >>slurm/site.env"
    until = "until [[ -z $(squeue --noheader --states PD,R,CG) ]]; do sleep 0.5; done"
    # The cluster's GPUs are fake: torch cannot see them, which the doctor would report.
    (debug,) = (number for number, line in enumerate(lines) if "--gpus-per-node=1 slurm/debug.sbatch" in line)
    lines[debug] += " --engine.device cpu"
    # test_cluster.py runs these two to the end; submit.sh starts another training here.
    shown = [number for number, line in enumerate(lines) if "slurm/train.sbatch" in line or "slurm/sweep.sbatch" in line]
    for number in shown:
        lines[number] = f"DRY_RUN=1 {lines[number]}"
    script = ["set -euo pipefail", lines[0], edit, own, *lines[1:-1], until, lines[-1], until]
    pythonpath = f"{clone}{os.pathsep}{environ['PYTHONPATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=clone,
        env={**lab.environ, **environ, "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    submitted = re.findall(r"Submitted batch job (\d+)", done.stdout)
    stages = dict(re.findall(r"^(prepare|train|evaluate) (\d+)$", done.stdout, re.MULTILINE))
    assert list(stages) == ["prepare", "train", "evaluate"]
    for job in [*submitted, *stages.values()]:
        assert lab.state(job) == "COMPLETED", lab.describe_job(job)
    debug, train, sweep, evaluate = submitted
    results = {path.parent.name: json.loads(path.read_text()) for path in clone.glob("runs/*/result.json")}
    ranks = {name: result["num_ranks"] for name, result in results.items()}
    assert ranks == {f"agnews-debug-{debug}": 1, "first": 2}
    commands = "".join((clone / f"agnews-{name}.log").read_text() for name in (f"train-{train}", f"sweep-{sweep}"))
    one, other, swept = re.findall(r"torch\.distributed\.run .* -m agnews_dist (.*?) *$", commands, re.MULTILINE)
    assert one == other == f"train --run.name agnews-train-{train} --config my.yaml --optim.lr 1e-3"
    assert swept == f"sweep --run.name agnews-sweep-{sweep} --config my.yaml --optim.lr 3e-4\\,1e-3 --run.seed 0..4"
    # The doctor ran before the small training.
    log = (clone / f"agnews-debug-{debug}.log").read_text()
    assert log.index("failure(s)") < log.index("run started on")
    # The evaluation, on the same rows and another number of ranks, counts the same.
    scored = json.loads((clone / "scores" / "first" / "result.json").read_text())["splits"]["test"]
    trained = results["first"]["splits"]["test"]
    assert scored["num_examples"] == SIZES["test"]
    assert [name for name, value in scored.items() if value != trained[name] and name != "loss"] == []
    assert "validation: accuracy" in (clone / f"agnews-evaluate-{evaluate}.log").read_text()


def test_submit_prints_its_commands_in_a_dry_run(tmp_path: Path) -> None:
    clone = make_clone(REPOSITORY, tmp_path / "clone")
    done = subprocess.run(
        [clone / "slurm" / "submit.sh", "--nodes=4", "--", "--config", "my file.yaml"],
        env={**environment(), "DRY_RUN": "1", "RUN": "x", "SBATCH_GPUS_PER_NODE": "8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["prepare prepare", "train train", "evaluate evaluate"]
    prepare, train, evaluate = done.stderr.splitlines()
    assert prepare.endswith(f"{clone}/slurm/prepare.sbatch --config my\\ file.yaml ")
    assert "--dependency=afterok:prepare --kill-on-invalid-dep=yes --nodes=4 " in train
    assert train.endswith("--config my\\ file.yaml --run.dir runs --run.name x ")
    assert "--dependency=afterok:train" in evaluate
    assert "--config runs/x/config.yaml --model.name runs/x --split test --output scores/x" in evaluate


def test_submit_prepares_on_this_machine_if_nodes_have_no_network(tmp_path: Path) -> None:
    clone = make_clone(REPOSITORY, tmp_path / "clone")
    (clone / "slurm" / "site.env").write_text("OFFLINE=1\nsetup() { export XDG_CACHE_HOME=$PWD/cache; false; }\n")
    (clone / "bin").mkdir()
    (clone / "bin" / "sbatch").write_text('#!/bin/sh\necho "$*" >>calls\necho "9;cluster"\n')
    (clone / "bin" / "sbatch").chmod(0o755)
    command = [clone / "slurm" / "submit.sh", "--nodes=2", "--", "--config", "configs/quickstart.yaml"]
    path = {"PATH": f"{clone}/bin:{os.environ['PATH']}", "RUN": "x"}
    done = subprocess.run(command, env={**environment(), **path}, capture_output=True, text=True, check=False, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["prepare here", "train 9", "evaluate 9"]
    assert len(list(clone.glob("cache/*/*/meta.json"))) == 1, done.stderr
    train, evaluate = (clone / "calls").read_text().splitlines()
    assert train.startswith(f"--parsable --nodes=2 {clone}/slurm/train.sbatch --config ")
    assert evaluate.startswith("--parsable --dependency=afterok:9 --kill-on-invalid-dep=yes ")
    # If the preparation fails, nothing is submitted.
    command[-1] = "nowhere.yaml"
    done = subprocess.run(command, env={**environment(), **path}, capture_output=True, text=True, check=False, cwd=clone)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.yaml" in done.stderr
    assert len((clone / "calls").read_text().splitlines()) == 2
