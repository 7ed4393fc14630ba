"""Command line and YAML files: they become the `Config`, and all mistakes are reported at once."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agnews_dist.__main__ import COMMANDS
from agnews_dist.__main__ import main as run_main
from agnews_dist.config.command_line import Loaded, Option, dump, load
from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import BatchConfig, Config, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from agnews_dist.config.yaml_file import SHIPPED
from agnews_dist.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGS = REPOSITORY / "configs"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def errors_of(argv: Sequence[str], options: Sequence[Option] = ()) -> list[str]:
    """Return the lines of the error; each must have the form `<what>: <why>. <fix>.`"""
    with pytest.raises(ConfigError) as caught:
        load("train", argv, options)
    assert caught.value.exit_code == 2
    lines = str(caught.value).split("\n")
    for line in lines:
        what, colon, rest = line.partition(": ")
        assert what, line
        assert colon, line
        assert rest.endswith("."), line
        assert rest.count(". ") + rest.count("? ") >= 1, line
    return lines


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


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "3E-4", 3e-4),
        ("optim.lr", "1", 1.0),
        ("optim.lr", ".5", 0.5),
        ("run.overwrite", "true", True),
        ("run.overwrite", "no", False),
        ("model.trainable_blocks", "all", "all"),
        ("model.trainable_blocks", "2", 2),
        ("data.limit_train", "null", None),
        ("data.limit_train", "~", None),
        ("data.limit_train", "12", 12),
        ("data.pad_token", "eos", "eos"),
        ("run.name", "1e-4", "1e-4"),
        ("run.name", "007", "007"),
        ("run.name", "2024-01-01", "2024-01-01"),
        ("run.name", "true", "true"),
        ("run.name", "null", None),
        ("data.revision", "1234567", "1234567"),
    ],
)
def test_yaml_and_command_line_read_values_alike(tmp_path: Path, key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    path = write(tmp_path / "a.yaml", f"{section}:\n  {name}: {text}\n")
    dotted = write(tmp_path / "b.yaml", f"{key}: {text}\n")
    for argv in (["--config", path], ["--config", dotted], [f"--{key}", text], [f"--{key}={text}"]):
        got = getattr(getattr(load("train", argv).config, section), name)
        assert got == value, argv
        assert type(got) is type(value), argv


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


def test_quoted_yaml_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "run: {name: 'null'}\ndata: {revision: \"1\", pad_token: 'eos'}")
    config = load("train", ["--config", path]).config
    assert (config.run.name, config.data.revision, config.data.pad_token) == ("null", "1", "eos")


def test_debug_is_short_for_its_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load("train", ["--debug"]) == load("train", ["--config", "configs/debug.yaml"])
    assert load("train", ["--run.name", "x", "--debug"]).config.run.name == "x"


def test_shipped_configs_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("train", ["--debug"]).config.run.debug is True
    assert load("train", ["--config", "debug.yaml"]).config.run.debug is True
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "debug.yaml", "run: {name: mine}")
    assert load("train", ["--debug"]).config == Config(run=RunConfig(name="mine"))


def test_mistyped_path_is_not_replaced_by_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [line] = errors_of(["--config", "experiments/debug.yaml"])
    assert "'experiments/debug.yaml'" in line


def test_all_errors_are_reported_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        "optim:\n  lrr: 3\n  lr: null\n  epochs: '3'\nmodel: 3\ndata: {source: [a], max_length: ~}\nrunn:\n  seed: 3\n",
    )
    lines = errors_of(
        ["--config", path, "--lr", "3e-4", "--optim.schedule", "cosin", "--run.seed", "x", "--optim.epochs"]
    )
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


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--optim.lrr", "'--optim.lr'"),
        ("--data.lr", "'--optim.lr'"),
        ("--lrr", "'--optim.lr'"),
        ("--seed", "'--data.seed' or '--run.seed'"),
        ("--optim.max-grad-norm", "'--optim.max_grad_norm'"),
        ("--batch_size", "'--batch.global_batch_size'"),
        ("--print-config", "'--print_config'"),
        ("--debgu", "'--run.debug' or '--debug'"),
        ("--splt", "'--split'"),
    ],
)
def test_unknown_option_names_the_nearest(wrong: str, right: str) -> None:
    [line] = errors_of([wrong, "1"], [Option("--split", "Which.")])
    assert f"unknown option {wrong!r}" in line
    assert f"Did you mean {right}?" in line


def test_unknown_option_without_a_near_one_names_none() -> None:
    [line] = errors_of(["--frobnicate=1"])
    assert "Did you mean" not in line


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


@pytest.mark.parametrize(
    ("text", "value", "fix"),
    [
        (b"- a\n", "holds a list", "Write for example 'optim:'"),
        (b"just words\n", "holds 'just words'", "Write for example 'optim:'"),
        (b"optim: {lr: 1\nrun: [", "line 2", "Correct the file"),
        (b"run:\n  seed: 1\n\tname: x\n", "line 3", "Correct the file"),
        (b"run: {seed: 1}\n---\nrun: {seed: 2}\n", "line 2", "Correct the file"),
        (b"run: {name: \x00}\n", "special characters", "Correct the file"),
        (b"run: {name: caf\xe9}\n", "byte 15 is not UTF-8", "Save the file as UTF-8"),
        ("run: {seed: 1}".encode("utf-16"), "is not UTF-8", "Save the file as UTF-8"),
        (b"run:\n  seed: 1\n  seed: 2\n", "run.seed twice", "lines 2 and 3"),
        (b"run: {seed: 1}\noptim: {lr: 1}\nrun: {name: x}\n", "run twice", "lines 1 and 3"),
        (b"run: {seed: 1}\nrun.seed: 2\n", "run.seed twice", "lines 1 and 2"),
        (b"run: null\n", "run 'null'", "Write for example 'optim:'"),
        (b"? [a]\n: 1\n", "a list as a key", "Write for example 'optim:'"),
        (b"run: {seed: {a: 1}}\n", "run.seed a mapping", "takes a whole number"),
        (b"data: {source: }\n", "data.source null", "takes text"),
        (b"lr: 3\n", "unknown key 'lr'", "Did you mean 'optim.lr'?"),
        (b"1: 3\n", "unknown key '1'", "--help lists"),
    ],
)
def test_wrong_file_is_named_with_line_and_fix(tmp_path: Path, text: bytes, value: str, fix: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    [line] = errors_of(["--config", str(path)])
    assert str(path) in line
    assert value in line
    assert fix in line


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    [missing] = errors_of(["--config", "configs/debgu.yaml"])
    assert "Did you mean 'configs/debug.yaml'?" in missing
    [directory] = errors_of(["--config", str(tmp_path)])
    assert f"{str(tmp_path)!r}: it cannot be read (Is a directory)" in directory


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}\n", "optim:\nrun:\n", "\ufeff{}\n"])
def test_file_without_values_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load("train", ["--config", write(tmp_path / "a.yaml", text)]) == load("train", [])


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
    options = [
        Option("--json", "Machine-readable.", type=bool, default=False),
        Option("--ranks", "How many.", type=int),
    ]
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
    for words in (
        "python -m agnews_dist predict",
        "[TEXT ...]",
        "--print_config",
        "--debug",
        "100% yours",
        "--file FILE",
    ):
        assert words.replace(" ", "") in shown


def test_help_after_two_dashes_is_a_positional_argument() -> None:
    assert load("predict", ["--", "--help"], [Option("text", "", nargs="*")]).options == {"text": ("--help",)}


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    members = get_args(type_) or (type_,)
    choices: list[st.SearchStrategy[Any]] = []
    for member in members:
        if member is str:
            choices.append(
                st.text(st.characters(codec="utf-8")) | st.sampled_from(["null", "~", "", "1e-4", "- x", "a\nb"])
            )
        elif member is int:
            choices.append(st.integers(1, 10**6))
        elif member is float:
            choices.append(st.floats(0, 1, exclude_min=True, exclude_max=True))
        elif member is bool:
            choices.append(st.booleans())
        elif member is type(None):
            choices.append(st.none())
        else:
            choices.append(st.sampled_from(get_args(member) or (member,)))
    return st.one_of(choices)


@given(st.data())
def test_dump_and_load_preserve_any_config(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    # Random values that obey the rules between settings.
    sections: dict[str, dict[str, Any]] = {}
    for key, setting in all_settings().items():
        sections.setdefault(setting.section, {})[setting.name] = data.draw(values_of(setting.type), label=key)
    sections["batch"]["max_tokens_per_rank"] += sections["data"]["max_length"]
    if sections["batch"]["global_token_budget"] is not None:
        sections["batch"]["global_token_budget"] += sections["data"]["max_length"]
    sections["data"]["source"] += "x"
    sections["model"]["name"] += "x"
    engine = sections["engine"]
    if not engine["fast_path"]:
        engine["feature_cache"] = "off"
    if engine["backend"] != "deepspeed":
        engine |= {"zero_stage": 2, "offload": "none", "deepspeed_config": None}
    if engine["offload"] == "all":
        engine["zero_stage"] = 3
    if engine["backend"] == "fsdp" and engine["precision"] == "fp16":
        engine["precision"] = "bf16"
    sections["batch"]["longest_first"] = sections["batch"]["longest_first"] and engine["backend"] == "ddp"
    config = Config(
        data=DataConfig(**sections["data"]),
        model=ModelConfig(**sections["model"]),
        batch=BatchConfig(**sections["batch"]),
        optim=OptimConfig(**sections["optim"]),
        engine=EngineConfig(**sections["engine"]),
        run=RunConfig(**sections["run"]),
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    loaded = load("train", ["--config", str(path)])
    assert loaded.config == config
    assert len(loaded.explicit) == len(all_settings())


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


def test_shipped_configs_name_their_command_and_repeat_no_default() -> None:
    found = sorted(CONFIGS.glob("*.yaml"))
    assert [path.name for path in found] == list(SHIPPED)
    assert len(found) == 6
    for path in found:
        loaded = load("train", ["--config", str(path)])
        first = path.read_text(encoding="utf-8").split("\n")[0]
        assert first.startswith("# "), path
        command = first[2:].split()
        assert command[command.index("--config") + 1] == f"configs/{path.name}"
        assert "agnews_dist.train" in command or (REPOSITORY / next(word for word in command if "/" in word)).is_file()
        defaults = Config()
        for key in loaded.explicit:
            section, name = key.split(".")
            value = getattr(getattr(loaded.config, section), name)
            assert value != getattr(getattr(defaults, section), name), f"{path.name} repeats the default of {key}"


def test_gpt2_ddp_equals_the_defaults_and_debug_is_small() -> None:
    assert load("train", ["--config", str(CONFIGS / "gpt2_ddp.yaml")]) == load("train", [])
    debug = load("train", ["--config", str(CONFIGS / "debug.yaml")]).config
    assert (debug.run.debug, debug.model.name, debug.data.source) == (True, "embedded", "synthetic")
    quickstart = load("train", ["--config", str(CONFIGS / "quickstart.yaml")]).config
    assert (quickstart.model.name, quickstart.data.source, quickstart.data.limit_train) == (
        "embedded",
        "synthetic",
        2000,
    )


def test_main_lists_commands_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([]) == 2
    listed = capsys.readouterr().err
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        assert f"  {command} " in listed
    assert run_main(["trian"]) == 2
    assert "command 'trian': unknown. Did you mean 'train'?" in capsys.readouterr().err
    assert run_main(["--help"]) == 0
    assert "  train " in capsys.readouterr().out
    assert run_main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("agnews_dist 0.")


def test_main_loads_no_torch_for_help() -> None:
    code = (
        "import sys\n"
        "from agnews_dist.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "python -m agnews_dist train" in done.stdout


def test_argument_of_deepspeeds_launcher_is_ignored() -> None:
    loaded = load("train", ["--local_rank=1", "--optim.lr", "1e-5"])
    assert loaded.config == load("train", ["--optim.lr", "1e-5"]).config
    assert "--local_rank" in errors_of(["--local_rank", "1"])[0], "the launcher writes it with `=`"
