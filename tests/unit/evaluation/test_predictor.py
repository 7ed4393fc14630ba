"""Command `predict` in-process: sources of texts, output, refused input."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import TIMEOUT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agnews_dist.commands import predict
from agnews_dist.data.synthetic import CLASS_NAMES, generate
from agnews_dist.evaluation import predictor
from agnews_dist.model.export import export_model
from agnews_dist.model.gpt2 import load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer

MAX_LENGTH = 30
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with large head weights, so that predictions differ and a wrong order is seen."""
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
    with torch.no_grad():
        classifier.suffix.out_head.weight.mul_(20)
    directory = tmp_path_factory.mktemp("runs") / "first"
    directory.mkdir()
    export_model(directory / "model", classifier, tokenizer, class_names=CLASS_NAMES, max_length=MAX_LENGTH, card="# card")
    return directory


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of very different lengths, not in order of length."""
    return [text for text, _ in generate(25, 3, "test")] + ["Go", "\N{BASEBALL} caf\u00e9 \0 <|endoftext|>", "a\u2028b"]


def expected_probabilities(run_directory: Path, texts: list[str]) -> torch.Tensor:
    """Compute probabilities with Hugging Face's classes, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(run_directory / "model")
    model = AutoModelForSequenceClassification.from_pretrained(run_directory / "model").eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).softmax(dim=-1)


def run_predict(model: Path | str, *arguments: str) -> int:
    return predict.main([*arguments, "--model.name", str(model), "--engine.device", "cpu"])


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def parse_answers(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def check_answers(answers: list[dict[str, object]], run_directory: Path, texts: list[str]) -> None:
    expected = expected_probabilities(run_directory, texts)
    assert len(answers) == len(texts)
    assert len({answer["prediction"] for answer in answers}) > 1
    for i, (answer, text, probabilities) in enumerate(zip(answers, texts, expected, strict=True)):
        assert list(answer) == ["id", "text", "prediction", "probabilities"]
        assert (answer["id"], answer["text"]) == (i, text)
        assert answer["prediction"] == CLASS_NAMES[int(probabilities.argmax())]
        assert answer["probabilities"] == pytest.approx(dict(zip(CLASS_NAMES, probabilities.tolist(), strict=True)), abs=2e-6)


@pytest.mark.slow
def test_texts_from_arguments(run_directory: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predict(run_directory, *texts) == 0
    captured = capsys.readouterr()
    check_answers(parse_answers(captured.out), run_directory, texts)
    assert "texts were truncated to 30 tokens" in captured.err
    assert "train with a larger --data.max_length" in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("has_last_line_end", [True, False])
def test_texts_from_standard_input(
    run_directory: Path,
    texts: list[str],
    line_end: str,
    has_last_line_end: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that only a line feed ends a line; the line separator U+2028 does not."""
    set_stdin(monkeypatch, (line_end.join(texts) + line_end * has_last_line_end).encode())
    assert run_predict(run_directory, "--format", "jsonl") == 0
    check_answers(parse_answers(capsys.readouterr().out), run_directory, texts)


def test_answers_keep_their_order_across_chunks(
    run_directory: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predictor, "TEXTS_PER_CHUNK", 6)
    assert run_predict(run_directory, *texts) == 0
    check_answers(parse_answers(capsys.readouterr().out), run_directory, texts)


def test_texts_from_a_file_with_byte_order_mark(
    run_directory: Path, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(texts).encode())
    assert run_predict(run_directory, "--file", str(path)) == 0
    check_answers(parse_answers(capsys.readouterr().out), run_directory, texts)


def test_a_jsonl_file_keeps_ids(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Oil\\nprices", "id": "row-7"}\n{"text": "Cup final", "label": 1}\n')
    assert run_predict(run_directory, "--file", str(path)) == 0
    answers = parse_answers(capsys.readouterr().out)
    assert [(answer["id"], answer["text"]) for answer in answers] == [("row-7", "Oil\nprices"), (1, "Cup final")]


def test_a_table_has_text_class_and_probability(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that brackets are printed as they are and control characters are escaped."""
    texts = ["[red]Oil[/red] prices", "Cup \x1b[31mfinal"]
    assert run_predict(run_directory, *texts, "--format", "table") == 0
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if "%" in line]
    assert len(lines) == 2
    expected = expected_probabilities(run_directory, texts)
    for line, printed, probabilities in zip(lines, ("[red]Oil[/red] prices", r"Cup \x1b[31mfinal"), expected, strict=True):
        assert printed in line
        assert CLASS_NAMES[int(probabilities.argmax())] in line
        assert f"{probabilities.max():.1%}" in line
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input is empty: .*Give texts as arguments"),
        (b"one\n\nthree\n", "standard input, line 2 is empty: .*Remove it"),
        (b"one\n \t \n", "standard input, line 2 is empty: .*Remove it"),
        (b"one\ntwo \xff\n", r"standard input, line 2 is not UTF-8 \(byte 0xff at 4\): .*Convert the file"),
    ],
)
def test_bad_standard_input_is_refused(
    run_directory: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_stdin(monkeypatch, content)
    check_refused(run_predict(run_directory), capsys, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nplain words\n', r'line 2: not a JSON object with a "text" \(\'plain words\'\)\. Write {"text"'),
        ('{"title": "a"}\n', r'line 1: not a JSON object with a "text"'),
        ('{"text": 3}\n', r'line 1: not a JSON object with a "text"'),
        ('["text"]\n', r'line 1: not a JSON object with a "text"'),
        ('{"text": "a"}\n{"text": " "}\n', r"line 2 is empty: .*Remove it"),
        ('{"text": "\\ud800"}\n', r"line 1 contains '\\ud800', half of a character: .*Encode the text as UTF-8"),
        ("", r"texts.jsonl is empty: .*Give texts"),
    ],
)
def test_bad_jsonl_is_refused(
    run_directory: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    check_refused(run_predict(run_directory, "--file", str(path)), capsys, message)


def check_refused(exit_code: int, capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert exit_code in (1, 2)
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(captured.err)


@pytest.mark.slow
def test_refused_settings(
    run_directory: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(run_predict(run_directory, "a", "  "), capsys, "text argument 2 is empty: .*Remove it")
    check_refused(
        run_predict(run_directory, "a", "--file", "b.txt"),
        capsys,
        r"--file 'b.txt' and 1 text argument\(s\): .*Remove the other",
    )
    check_refused(
        run_predict(run_directory, "--file", "gone.txt"),
        capsys,
        r"--file 'gone.txt': the file cannot be read \(No such.*Check the path",
    )
    check_refused(predict.main(["a"]), capsys, "model.name is not set: .*Set --model.name to a run's directory")
    check_refused(
        run_predict(shared / "checkpoints" / "gpt2-mini", "a"), capsys, "no classification head: .*Set --model.name to a run's"
    )
    check_refused(run_predict("./gone", "a"), capsys, "'./gone' does not exist: .*set --model.name")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run_predict(run_directory, "a") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "predict was started as 2 ranks: each would print every answer. Start it without torchrun" in captured.err


@pytest.mark.slow
def test_a_pipe_may_close_early(run_directory: Path) -> None:
    """Check `| head -1` in an ASCII locale: valid JSON and no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agnews_dist", "predict", "--model.name", str(run_directory), "--engine.device", "cpu"],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write("caf\u00e9 opens in town\n".encode() * 2000)
    process.stdin.close()
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=TIMEOUT) == 0, errors
    assert json.loads(first)["text"] == "caf\u00e9 opens in town"
    assert first.isascii()
    assert errors == ""
