"""Commands with bad input and edge cases: each ends with a clear error without traceback, or succeeds."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import small_run
from support.events import read_events
from support.fork_server import run_python
from support.processes import python

TINY = [
    *("--data.limit_train", "12", "--data.limit_validation", "4", "--data.limit_test", "4"),
    *("--optim.epochs", "1", "--batch.global_batch_size", "6"),
]
CLASS_NAMES = ["World", "Sports", "Business", "Sci/Tech"]


Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run_command(tmp_path_factory) -> Run:
    """Run a command in a forked process without a GPU."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def run(*words: object) -> Done:
        return run_python("-m", "agnews_dist", *map(str, words), check=False, XDG_CACHE_HOME=cache)

    return run


def train(run_command: Run, runs: Path, *words: object) -> Done:
    """Train the embedded model; later words win."""
    return run_command("train", "--model.name", "embedded", "--data.source", "synthetic", *TINY, "--run.dir", runs, *words)


def refused(done: Done, *parts: str) -> None:
    """Check that the command ended with 1 and one line that contains all `parts`."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in done.stdout


def succeeded(done: Done) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_class_weights_of_other_classes_are_refused_before_anything_is_written(tmp_path):
    job = small_run.start(tmp_path, "--optim.class_weights", "1,2,0.5", num_ranks=1)
    (line,) = [line for line in small_run.wait_for(job, tmp_path, 2).splitlines() if "error: " in line]
    assert line.endswith(
        "error: optim.class_weights 1, 2, 0.5: it has 3 weights for 4 classes. Give one per class, in the order "
        "LABEL_0, LABEL_1, LABEL_2, LABEL_3; or balanced."
    )
    assert [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == []


def test_weights_with_a_loss_that_is_never_finite_are_scored_and_not_exported(tmp_path):
    words = ("--optim.lr", "1e37", "--optim.nonfinite", "skip", "--optim.max_steps", "2")
    output = small_run.wait_for(small_run.start(tmp_path, *words, num_ranks=1), tmp_path, 1)
    assert "error: validation loss nan at every evaluation: such weights are not exported. Lower optim.lr" in output
    run = small_run.run_directory(tmp_path)
    assert json.loads((run / "result.json").read_text())["splits"]["test"]["loss"] is None
    assert not (run / "model").exists()
    assert small_run.read_status(tmp_path)["state"] == "failed"


def write_rows(path: Path, rows: list[tuple[str, object]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Texts that have broken tokenizers, csv readers and classifiers that pool by id.
ODD_TEXTS = [
    "Ends like this <|endoftext|>",
    "<|endoftext|>",
    "<|endoftext|><|endoftext|> [PAD] in front",
    "Goal 🏖️👩‍👩‍👧‍👦 in the 90th minute",
    "🏖",
    "a NUL \0 byte and \x07 a bell",
    "\0",
    'line\nbreak,\r\n"quotes" and \ttabs',
    "x",
    "right to left: שלום, and combining: é",
    "shares " * 10_000,
    "byte order mark \ufeff inside, \u2028 too",
]


@pytest.fixture(scope="module")
def odd(run_command, tmp_path_factory) -> tuple[Path, Path, Done]:
    """(source, run, training): all splits consist of odd texts; only norm and head train."""
    directory = tmp_path_factory.mktemp("odd")
    for repeated, split in enumerate(("train", "validation", "test"), start=1):
        write_rows(directory / "data" / f"{split}.jsonl", [(text * repeated, i % 4) for i, text in enumerate(ODD_TEXTS)])
    words = ["--data.source", directory / "data", "--run.name", "odd", "--model.trainable_blocks", "0"]
    words += ["--data.limit_validation", "12", "--data.limit_test", "12", "--data.class_names", ",".join(CLASS_NAMES)]
    return directory / "data", directory / "odd", train(run_command, directory, *words)


def test_training_accepts_odd_texts_and_counts_long_ones(odd):
    _, run, done = odd
    succeeded(done)
    assert len(ODD_TEXTS) == 12
    result = json.loads((run / "result.json").read_text())
    assert {name: split["num_examples"] for name, split in result["splits"].items()} == {"validation": 12, "test": 12}
    (checked,) = (event for event in read_events(run / "events.jsonl") if event["event"] == "DataChecked")
    found = {finding["what"]: finding["why"] for finding in checked["findings"]}
    assert "they were cut off" in found["3 of 36 texts are longer than 256 tokens"]


def test_every_command_and_hugging_face_agree_on_odd_texts(run_command, odd, tmp_path):
    from transformers import pipeline

    source, run, _ = odd
    texts = [text * 3 for text in ODD_TEXTS]
    classify = pipeline("text-classification", model=str(run / "model"), top_k=None)
    expected = [
        {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in scores}
        for scores in classify(texts, truncation=True)
    ]
    assert [sorted(scores) for scores in expected] == [sorted(CLASS_NAMES)] * 12
    trained = lines(run / "predictions-test.jsonl")
    assert [row["label"] for row in trained] == [i % 4 for i in range(12)]

    succeeded(run_command("evaluate", "--model.name", run, "--data.source", source, "--output", tmp_path / "scores"))
    scored = lines(tmp_path / "scores" / "predictions-test.jsonl")
    # A single file is the test split.
    single = run_command("evaluate", "--model.name", run, "--data.source", source / "test.jsonl", "--output", tmp_path / "file")
    succeeded(single)
    path = tmp_path / "file" / "predictions-test.jsonl"
    for rows in (trained, scored, lines(path)):
        assert [dict(zip(CLASS_NAMES, row["probabilities"], strict=True)) for row in rows] == expected

    predicted = run_command("predict", "--model.name", run, "--file", source / "test.jsonl", "--format", "jsonl")
    assert predicted.returncode == 0
    assert "1 of 12 texts were truncated to 256 tokens" in predicted.stderr
    rows = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["probabilities"] for row in rows] == expected


GOOD = [(f"News number {i}.", i % 4) for i in range(8)]


# Every check of rows has its own test in tests/unit/data.
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("rows.jsonl", b"", ["rows.jsonl is empty", "Check how it was written"]),
        ("rows.jsonl", [*GOOD, ("A name.", "Sport")], ["labels are of different kinds", "rows.jsonl row 9: 'Sport'"]),
    ],
)
def test_training_refuses_bad_files_and_leaves_no_run(run_command, tmp_path, name, content, parts):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_rows(path, content)
    refused(train(run_command, tmp_path / "runs", "--data.source", path), *parts)
    assert list((tmp_path / "runs").glob("*")) == []


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda model: (model / "model.safetensors").unlink(), ["has no weights", "Copy the whole model directory"]),
        (lambda model: (model / "config.json").write_text('{"model_type": "bert"}'), ["is a 'bert' model", "Choose a GPT-2"]),
        (
            lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000]),
            ["weights in", "cannot be read", "Copy or download the directory again"],
        ),
    ],
    ids=["no weights", "another architecture", "truncated safetensors"],
)
def test_commands_refuse_damaged_models(run_command, odd, tmp_path, damage, parts):
    _, run, _ = odd
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    damage(model)
    refused(train(run_command, tmp_path / "runs", "--model.name", model), *parts)
    refused(run_command("evaluate", "--model.name", model, "--data.source", "synthetic"), *parts)
    assert list((tmp_path / "runs").glob("*")) == []


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--data.max_length", "513"], 1, ["data.max_length 513: the model has 512 positions", "at most 512"]),
        (["--model.trainable_blocks", "99"], 1, ["trainable_blocks 99", "has 4 blocks", "between 0 and 4, or to all"]),
        (["--model.trainable_blocks", "-1"], 2, ["--model.trainable_blocks '-1': it takes a whole number (0 or more) or all."]),
        (["--engine.device", "cuda"], 1, ["sees no CUDA device", "--engine.device auto", "nvidia-smi"]),
        # Not even root can write there.
        (["--run.dir", "/proc/nowhere"], 1, ["/proc/nowhere/", "cannot be written", "Set --run.dir to a writable"]),
    ],
)
def test_training_refuses_impossible_settings(run_command, tmp_path, words, code, parts):
    done = train(run_command, tmp_path, *words)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part in line for part in parts] == [True] * len(parts), line
    assert list(tmp_path.iterdir()) == []


def trained_parts(run: Path) -> dict[str, bool]:
    """Return for each part of the model whether any parameter of it trains, from RunStarted."""
    (started,) = (event for event in read_events(run / "events.jsonl") if event["event"] == "RunStarted")
    return {part: trainable > 0 for part, (trainable, _) in started["parameters"].items()}


def test_trainable_blocks_0_and_all_train_these_parts(run_command, odd, tmp_path):
    from safetensors.torch import load_file

    _, none, _ = odd
    words = ["--run.name", "all", "--model.trainable_blocks", "all", "--data.max_length", "512"]
    succeeded(train(run_command, tmp_path, *words))
    assert trained_parts(none) == {"embeddings": False, "h.0-3": False, "ln_f": True, "out_head": True}
    assert trained_parts(tmp_path / "all") == {"embeddings": False, "h.0-3": True, "ln_f": True, "out_head": True}
    # The embedded model starts from the same blocks in every run; only trained ones change.
    frozen, trained = (load_file(run / "model" / "model.safetensors") for run in (none, tmp_path / "all"))
    assert len(frozen) > 50
    same = {name for name in frozen if frozen[name].equal(trained[name])}
    assert {name for name in frozen if name.startswith(("transformer.wte", "transformer.wpe"))} <= same
    matrices = {name for name in frozen if ".h." in name and name.endswith("weight") and "ln_" not in name}
    assert len(matrices) == 4 * 4
    assert not matrices & same


def test_overwrite_replaces_a_run_once_the_new_one_begins(run_command, tmp_path):
    words = ["--run.name", "mine"]
    succeeded(train(run_command, tmp_path, *words))
    result = (tmp_path / "mine" / "result.json").read_bytes()
    refused(
        train(run_command, tmp_path, *words, "--run.overwrite", "--data.source", "/nowhere.csv"),
        "'/nowhere.csv' does not exist",
    )
    assert (tmp_path / "mine" / "result.json").read_bytes() == result
    done = train(run_command, tmp_path, *words, "--run.overwrite", "--optim.lr", "1e30")
    refused(done, "error: non-finite loss on rank(s) 0", "Lower optim.lr")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"config.yaml", "events.jsonl", "status.json"}, (
        "no result of the failed run"
    )
    succeeded(train(run_command, tmp_path, *words, "--run.overwrite", "--run.seed", "1"))
    assert (tmp_path / "mine" / "result.json").read_bytes() != result
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate"])
def test_wrong_data_path_is_reported_before_the_hub_is_asked(run_command, command):
    """Check the order: offline, asking the hub first would give another error."""
    done = run_command(command, "--data.source", "/nowhere/rows.csv")
    refused(done, "error: data.source '/nowhere/rows.csv' does not exist", "Correct it")


def test_evaluate_reads_the_original_csv(run_command, odd, tmp_path):
    _, run, _ = odd
    original = '"3","Wall St. Bears","Claw Back, into ""the"" Black"\n"4","Space","rocks"\n"1","A","b"\n'
    (tmp_path / "test.csv").write_text(original)
    output = tmp_path / "scores"
    succeeded(run_command("evaluate", "--model.name", run, "--data.source", tmp_path / "test.csv", "--output", output))
    (path,) = output.glob("predictions-*.jsonl")
    assert [row["label"] for row in lines(path)] == [2, 3, 0]
    (split,) = json.loads((output / "result.json").read_text())["splits"].values()
    confusion = np.array(split["confusion"])
    assert confusion.sum(axis=1).tolist() == [1, 0, 1, 1]
    texts = ['Wall St. Bears Claw Back, into "the" Black', "Space rocks", "A b"]
    predicted = run_command("predict", "--model.name", run, "--format", "jsonl", *texts)
    expected = [json.loads(line)["probabilities"].values() for line in predicted.stdout.splitlines()]
    assert [row["probabilities"] for row in lines(path)] == [pytest.approx(list(row), abs=1e-6) for row in expected]


def test_evaluate_refuses_unsuitable_models_data_and_outputs(run_command, odd, tmp_path):
    source, run, _ = odd
    data, scored = ["--data.source", source], ["evaluate", "--model.name", run]
    refused(
        run_command("evaluate", "--model.name", "embedded", *data), "'embedded' has no classification head", "run's directory"
    )
    headless = tmp_path / "headless"
    shutil.copytree(run / "model", headless)
    config = json.loads((headless / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (headless / "config.json").write_text(json.dumps(config))
    weights = load_file(headless / "model.safetensors")
    save_file(
        {name: weights[name] for name in weights if name != "score.weight"},
        headless / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(run_command("evaluate", "--model.name", headless, *data), "has no classification head", "Set --model.name")

    from datasets import ClassLabel, Dataset, Features, Value

    rows = Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [0, 1, 2]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["bad", "fair", "good"])}),
    )
    rows.to_parquet(tmp_path / "test.parquet")
    refused(
        run_command(*scored, "--data.source", tmp_path / "test.parquet"),
        "label is not a class in 3 rows (test.parquet row 1: 'bad', ",
        "classes are World, Sports, Business, Sci/Tech",
    )
    # The same classes in another order: a label means the class of its name.
    turned = Dataset.from_dict(
        {"text": ["a", "b"], "label": [0, 1]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["Business", "Sci/Tech", "Sports", "World"])}),
    )
    turned.to_parquet(tmp_path / "turned.parquet")
    succeeded(run_command(*scored, "--data.source", tmp_path / "turned.parquet", "--output", tmp_path / "turned"))
    (path,) = (tmp_path / "turned").glob("predictions-*.jsonl")
    assert [row["label"] for row in lines(path)] == [2, 3]

    # A directory with only a test split is enough for scoring it.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source / "test.jsonl", alone / "test.jsonl")
    output = tmp_path / "scores"
    assert run_command(*scored, "--data.source", alone, "--split", "test", "--output", output).returncode == 0
    again = run_command(*scored, "--data.source", alone, "--split", "test", "--output", output)
    refused(again, "scores: holds a result.json of other scores", "--run.overwrite")
    (alone / "test.jsonl").rename(alone / "train.jsonl")
    refused(run_command(*scored, "--data.source", alone), "has no test split", "--split")

    done = run_command(*scored, *data, "--output", "/proc/nowhere")
    refused(done, "/proc/nowhere: cannot be written", "Set it to a writable directory")
    assert "run started" not in done.stdout, "refused before scoring"
    before = (run / "result.json").read_bytes()
    refused(run_command(*scored, *data, "--output", run), "is a run's directory", "Set --output to another directory")
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"RANK": "0"}, ["RANK set but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE missing", "Start with torchrun"]),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            ["RANK=2 of WORLD_SIZE=2", "do not match", "Start the job with torchrun"],
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            ["WORLD_SIZE=1", "LOCAL_WORLD_SIZE=2: these do not match", "torchrun"],
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ["srun started 4 tasks without torchrun", "srun --ntasks-per-node=1 torchrun"]),
    ],
)
def test_contradicting_launcher_variables_are_an_error(tmp_path, environ, parts):
    done = python("-m", "agnews_dist.train", "--run.dir", str(tmp_path), check=False, **environ)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part in line for part in parts] == [True] * len(parts), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["--print_config"], ["--optim.lrr", "1", "--run.sed=2"]])
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "prepare"])
def test_help_and_setting_errors_load_no_torch(command, words):
    done = python("-X", "importtime", "-m", "agnews_dist", command, *words, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert "agnews_dist.config" in imported
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "numpy"}
    if words[0].startswith("--optim"):
        assert done.returncode == 2
        assert len(errors) == 2, "all errors at once"
        assert "Did you mean '--optim.lr'?" in errors[0]
        assert "Did you mean '--run.seed'?" in errors[1]
    else:
        assert (done.returncode, errors) == (0, [])
        assert f"usage: agnews-dist {command} " in done.stdout if words == ["--help"] else "  lr: " in done.stdout
