"""`agnews-dist export`: an ONNX file that answers as the model does, and its refusals."""

import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agnews_dist.__main__ import main
from agnews_dist.model import onnx_file
from agnews_dist.model.export import export_model
from agnews_dist.model.gpt2 import load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer

# torch's exporter and ONNX warn of their own.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=3, seed=0)
    with torch.no_grad():
        classifier.suffix.out_head.weight.mul_(50)
    run = tmp_path_factory.mktemp("runs") / "news"
    export_model(run / "model", classifier, tokenizer, class_names=["a", "b", "c"], max_length=32, card="card")
    return run


def test_onnx_file_answers_as_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--format", "onnx"]) == 0
    file = run / "model.onnx"
    assert f"{file} written: checked, logits differ by at most" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == ["model", "model.onnx"]
    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(str(file))
    model, tokenizer = (each.from_pretrained(run / "model") for each in (AutoModelForSequenceClassification, AutoTokenizer))
    for texts in (["Oil"], ["Go", "A longer text about the moon"], ["word " * 100, "b", "c d"]):
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            expected = model(**batch).logits
        [found] = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


def test_outputs_that_are_not_an_onnx_file_are_refused(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (
        ("model.bin", r"the name of an ONNX file ends in \.onnx\. Rename it"),
        ("pipe.onnx", r"it exists and is not a file\. Choose another name"),
        ("folder.onnx", r"it exists and is not a file\. Choose another name"),
        ("file/model.onnx", r"it cannot be written \((File exists|Not a directory)\)\. Set it to a writable place"),
    ):
        assert main(["export", str(run), "--output", str(tmp_path / name)]) == 1
        assert re.search(rf"--output '{tmp_path / name}': {reason}", capfd.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx", "pipe.onnx"]


def test_refusals(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 2
    assert "export of 0 runs: it takes one. Write agnews-dist export RUN." in capfd.readouterr().err
    assert main(["export", str(tmp_path / "none")]) == 1
    assert "none' does not exist: " in capfd.readouterr().err
    assert main(["export", str(tmp_path)]) == 1
    assert "it has no exported model (config.json is missing). Finish its training first." in capfd.readouterr().err
    monkeypatch.setattr(onnx_file, "PACKAGES", ("torch", "onnx_of_tomorrow"))
    assert main(["export", str(run)]) == 1
    assert (
        "--format onnx: onnx_of_tomorrow not installed. Install with: pip install onnx_of_tomorrow." in capfd.readouterr().err
    )


def test_a_file_with_other_answers_does_not_appear(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "news.onnx").write_text("the one before")
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)  # no difference is small enough
    assert main(["export", str(run), "--output", str(tmp_path / "news.onnx")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["news.onnx"]
    assert (tmp_path / "news.onnx").read_text() == "the one before"
