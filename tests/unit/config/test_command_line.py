"""Command line: arguments become the `Config`, and all mistakes are reported at once."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from support.processes import REPOSITORY
from support.settings import errors_of, write

from agnews_dist.config.command_line import Loaded, Option, load
from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import Config, OptimConfig, RunConfig


def test_load_without_arguments_gives_the_defaults() -> None:
    assert load("train", []) == Loaded(Config(), frozenset(), {})


def test_flags_override_later_files_earlier_files_defaults(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {lr: 1e-4, epochs: 7, schedule: cosine}\nrun: {seed: 1}")
    second = write(tmp_path / "b.yaml", "optim:\n  epochs: 8\n  schedule: linear\n")
    loaded = load("train", ["--optim.schedule=cosine", "--config", first, f"--config={second}", "--run.seed", "2"])
    assert loaded.config == Config(optim=OptimConfig(lr=1e-4, epochs=8, schedule="cosine"), run=RunConfig(seed=2))
    assert loaded.explicit == {"optim.lr", "optim.epochs", "optim.schedule", "run.seed"}


def test_last_flag_wins() -> None:
    assert load("train", ["--optim.lr", "1", "--optim.lr", "2"]).config.optim.lr == 2.0


def test_explicit_includes_keys_set_to_their_default() -> None:
    assert load("train", ["--data.max_length", "256"]).explicit == {"data.max_length"}


def test_negative_number_is_a_value() -> None:
    assert errors_of(["--optim.lr", "-1e-3"])[0].startswith("optim.lr -0.001: ")


def test_bool_flag_without_a_value_is_true() -> None:
    assert load("train", ["--run.overwrite"]).config.run.overwrite is True
    assert load("train", ["--run.overwrite", "--run.seed", "3"]).config.run == RunConfig(overwrite=True, seed=3)
    assert load("train", ["--run.overwrite", "False"]).config.run.overwrite is False
    text = Option("text", "Texts.", nargs="*")
    loaded = load("predict", ["--run.debug", "stocks fall"], [text])
    assert loaded.config.run.debug is True
    assert loaded.options == {"text": ("stocks fall",)}


def test_debug_is_short_for_its_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load("train", ["--debug"]) == load("train", ["--config", "configs/debug.yaml"])
    assert load("train", ["--run.name", "x", "--debug"]).config.run.name == "x"


def test_all_errors_are_reported_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        "optim:\n  lrr: 3\n  lr: null\n  epochs: '3'\nmodel: 3\ndata: {source: [a], max_length: ~}\nrunn:\n  seed: 3\n",
    )
    lines = errors_of(["--config", path, "--lr", "3e-4", "--optim.schedule", "cosin", "--run.seed", "x", "--optim.epochs"])
    for value, fix in [
        ("'optim.lrr' (" + path + ", line 2)", "Did you mean 'optim.lr'?"),
        ("optim.lr 'null' (" + path + ", line 3)", "takes a number. Correct it; the default is 0.001."),
        ("optim.epochs '3' (" + path + ", line 4)", "takes a whole number. Remove the quotes."),
        ("model '3' (" + path + ", line 5)", "Write for example 'optim:'"),
        ("data.source a list (" + path + ", line 6)", "takes text."),
        ("data.max_length '~' (" + path + ", line 6)", "takes a whole number."),
        ("'runn' (" + path + ", line 7)", "Did you mean 'run'?"),
        ("'--lr'", "Did you mean '--optim.lr'?"),
        ("--optim.schedule 'cosin'", "takes linear or cosine. Did you mean 'cosine'?"),
        ("--run.seed 'x'", "takes a whole number. Correct it; the default is 0."),
        ("--optim.epochs without a value", "Write --optim.epochs VALUE."),
    ]:
        assert len([line for line in lines if value in line and fix in line]) == 1, (value, lines)
    assert len(lines) == 11


def test_abbreviations_are_refused() -> None:
    assert "Did you mean '--optim.epochs'?" in errors_of(["--optim.epoch", "3"])[0]
    assert "Did you mean '--config'?" in errors_of(["--conf", "x.yaml"])[0]


@pytest.mark.parametrize(
    ("argv", "value", "fix"),
    [
        (["foo"], "argument 'foo'", "Write --section.field VALUE"),
        (["configs/debug.yaml"], "argument 'configs/debug.yaml'", "Write --config configs/debug.yaml"),
        (["optim.lr=3"], "argument 'optim.lr=3'", "Write --optim.lr=3"),
        (["--", "--optim.lr"], "argument '--optim.lr'", "remove it"),
        (["--debug=yes"], "--debug=yes", "Write --debug alone"),
        (["--config"], "--config without a value", "Write --config VALUE"),
        (["--config="], "--config without a value", "Write --config VALUE"),
        (["--optim.lr", "--run.seed", "1"], "--optim.lr without a value", "Write --optim.lr VALUE"),
        (["--optim.lr", "fast"], "--optim.lr 'fast'", "the default is 0.001"),
        (["--optim.lr="], "--optim.lr ''", "the default is 0.001"),
        (["--optim.lr", "null"], "--optim.lr 'null'", "the default is 0.001"),
        (["--optim.lr", "nan"], "--optim.lr 'nan'", "the default is 0.001"),
        (["--optim.epochs", "1.5"], "--optim.epochs '1.5'", "a whole number"),
        (["--optim.epochs", "true"], "--optim.epochs 'true'", "a whole number"),
        (["--data.limit_train", "few"], "--data.limit_train 'few'", "a whole number or null"),
        (["--run.overwrite", "maybe"], "--run.overwrite 'maybe'", "true or false"),
        (["--model.trainable_blocks", "al"], "--model.trainable_blocks 'al'", "Did you mean 'all'?"),
        (["--engine.precision", "bf61"], "--engine.precision 'bf61'", "Did you mean 'bf16'?"),
        (["--data.source", "null"], "--data.source 'null'", "takes text"),
    ],
)
def test_wrong_argument_is_named_with_a_fix(argv: list[str], value: str, fix: str) -> None:
    [line] = errors_of(argv)
    assert line.startswith(value)
    assert fix in line


def test_values_are_validated_unless_some_are_lost() -> None:
    both = errors_of(["--optim.epochs", "0", "--optim.lrr", "3"])
    assert len(both) == 2
    assert both[1].startswith("optim.epochs 0: ")
    # max_length is unreadable, so max_tokens_per_rank is not compared with its default.
    [only] = errors_of(["--batch.max_tokens_per_rank", "128", "--data.max_length", "64k"])
    assert "--data.max_length '64k'" in only
    # Messages about other settings are reported.
    unread, negative = errors_of(["--optim.epochs", "2.5", "--model.trainable_blocks", "-1"])
    assert "--optim.epochs '2.5'" in unread
    assert negative.startswith("model.trainable_blocks -1: ")


def test_options_of_a_command() -> None:
    options = [
        Option("text", "Texts.", nargs="*"),
        Option("--file", "One text per line."),
        Option("--format", "How.", default="table", choices=("table", "jsonl")),
        Option("--top", "How many.", type=int, default=1),
    ]
    assert load("predict", [], options).options == {"text": (), "file": None, "format": "table", "top": 1}
    argv = ["a b", "--top=2", "-", "--format", "jsonl", "--optim.lr", "1", "--", "--file", "-x"]
    loaded = load("predict", argv, options)
    assert loaded.options == {"text": ("a b", "-", "--file", "-x"), "file": None, "format": "jsonl", "top": 2}
    assert loaded.explicit == {"optim.lr"}
    format_line, top_line = errors_of(["--format", "json", "--top", "x"], options)
    assert "takes table or jsonl. Did you mean 'jsonl'? Correct it; the default is table." in format_line
    assert "takes a whole number. Correct it; the default is 1." in top_line


def test_bool_option_of_a_command_needs_no_value() -> None:
    options = [Option("--json", "Machine-readable.", type=bool, default=False), Option("--ranks", "How many.", type=int)]
    assert load("plan", [], options).options == {"json": False, "ranks": None}
    assert load("plan", ["--json", "--ranks", "8"], options).options == {"json": True, "ranks": 8}
    assert load("plan", ["--ranks=8", "--json"], options).options == {"json": True, "ranks": 8}
    assert load("plan", ["--json", "false"], options).options["json"] is False
    [line] = errors_of(["--json", "yaml"], options)
    assert "--json 'yaml': it takes true or false. Correct it; the default is false." in line


def test_usage_shows_the_form_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = [Option("text", "", nargs="*"), Option("--json", "", type=bool, default=False), Option("--ranks", "")]
    with pytest.raises(SystemExit):
        load("plan", ["--help"], options)
    usage = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
    assert usage.endswith("[--section.field VALUE ...] [TEXT ...] [--json] [--ranks RANKS]")


def test_help_shows_every_setting_with_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    options = [Option("text", "Texts to classify, 100% yours.", nargs="*"), Option("--file", "One per line.")]
    with pytest.raises(SystemExit) as stopped:
        load("predict", ["--no_such", "--help"], options)
    assert stopped.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # lines break anywhere, also after a hyphen
    assert len(all_settings()) > 30
    for key, setting in all_settings().items():
        default = "null" if setting.default is None else str(setting.default)
        text = "".join(setting.help.split())
        assert f"--{key}" in shown
        assert text in shown, key
        after = shown[shown.index(text) + len(text) :]
        assert after.split("default:", 1)[1].startswith(f"{default})"), key
    for words in ("python -m agnews_dist predict", "[TEXT ...]", "--print_config", "--debug", "100% yours", "--file FILE"):
        assert words.replace(" ", "") in shown


def test_help_after_two_dashes_is_a_positional_argument() -> None:
    assert load("predict", ["--", "--help"], [Option("text", "", nargs="*")]).options == {"text": ("--help",)}


def test_print_config_prints_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--optim.lr", "1e-5", "--data.limit_train", "5", "--run.name", "null", "--model.trainable_blocks", "all"]
    with pytest.raises(SystemExit) as stopped:
        load("train", [*argv, "--print_config"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    path = write(tmp_path / "printed.yaml", shown)
    assert load("train", ["--config", path]).config == load("train", argv).config
    for setting in all_settings().values():
        assert f"  # {setting.help[:40]}" in shown
    # A plain YAML parser reads the same values, nulls included.
    assert yaml.safe_load(shown) == dataclasses.asdict(load("train", argv).config)


def test_print_config_reports_errors() -> None:
    assert "'optim.lrr'" in errors_of(["--optim.lrr", "1", "--print_config"])[0].replace("--", "")


def test_argument_of_deepspeeds_launcher_is_ignored() -> None:
    loaded = load("train", ["--local_rank=1", "--optim.lr", "1e-5"])
    assert loaded.config == load("train", ["--optim.lr", "1e-5"]).config
    assert "--local_rank" in errors_of(["--local_rank", "1"])[0], "the launcher writes it with `=`"
