"""The command doctor on one process: memory estimate, and runs that cannot work are refused before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from support.fork_server import run_python
from transformers import GPT2Config

DOCTOR = ("-m", "agnews_dist", "doctor")
EMBEDDED = ("--model.name", "embedded", "--data.source", "synthetic")


def write_model(shared: Path, directory: Path, **sizes: int) -> str:
    """Write a tokenizer and a config, the only files that the doctor reads; return the directory."""
    shutil.copytree(shared / "tokenizers" / "gpt2", directory)
    GPT2Config(**sizes).save_pretrained(directory)
    return str(directory)


def test_doctor_estimates_a_run_that_fits(shared: Path, tmp_path: Path) -> None:
    arguments = ("--model.name", write_model(shared, tmp_path / "small"), "--data.source", "synthetic")
    result = json.loads(run_python(*DOCTOR, *arguments, "--ranks", "2", "--json").stdout)
    assert result["fits"] is True
    assert result["problem"] is None
    embedding, others = 4 * 50258 * 768, 4 * (1024 * 768 + 11 * 7_087_872)
    # The two ranks of a node map the same file. The embedding, which [PAD] makes longer, is a copy of each.
    assert result["estimate"]["device"]["frozen weights"] == embedding + others // 2
    assert result["estimate"]["device"]["optimizer"] == 8 * (7_087_872 + 2 * 768 + 2 * 769)
    assert result["device_bytes"] == sum(result["estimate"]["device"].values())
    assert result["facts"]["torch"]
    shown = run_python(*DOCTOR, *arguments).stdout
    assert "frozen weights" in shown
    assert "are free: it fits" in shown
    assert "\n0 failure(s), " in shown


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(shared: Path, tmp_path: Path, command: str) -> None:
    model = write_model(shared, tmp_path / "huge", n_embd=12800, n_layer=96, n_head=100)
    runs = tmp_path / "runs"
    options = ("--model.name", model, "--data.source", "synthetic", "--run.dir", str(runs))
    done = run_python("-m", "agnews_dist", command, *options, check=False)
    assert done.returncode == 1
    assert "error: the run needs about 8" in done.stderr
    assert "frozen weights 7" in done.stderr
    assert not list(runs.rglob("model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "0"), "--ranks '0': it takes a whole number (1 or more) or null. Correct it"),
        (("--ranks", "2", "--ranks_per_node", "3"), "--ranks_per_node 3 with --ranks 2: a node cannot have more"),
    ],
)
def test_doctor_refuses_wrong_options(arguments: tuple[str, ...], message: str) -> None:
    done = run_python(*DOCTOR, *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_doctor_reports_a_missing_device_once() -> None:
    done = run_python(*DOCTOR, *EMBEDDED, "--engine.device", "cuda", "--json", check=False)
    assert done.returncode == 1
    assert [row["check"] for row in json.loads(done.stdout)["findings"] if row["verdict"] == "fail"] == ["device"]
    assert "error: engine.device cuda" in done.stderr


@pytest.mark.parametrize("option", ["--model.name", "--data.source"])
def test_doctor_reports_a_missing_path(tmp_path: Path, option: str) -> None:
    done = run_python(*DOCTOR, *EMBEDDED, option, str(tmp_path / "nowhere"), "--json", check=False)
    assert done.returncode == 1
    (failure,) = (row for row in json.loads(done.stdout)["findings"] if row["verdict"] == "fail")
    assert failure["check"] == option[2:].split(".")[0]
    assert "does not exist" in failure["found"]
    assert f"error: {failure['found']}" in done.stderr
