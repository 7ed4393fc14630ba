"""`plan` as a command: its figures equal those of a training on two ranks; wrong input is named."""

import json
import re
from pathlib import Path

import pytest
from support import fork_server, small_run
from support.processes import in_a_terminal

from agnews_dist.__main__ import main

TINY = ("--model.name", "embedded", "--data.source", "synthetic", "--data.limit_test", "8")
REQUIRED = {
    "critical_path_efficiency",
    "padding_efficiency",
    "rank_balance",
    "num_steps",
    "num_examples",
    "num_tokens",
    "num_truncated",
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _isolate_cache(monkeypatch: pytest.MonkeyPatch, caches: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", caches)


def run_plan(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict, str]:
    """Run `plan --json`; returns the object and standard error."""
    code = main(["plan", *TINY, *map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out), err


@pytest.mark.parametrize(
    "batches",
    [
        ("--batch.global_batch_size", "24", "--optim.max_steps", "15"),
        ("--batch.global_token_budget", "450", "--batch.bucket_window", "4"),
    ],
    ids=["examples", "tokens"],
)
def test_plan_predicts_the_figures_of_a_training_on_two_ranks(batches, tmp_path: Path, caches: str, capsys) -> None:
    inputs = small_run.write_inputs()
    files = ("--model.name", str(inputs / "model"), "--data.source", str(inputs / "rows"))
    words = [*TINY, *files, "--data.limit_train", "250", "--data.limit_validation", "8", "--data.max_length", "40"]
    words += ["--optim.epochs", "2", "--batch.max_tokens_per_rank", "160", *batches]
    fork_server.run_ranks(
        2, "-m", "agnews_dist.train", *words, "--run.dir", str(tmp_path), "--run.name", "run", XDG_CACHE_HOME=caches
    )
    found, _ = run_plan(capsys, *words, "--ranks", "2")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for key in ("num_steps", "padding_efficiency", "critical_path_efficiency", "rank_balance", "global_batch_size"):
        assert found[key] == result[key], key
    steps = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    steps = [event for event in steps if event["event"] == "StepDone"]
    for key, name in (("num_tokens", "tokens_per_step"), ("num_examples", "examples_per_step")):
        figures = [step[key] for step in steps]
        assert (found[name]["min"], found[name]["max"]) == (min(figures), max(figures))
    assert found["num_tokens"] == sum(step["num_tokens"] for step in steps if step["epoch"] == 1)
    assert found["num_steps_per_epoch"] == sum(step["epoch"] == 1 for step in steps)
    # Control: some texts were cut off, and some shares were split into micro-batches.
    assert 0 < found["num_truncated"] < 250
    assert found["longest"] == 40
    assert found["micro_batches_per_step"]["max"] > 1
    # On another number of ranks the steps are the same and the efficiency differs.
    other, _ = run_plan(capsys, *words, "--ranks", "3")
    assert other["num_steps"] == found["num_steps"]
    assert other["tokens_per_step"] == found["tokens_per_step"]
    assert other["plan_fingerprint"] == found["plan_fingerprint"]
    assert other["critical_path_efficiency"] != found["critical_path_efficiency"]


def test_plan_balances_the_quadratic_cost_of_attention(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--data.limit_train", "300", "--batch.bucket_window", "1", "--ranks", "3"]
    found, _ = run_plan(capsys, *words)
    monkeypatch.setattr("agnews_dist.data.batching.shares.quadratic_weight", lambda hidden_dim: 0.0)
    in_tokens, _ = run_plan(capsys, *words)
    # Balanced by tokens, the slowest rank has fewer tokens than balanced by cost; efficiency counts tokens.
    assert found["critical_path_efficiency"] < in_tokens["critical_path_efficiency"]
    assert found["num_tokens"] == in_tokens["num_tokens"]


def test_plan_json_keeps_warnings_off_standard_output(caches: str) -> None:
    """A separate process also shows what libraries print without sys.stdout."""
    words = ["--data.limit_train", "100", "--data.max_length", "20", "--batch.global_batch_size", "4", "--ranks", "8"]
    done = fork_server.run_python("-m", "agnews_dist", "plan", *TINY, *words, "--json", XDG_CACHE_HOME=caches)
    found = json.loads(done.stdout)
    assert set(found) >= REQUIRED
    assert found["num_examples"] == 100
    assert found["idle_share"] == 0.5
    assert "are longer than 20 tokens" in done.stderr
    assert "warning: batch.global_batch_size 4 on 8 ranks: 4 of 8 ranks compute a filler row" in done.stderr
    assert "warning" not in done.stdout


def test_plan_prints_one_screen_on_a_terminal(caches: str) -> None:
    """On a real terminal of 80 columns."""
    words = ["--data.limit_train", "100", "--ranks", "6", "--batch.global_batch_size", "9"]
    written = in_a_terminal("-m", "agnews_dist", "plan", *TINY, *words, XDG_CACHE_HOME=caches, COLUMNS="80")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "embedded on synthetic, ranks: 6, epochs: 3" in text
    assert "100 texts" in text
    assert re.search(r"critical path [01]\.\d{3}", text)
    assert "\u2588\u2588\u2588" in text
    shown = " ".join(text.split())
    assert "warning: batch.global_batch_size 9 on 6 ranks: " in shown
    assert "Set batch.global_batch_size to a multiple of 6, such as 12." in shown


def test_plan_takes_the_ranks_of_the_launch_by_default(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--data.limit_train", "60")
    assert run_plan(capsys, *words)[0]["num_ranks"] == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert run_plan(capsys, *words)[0]["num_ranks"] == 4
    assert run_plan(capsys, *words, "--ranks", "2")[0]["num_ranks"] == 2
    monkeypatch.setenv("RANK", "3")
    assert main(["plan", *TINY, *words]) == 0
    assert capsys.readouterr() == ("", ""), "only rank 0 prints"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--ranks", "0"), 2, r"error: --ranks '0': it takes a whole number \(1 or more\) or null\. Correct it"),
        (("--ranks", "-3"), 2, r"error: --ranks '-3': it takes a whole number \(1 or more\) or null\. Correct it"),
        (("--ranks", "two"), 2, r"error: --ranks 'two': it takes a whole number \(1 or more\) or null\. Correct it"),
        (("--data.max_length", "600"), 1, r"error: data\.max_length 600: the model has 512 positions.*at most 512"),
    ],
)
def test_plan_names_wrong_input(words, code: int, message: str, capsys) -> None:
    assert main(["plan", *TINY, "--data.limit_train", "60", *words, "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(message, err)
    assert err.count("\n") == 1


def test_plan_needs_no_weights(shared: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "shape"
    model.mkdir()
    for path in [*(shared / "tokenizers" / "gpt2").iterdir(), shared / "checkpoints" / "gpt2-mini" / "config.json"]:
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    assert not list(model.glob("*.safetensors"))
    data = ("--data.source", shared / "data" / "ag_news", "--data.limit_train", "640")
    found, _ = run_plan(capsys, "--model.name", model, *data, "--ranks", "8")
    assert found["num_examples"] == 640
    assert 0.5 < found["critical_path_efficiency"] < 1
