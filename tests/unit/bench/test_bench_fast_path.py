"""The benchmark of the fast path: every contestant does the same job, the tables are the logs', a broken run is not lost."""

import importlib
import json
import sys
from datetime import datetime, timezone
from itertools import pairwise

import pytest
import torch
from support.processes import REPOSITORY, python

BENCH = REPOSITORY / "tests" / "bench"
FAST_PATH = BENCH / "fast_path"
NAMES = ("job", "ours", "trainer", "products", "summary", "run")


@pytest.fixture
def module(monkeypatch):
    """Of tests/bench/fast_path."""
    monkeypatch.syspath_prepend(str(FAST_PATH))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def runner(*arguments: str, check: bool = True):
    return python(str(FAST_PATH / "run.py"), *arguments, "--quick", "--threads", "1", check=check, timeout=280)


def lines(log):
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The output directory of a whole quick run, and what it printed."""
    output = tmp_path_factory.mktemp("quick")
    return output, runner("--output", str(output)).stdout


def test_every_contestant_does_the_same_job_with_the_same_trainable_parts(quick):
    header, *rows = lines(quick[0] / "log.jsonl")
    assert [row["contestant"] for row in rows] == ["products", "ours", "plain", "length", "fixed", "random"]
    assert {row["texts_sha256"] for row in rows} == {header["job"]["texts_sha256"]}
    assert {row["threads"] for row in rows} == {1}
    assert header["cpu"]
    assert all(row["versions"]["torch"] for row in rows)
    ours, plain, *trainer = rows[1:]
    # Ours has a bias for each of the four classes; Hugging Face's head has none.
    assert {row["trainable_parameters"] - 4 for row in (ours, plain)} == {
        row["trainable_parameters"] for row in trainer
    }
    assert {row["tokens_per_epoch"] for row in (ours, plain)} == {header["job"]["tokens"]["train"]}
    for row in rows[1:]:
        assert len(row["epoch_seconds"]) == len(row["loss"]) == row["epochs"]
        assert 0 < sum(row["epoch_seconds"]) < row["seconds"]
        assert row["peak_rss_bytes"] > 2**27
    for row in (ours, trainer[0]):
        assert all(later < earlier for earlier, later in pairwise(row["loss"]))


def test_the_clock_starts_after_the_imports(quick):
    for row in lines(quick[0] / "log.jsonl")[1:]:
        # What is left are single files that torch loads at an optimizer's first step and the like.
        assert row["late_imports"] < 60, row["late_modules"]
        assert not {"datasets", "pandas", "accelerate", "scipy"} & set(row.get("late_modules", []))


def test_fast_and_plain_are_what_they_are_called(quick):
    _, _, ours, plain, *_ = lines(quick[0] / "log.jsonl")
    assert ours["features"].startswith("host")
    assert plain["features"].startswith("off")


def test_the_printed_tables_are_those_of_the_log(quick, module):
    output, printed = quick
    table = module("summary").tables(lines(output / "log.jsonl"))
    assert table.strip() in printed
    assert table.count("| ours | 3 |") == table.count("| 3 epochs against Trainer, `group_by_length` |") == 1


def test_a_run_that_broke_off_is_resumed_with_what_is_missing_alone(quick, tmp_path):
    before = (quick[0] / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = tmp_path / "log.jsonl"
    kept = [line for line in before if '"key": "products 0"' not in line]
    failed = json.dumps({"key": "products 0", "command": "products.py", "failed": "killed"})
    log.write_text("\n".join([*kept, failed]) + "\n", encoding="utf-8")

    refused = runner("--output", str(tmp_path), check=False)
    assert refused.returncode == 2
    assert f"{log} is there" in refused.stderr
    assert "--resume" in refused.stderr
    assert len(lines(log)) == len(kept) + 1

    done = runner("--output", str(tmp_path), "--resume")
    new = lines(log)[len(kept) + 1 :]
    assert [row["key"] for row in new] == ["products 0"]
    assert new[0]["gigaflops"] > 0
    assert "frozen part, share of the matrix-product rate" in done.stdout

    other = lines(log)
    other[0]["job"]["texts_sha256"] = "of other texts"
    log.write_text("".join(json.dumps(row) + "\n" for row in other), encoding="utf-8")
    refused = runner("--output", str(tmp_path), "--resume", check=False)
    assert refused.returncode == 2
    assert "another job or machine" in refused.stderr
    assert "another --output" in refused.stderr


def test_a_contestant_that_fails_or_hangs_is_recorded(module, tmp_path, monkeypatch):
    run = module("run")
    environment = run.child_environment(1)
    row = run.run(run.Contest("wrong", "ours.py", ("--epochs", "many")), tmp_path, tmp_path / "work", environment)
    assert row["key"] == "wrong"
    assert row["failed"].startswith("exit code 2:")
    assert "many" in row["failed"]
    monkeypatch.setattr(run, "TIMEOUT_SECONDS", 0.01)
    row = run.run(run.Contest("slow", "ours.py", ("--epochs", "1")), tmp_path, tmp_path / "work", environment)
    assert row["failed"] == "no end after 0.01 s"


def made_up(contestant, epochs, seconds, epoch_seconds, *, options="", peak=1000, prefix=0.0):
    """A line of a log in round figures."""
    return {
        "command": f"some.py --epochs {epochs} {options}".strip(),
        "contestant": contestant,
        "epochs": epochs,
        "seconds": seconds,
        "epoch_seconds": epoch_seconds,
        "loss": [1.0] * epochs,
        "parts": {"prefix": prefix},
        "peak_rss_bytes": peak * 2**20,
    }


def made_up_log(**changes):
    # 2**20 tokens of 2 frozen blocks of width 64: 206 GFLOP, and 256 MiB of features.
    job = {"tokens": {"train": 2**20 - 24, "validation": 24}, "blocks": 3, "width": 64}
    ours = {"peak": 1200, "prefix": 2.0, **changes}
    return [
        {"job": job, "settings": False},
        {"contestant": "products", "gigaflops": 100.0},
        {"contestant": "products", "gigaflops": 125.0},
        *(made_up("ours", 3, seconds, [2.0, 0.5, 0.5], **ours) for seconds in (9.0, 10.0, 30.0)),
        made_up("length", 3, 100.0, [33.0] * 3),
        made_up("length", 3, 95.0, [60.0, 17.0, 17.0], options="--compile"),
        made_up("length", 3, 20.0, [6.0] * 3, options="--activation gelu_pytorch_tanh --quiet-frozen"),
        made_up("random", 3, 125.0, [40.0] * 3),
        made_up("plain", 1, 30.0, [25.0], peak=1000),
    ]


def test_goals_are_counted_from_the_median_of_ours_against_the_fastest_unchanged_peer(module):
    table = module("summary").tables(made_up_log())
    assert "| 3 epochs against Trainer, `group_by_length` | 9x | 9.5x |" in table
    assert "| 3 epochs against Trainer, random batches padded to the longest | 12x | 12.5x |" in table
    assert "| a cached epoch against `group_by_length` | 100x | 34x (17.0 s against 0.500 s) |" in table
    assert "| ours | 3 | 10.0 (9.0 to 30.0) |" in table
    assert "| Trainer, `group_by_length`, model changed | 3 | 20.0 | 2.0 |" in table
    assert "scaled from one (its time + 2 x its epoch): 80.0 s, 8.0 times ours" in table
    # 2 blocks x 24 x 64^2 x 2^20 FLOP in 2 s, against the best of the two measurements
    assert "| 75% | 82 (82 to 82) % (103 of 125 GFLOP/s) |" in table
    assert "| 1,000 + 256 MiB | 1,200 MiB |" in table
    assert "against Trainer, all padded" not in table
    assert "| 10 epochs" not in table


def test_goals_that_are_missed_are_shown_so(module):
    table = module("summary").tables(made_up_log(peak=1300, prefix=8.0))
    assert "| 1,000 + 256 MiB | 1,300 MiB |" in table
    assert "| 75% | 21 (21 to 21) % (26 of 125 GFLOP/s) |" in table


def test_an_epoch_lasts_from_the_evaluation_before_it_to_its_last_step(module):
    def said(event, second, **fields):
        return {"event": event, "time": datetime.fromtimestamp(second, timezone.utc).isoformat(), **fields}

    def step(second, loss, examples):
        return said("StepDone", second, seconds=1.0, loss=loss, num_examples=examples, num_tokens=10 * examples)

    events = [
        said("RunStarted", 0),
        step(101, 4.0, 30),
        step(102, 2.0, 10),
        said("EvalDone", 110),
        step(113, 1.0, 40),
        said("EvalDone", 120),
        said("EvalDone", 130),
    ]
    first, second = module("ours").per_epoch(events)
    assert first == {"seconds": 2.0, "loss": 3.5, "tokens": 400}
    assert second == {"seconds": 3.0, "loss": 1.0, "tokens": 400}


def test_trainer_is_changed_below_the_last_block_only_and_only_when_asked(module, tmp_path):
    trainer, job = module("trainer"), module("job")
    job.prepare(tmp_path, quick=True)
    tokenizer = trainer.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = trainer.build_model(tmp_path / "model", tokenizer, attention="sdpa", activation=None)
    assert model.config._attn_implementation == "sdpa"
    other = trainer.build_model(tmp_path / "model", tokenizer, attention="eager", activation="gelu_pytorch_tanh")
    assert other.config._attn_implementation == "eager"
    inner = torch.linspace(-4, 4, 99)
    torch.testing.assert_close(other.transformer.h[0].mlp.act(inner), model.transformer.h[0].mlp.act(inner))
    assert type(other.transformer.h[0].mlp.act) is not type(model.transformer.h[0].mlp.act)

    def rates(part):
        return {module.p for module in part.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(model) == {0.1}
    trainer.without_dropout_where_frozen(model)
    assert rates(model.transformer.h[-1]) == {0.1}
    assert rates(model.transformer.h[:-1]) == rates(model.transformer.drop) == {0.0}
    trained = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(name.startswith(("transformer.h.3.", "transformer.ln_f", "score")) for name in trained)
    assert {"transformer.ln_f", "score", "transformer.h.3.attn.c_attn"} <= trained


def test_a_blocks_products_are_24_d_squared_per_token(module):
    assert sum(2 * inputs * outputs for inputs, outputs in module("products").shapes(768)) == 24 * 768**2


def test_the_tables_of_results_are_what_the_logs_say(module):
    """Every log of this benchmark, once there is one; that a log stands in RESULTS.md at all is tested with the other logs."""
    results = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    for log in sorted((BENCH / "logs").glob("*-fast-path*.jsonl")):
        rows = lines(log)
        assert not any("failed" in row for row in rows)
        for part in module("summary").tables(rows).split("\n\n"):
            assert part.strip() in results, log.name
