"""Command `predict` in-process: sources of texts, output, refused input; the answers are those of transformers."""

import gzip
import io
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.processes import TIMEOUT
from support.saved_model import save_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from agnews_dist.__main__ import main
from agnews_dist.config.schema import Config, EngineConfig, ModelConfig
from agnews_dist.data import input_texts
from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.formats.line_file import ArgumentTable
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.data.synthetic import CLASS_NAMES, generate
from agnews_dist.distributed.world import World
from agnews_dist.errors import SharedError
from agnews_dist.evaluation import predictor
from agnews_dist.events import Progress
from agnews_dist.report import prediction_files
from agnews_dist.run import engine_setup, prediction

MAX_LENGTH = 30
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose answers differ."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    directory.mkdir()
    save_classifier(directory / "model", max_length=MAX_LENGTH)
    return directory


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of very different lengths, not in order of length."""
    return [text for text, _ in generate(25, 3, "test")] + ["Go", "\N{BASEBALL} caf\u00e9 \0 <|endoftext|>", "a\u2028b"]


@pytest.fixture(scope="module")
def expected(run_directory: Path, texts: list[str]) -> list[dict[str, float]]:
    """Probabilities by the pipeline of transformers."""
    classify = pipeline("text-classification", model=str(run_directory / "model"), top_k=None)
    return [{entry["label"]: entry["score"] for entry in scores} for scores in classify(texts, truncation=True)]


@pytest.fixture(scope="module")
def placed(run_directory: Path) -> predictor.Predictor:
    """The run's model, with all probabilities."""
    config = Config(model=ModelConfig(name=str(run_directory)), engine=EngineConfig(device="cpu"))
    model = prediction.load_model(config, None)
    engine = engine_setup.start_engine(config.engine, World(), is_training=False)
    return prediction.build_predictor(model, engine, None, fast_path=True)


def expected_probabilities(run_directory: Path, texts: list[str]) -> torch.Tensor:
    """Compute probabilities with Hugging Face's classes, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(run_directory / "model")
    model = AutoModelForSequenceClassification.from_pretrained(run_directory / "model").eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).softmax(dim=-1)


def run_predict(model: Path | str, *arguments: str) -> int:
    return main(["predict", *arguments, "--model.name", str(model), "--engine.device", "cpu"])


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def parse_answers(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def check_answers(answers: list[dict[str, object]], expected: list[dict[str, float]], texts: list[str]) -> None:
    assert len(answers) == len(texts)
    assert len({answer["prediction"] for answer in answers}) > 1
    for i, (answer, text, probabilities) in enumerate(zip(answers, texts, expected, strict=True)):
        assert list(answer) == ["id", "text", "prediction", "probabilities"]
        assert (answer["id"], answer["text"]) == (i, text)
        assert answer["prediction"] == max(probabilities, key=probabilities.__getitem__)
        assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-6)
        assert list(answer["probabilities"]) == list(CLASS_NAMES)


@pytest.mark.slow
def test_texts_from_arguments(
    run_directory: Path, expected: list[dict[str, float]], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_predict(run_directory, *texts) == 0
    captured = capsys.readouterr()
    check_answers(parse_answers(captured.out), expected, texts)
    assert "texts were truncated to 30 tokens" in captured.err
    assert "train with a larger --data.max_length" in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("has_last_line_end", [True, False])
def test_texts_from_standard_input(
    run_directory: Path,
    expected: list[dict[str, float]],
    texts: list[str],
    line_end: str,
    has_last_line_end: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that only a line feed ends a line; the line separator U+2028 does not."""
    set_stdin(monkeypatch, (line_end.join(texts) + line_end * has_last_line_end).encode())
    assert run_predict(run_directory, "--format", "jsonl") == 0
    check_answers(parse_answers(capsys.readouterr().out), expected, texts)


def test_answers_keep_their_order_across_chunks(
    run_directory: Path,
    expected: list[dict[str, float]],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(predictor, "TEXTS_PER_CHUNK", 6)
    assert run_predict(run_directory, *texts) == 0
    check_answers(parse_answers(capsys.readouterr().out), expected, texts)


def test_texts_from_a_file_with_byte_order_mark(
    run_directory: Path, tmp_path: Path, expected: list[dict[str, float]], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(texts).encode())
    assert run_predict(run_directory, "--file", str(path)) == 0
    check_answers(parse_answers(capsys.readouterr().out), expected, texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("news.csv", 'text,label\n"Oil rose, said the bank",2\nThe coach left,1\n'),
        ("news.ndjson", '{"text": "Oil rose, said the bank"}\n{"text": "The coach left"}\n'),
        ("NEWS.JSONL", '{"text": "Oil rose, said the bank"}\n{"text": "The coach left"}\n'),
        ("news.json", '[{"text": "Oil rose, said the bank"},\n {"text": "The coach left"}]\n'),
    ],
)
def test_a_table_is_never_classified_line_by_line(
    run_directory: Path, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert run_predict(run_directory, "--file", str(tmp_path / name), "--format", "jsonl") == 0
    assert [row["text"] for row in parse_answers(capsys.readouterr().out)] == ["Oil rose, said the bank", "The coach left"]


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


def test_bad_input_is_refused_before_anything_is_printed(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_stdin(monkeypatch, b"")
    check_refused(run_predict(run_directory), capsys, "standard input is empty: .*Give texts as arguments")
    set_stdin(monkeypatch, b"one\n \t \n")
    check_refused(run_predict(run_directory), capsys, r"text is empty .*\(standard input line 2\): .*Remove")
    (tmp_path / "a.csv").write_text("text,label\n" + "a,1\n" * 100 + ",2\n")
    arguments = ("--file", str(tmp_path / "a.csv"), "--output", str(tmp_path / "out.csv"))
    check_refused(run_predict(run_directory, *arguments), capsys, r"text is empty .*\(a.csv row 101\)")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def check_refused(exit_code: int, capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert exit_code in (1, 2)
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(captured.err)


@pytest.mark.slow
def test_refused_settings(run_directory: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(run_predict(run_directory, "a", "  "), capsys, r"text is empty .*\(text argument 2\): .*Remove")
    check_refused(
        run_predict(run_directory, "a", "--file", "b.txt"),
        capsys,
        r"--file 'b.txt' and 1 text argument\(s\): .*Remove the other",
    )
    check_refused(
        run_predict(run_directory, "--file", "gone.txt"),
        capsys,
        r"--file 'gone.txt': the file cannot be read \(no such file\).*Check the path",
    )
    check_refused(main(["predict", "a"]), capsys, "model.name is not set: .*Set --model.name to a run's directory")
    check_refused(
        run_predict(shared / "checkpoints" / "gpt2-mini", "a"), capsys, "no classification head: .*Set --model.name to a run's"
    )
    check_refused(run_predict("./gone", "a"), capsys, "'./gone' does not exist: .*set --model.name")
    check_refused(
        run_predict(run_directory, "a", "--top_k", "5"), capsys, "--top_k 5: the model has 4 classes. Set it to .* all"
    )
    check_refused(run_predict(run_directory, "a", "--top_k", "0"), capsys, "--top_k '0': .*1 or more")
    output = ("--output", str(tmp_path / "out.csv"))
    check_refused(
        run_predict(run_directory, "a", *output, "--format", "jsonl"), capsys, "--format jsonl: with --output nothing"
    )
    check_refused(run_predict(run_directory, "-oops"), capsys, "unknown option '-oops'.*write it after -- if it is a text")
    assert list(tmp_path.iterdir()) == []
    # Before the model is loaded and before anything is read.
    (tmp_path / "out.csv").touch()
    check_refused(run_predict("./gone", "--file", "gone.csv", *output), capsys, "out.csv': it exists. .*--run.overwrite")


def test_top_k_and_the_default_of_many_classes() -> None:
    options = {"top_k": None, "output": None}
    assert prediction.choose_num_best(options, 256, is_table=False) is None
    assert prediction.choose_num_best(options, 257, is_table=False) == 5
    assert prediction.choose_num_best(options, 257, is_table=True) == 1
    assert prediction.choose_num_best({**options, "output": "a.csv"}, 4, is_table=False) == 1
    assert prediction.choose_num_best({**options, "top_k": "all"}, 10_000, is_table=True) is None
    assert prediction.choose_num_best({**options, "top_k": 7}, 10_000, is_table=True) == 7


@pytest.mark.parametrize("num_best", [1, 2, 8, 9, 30])
def test_the_most_probable_classes_are_those_of_a_sort(num_best: int) -> None:
    """Check ties too: of equal classes the first comes first."""
    logits_NC = np.random.default_rng(0).integers(0, 12, (200, 30)).astype(np.float32)
    answers = predictor.reduce_logits(np.arange(200), logits_NC, num_best)
    probabilities_NC = torch.tensor(logits_NC).double().softmax(dim=-1).float().numpy()
    order_NC = np.argsort(-logits_NC, axis=1, kind="stable")[:, :num_best]
    assert (answers.classes_NK == order_NC).all()
    assert (answers.predictions_N == order_NC[:, 0]).all()
    assert np.allclose(answers.probabilities_NK, np.take_along_axis(probabilities_NC, order_NC, 1), rtol=0, atol=1e-7)
    assert (answers.best_N == answers.probabilities_NK[:, 0]).all()
    full = predictor.reduce_logits(np.arange(200), logits_NC, None)
    assert full.classes_NK is None
    assert (full.predictions_N == answers.predictions_N).all()
    assert np.allclose(full.probabilities_NK, probabilities_NC, rtol=0, atol=1e-7)


def test_a_prediction_from_nan_is_refused(run_directory: Path, placed: predictor.Predictor) -> None:
    texts = input_texts.InputTexts([ArgumentTable(["a", "b"])], ColumnSettings(), keeps_columns=False)
    head = placed.classifier.suffix.out_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head[1].fill_(float("nan"))
    try:
        with pytest.raises(SharedError, match=r"text argument 1 has a probability of NaN: .*Set --engine.precision fp32"):
            predictor.predict_chunks(texts.chunks(9), lambda chunk, answers: pytest.fail("written"), placed)
    finally:
        head.detach().copy_(before)


def test_chunks_are_read_and_written_one_by_one(placed: predictor.Predictor) -> None:
    """Check that memory does not grow with the input: a chunk is gone before the next but one is read."""
    alive = most = 0
    written = list[object]()

    def remove() -> None:
        nonlocal alive
        alive -= 1

    def endless() -> Iterator[input_texts.InputChunk]:
        nonlocal alive, most
        while True:
            (chunk,) = input_texts.InputTexts([ArgumentTable(["a", "b"])], ColumnSettings(), keeps_columns=False).chunks(9)
            weakref.finalize(chunk, remove)
            alive += 1
            most = max(most, alive)
            yield chunk

    def write(chunk: input_texts.InputChunk, answers: predictor.Answers) -> bool:
        written.append(chunk.ids)
        return len(written) < 12

    assert predictor.predict_chunks(endless(), write, placed) == (24, 0)
    assert len(written) == 12
    assert most <= 2


def test_progress_shows_the_rate_of_long_work(placed: predictor.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = input_texts.InputTexts([ArgumentTable(["a"] * 6)], ColumnSettings(), keeps_columns=False)
    events: list[object] = []
    predictor.predict_chunks(texts.chunks(2), lambda *_: True, placed, num_texts=6, emit=events.append)
    expected = [Progress(task="classify", done=done, total=6, unit="texts") for done in (0, 2, 4, 6)]
    assert events == expected[:-1], "short work is quiet"
    monkeypatch.setattr(predictor, "QUIET_SECONDS", -1.0)
    events.clear()
    predictor.predict_chunks(texts.chunks(2), lambda *_: True, placed, num_texts=6, emit=events.append)
    assert events == expected


SOURCES = ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.arrow", "a.txt.gz", "utf16.csv")


@pytest.mark.parametrize("source", SOURCES)
def test_files_hold_the_answers_of_transformers(
    expected: list[dict[str, float]], texts: list[str], placed: predictor.Predictor, tmp_path: Path, source: str
) -> None:
    """Check every format of the input with every format of the output, in small chunks."""
    table = pd.DataFrame({"text": texts, "topic": "new\nline"})
    path, outputs = tmp_path / source, [tmp_path / f"out.{suffix}" for suffix in ("csv", "tsv", "jsonl", "json.gz", "parquet")]
    if source.endswith("csv"):
        table.to_csv(path, index=False, encoding="utf-16" if source == "utf16.csv" else None)
    elif source == "a.txt.gz":
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    else:
        {
            "a.tsv": lambda: table.to_csv(path, sep="\t", index=False),
            "a.jsonl": lambda: table.to_json(path, orient="records", lines=True),
            "a.json": lambda: table.to_json(path, orient="records"),
            "a.parquet": lambda: table.to_parquet(path),
            "a.arrow": lambda: table.to_feather(path),
        }[source]()
    settings = {"input_format": None, "columns": ColumnSettings(), "splits": SplitSettings(), "keeps_columns": True}
    read = input_texts.open_texts((), str(path), io.BytesIO(), **settings)
    read.check()
    with ExitStack() as stack:
        writers = [stack.enter_context(prediction_files.open_answers(path, read, CLASS_NAMES, "all")) for path in outputs]
        predictor.predict_chunks(read.chunks(10), lambda *both: all(write(*both) for write in writers), placed)
    for output in outputs:
        found = read_answers(output)
        assert found["text"].tolist() == texts
        assert list(found.columns[: len(read.columns)]) == list(read.columns)
        for i, probabilities in enumerate(expected):
            row = found.iloc[i]
            assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)
            assert row["probability"] == pytest.approx(max(probabilities.values()), abs=1e-6)
            is_json = "json" in output.name
            answered = row["probabilities"] if is_json else {name: row[f"probability_{name}"] for name in CLASS_NAMES}
            assert answered == pytest.approx(probabilities, abs=1e-6)


def read_answers(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if "json" in path.name:
        return pd.read_json(path, orient="records", lines=path.suffix == ".jsonl", dtype=False, precise_float=True)
    return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.slow
def test_the_command_writes_a_file(
    run_directory: Path, expected: list[dict[str, float]], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.DataFrame(
        {"Title": texts, "Description": ["", *["and more"] * (len(texts) - 1)], "id": range(7, 7 + len(texts))}
    ).to_csv(tmp_path / "a.csv", sep=";", index=False)
    arguments = ("--file", str(tmp_path / "a.csv"), "--output", str(tmp_path / "out.parquet"), "--top_k", "2")
    assert run_predict(run_directory, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    note, warning = captured.err.splitlines()
    assert note == "a.csv: text from 'Title' + 'Description'; fields are separated by semicolons"
    assert warning.startswith("warning: ")
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert list(found.columns) == [
        "Title", "Description", "id", "prediction", "probability", "prediction_2", "probability_2"
    ]  # fmt: skip
    assert found["probability"][0] == pytest.approx(max(expected[0].values()), abs=1e-6)
    (tmp_path / "out.parquet").unlink()
    joined = ("--data.text_column", "Title", "--file", str(tmp_path / "a.csv"), "--top_k", "1")
    assert run_predict(run_directory, *joined) == 0
    answers = parse_answers(capsys.readouterr().out)
    assert [answer["id"] for answer in answers] == [str(7 + i) for i in range(len(texts))]
    for answer, probabilities in zip(answers, expected, strict=True):
        best = max(probabilities, key=probabilities.__getitem__)
        assert answer["probabilities"] == {best: pytest.approx(probabilities[best], abs=1e-6)}


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
