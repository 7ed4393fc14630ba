"""doctor through the real door: what is here, what a run will take, whether it fits; and a run that cannot is refused early."""

import json
import shutil
from pathlib import Path

from support.fork_server import run_python
from transformers import GPT2Config


def model(shared: Path, directory: Path, **sizes: int) -> Path:
    """A tokenizer and a config: all that the doctor reads."""
    shutil.copytree(shared / "tokenizers" / "gpt2", directory)
    GPT2Config(**sizes).save_pretrained(directory)
    return directory


def test_a_run_that_fits(shared: Path, tmp_path: Path) -> None:
    name = str(model(shared, tmp_path / "small"))
    done = run_python(
        "-m",
        "agnews_dist",
        "doctor",
        "--model.name",
        name,
        "--data.source",
        "synthetic",
        "--ranks",
        "2",
        "--json",
    )
    found = json.loads(done.stdout)
    assert found["fits"] is True
    assert found["problem"] is None
    embedding, others = 4 * 50258 * 768, 4 * (1024 * 768 + 11 * 7_087_872)
    # The two ranks of a node map the same file, but for the embedding, which [PAD] makes longer.
    assert found["estimate"]["device"]["frozen weights"] == embedding + others // 2
    assert found["estimate"]["device"]["optimizer"] == 8 * (7_087_872 + 2 * 768 + 4 * 769)
    assert found["device_bytes"] == sum(found["estimate"]["device"].values())
    assert found["facts"]["torch"]
    shown = run_python("-m", "agnews_dist", "doctor", "--model.name", name, "--data.source", "synthetic").stdout
    assert "frozen weights" in shown
    assert "It fits." in shown


def test_a_run_that_does_not_fit_is_refused_by_doctor_and_train_before_anything_is_loaded(
    shared: Path, tmp_path: Path
) -> None:
    name = str(model(shared, tmp_path / "huge", n_embd=12800, n_layer=96, n_head=100))
    for story in ("doctor", "train"):
        done = run_python(
            "-m", f"agnews_dist.{story}", "--model.name", name, "--data.source", "synthetic", check=False, timeout=60
        )
        assert done.returncode == 1, story
        assert "error: the run needs about 8" in done.stderr
        assert "frozen weights 7" in done.stderr
        assert "it would break off in the middle. Take a smaller model or more memory" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_mistakes(tmp_path: Path) -> None:
    for arguments, said in (
        (["--ranks", "0"], "--ranks 0: a training has at least one rank. Set it to 1 or more."),
        (["--ranks", "2", "--ranks_per_node", "3"], "--ranks_per_node 3 with --ranks 2: a node cannot have more"),
    ):
        done = run_python("-m", "agnews_dist", "doctor", *arguments, check=False)
        assert done.returncode == 2
        assert said in done.stderr
    cuda = ("--model.name", "embedded", "--data.source", "synthetic", "--engine.device", "cuda", "--json")
    done = run_python("-m", "agnews_dist", "doctor", *cuda, check=False)
    assert done.returncode == 1
    assert [row["check"] for row in json.loads(done.stdout)["findings"] if row["verdict"] == "fail"] == ["device"]
    assert "error: engine.device cuda, but torch" in done.stderr
    for option, told in (
        ("--model.name", "there is nothing to load"),
        ("--data.source", "there are no rows to work on"),
    ):
        both = {"--model.name": "embedded", "--data.source": "synthetic", option: str(tmp_path / "nowhere")}
        words = [word for pair in both.items() for word in pair]
        done = run_python("-m", "agnews_dist", "doctor", *words, "--json", check=False)
        assert done.returncode == 1
        (failure,) = (row for row in json.loads(done.stdout)["findings"] if row["verdict"] == "fail")
        assert failure["check"] == option[2:].split(".")[0]
        assert f"does not exist: {told}" in failure["found"]
