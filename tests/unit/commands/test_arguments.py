"""Command line: arguments become the `Config`, and all mistakes are reported at once."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from support.processes import REPOSITORY
from support.settings import errors_of, write

from agnews_dist.commands.arguments import HelpRequest, Loaded, Option, load
from agnews_dist.commands.command import TRAINING_OPTIONS
from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import Config, OptimConfig, PathText, RunConfig


def test_load_without_arguments_gives_the_defaults() -> None:
    assert load([]) == Loaded(Config(), frozenset(), {})


def test_flags_override_later_files_earlier_files_defaults(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {lr: 1e-4, epochs: 7, schedule: cosine}\nrun: {seed: 1}")
    second = write(tmp_path / "b.yaml", "optim:\n  epochs: 8\n  schedule: linear\n")
    loaded = load(["--optim.schedule=cosine", "--config", first, f"--config={second}", "--run.seed", "2"])
    assert loaded.config == Config(optim=OptimConfig(lr=1e-4, epochs=8, schedule="cosine"), run=RunConfig(seed=2))
    assert loaded.explicit == {"optim.lr", "optim.epochs", "optim.schedule", "run.seed"}


def test_last_flag_wins_and_every_one_is_checked() -> None:
    assert load(["--optim.lr", "1", "--optim.lr", "2"]).config.optim.lr == 2.0
    [line] = errors_of(["--optim.lr", "x", "--optim.lr", "2"])
    assert "--optim.lr 'x'" in line


def test_explicit_includes_keys_set_to_their_default() -> None:
    assert load(["--data.max_length", "256"]).explicit == {"data.max_length"}


def test_negative_number_is_a_value() -> None:
    assert errors_of(["--optim.lr", "-1e-3"])[0].startswith("--optim.lr '-1e-3': it takes a number (0 or more, finite). ")
    assert errors_of(["--optim.lr", "-x"])[0].startswith("--optim.lr '-x': ")
    assert load(["--run.name", "-x"]).config.run.name == "-x"


def test_bool_flag_without_a_value_is_true() -> None:
    assert load(["--run.overwrite"]).config.run.overwrite is True
    assert load(["--run.overwrite", "--run.seed", "3"]).config.run == RunConfig(overwrite=True, seed=3)
    assert load(["--run.overwrite", "False"]).config.run.overwrite is False
    text = Option("text", "Texts.", nargs="*")
    loaded = load(["--run.debug", "stocks fall"], [text])
    assert loaded.config.run.debug is True
    assert loaded.options == {"text": ("stocks fall",)}


def test_debug_is_short_for_its_config_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for argv in (["--debug"], ["--debug=true"], ["--debug", "yes"]):
        assert load(argv) == load(["--config", "configs/debug.yaml"])
    for argv in (["--debug=false"], ["--debug", "false"], ["--debug", "--debug=false"]):
        assert load(argv) == load([])
    assert load(["--run.name", "x", "--debug"]).config.run.name == "x"


def test_all_errors_are_reported_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        "optim:\n  lrr: 3\n  lr: null\n  epochs: '3'\nmodel: 3\ndata: {source: [a], max_length: ~}\nrunn:\n  seed: 3\n",
    )
    lines = errors_of(["--config", path, "--lr", "3e-4", "--optim.schedule", "cosin", "--run.seed", "x", "--optim.epochs"])
    for value, fix in [
        ("'optim.lrr' (" + path + ", line 2)", "Did you mean 'optim.lr'?"),
        ("optim.lr 'null' (" + path + ", line 3)", "takes a number (0 or more, finite). Correct it; the default is 0.001."),
        ("optim.epochs '3' (" + path + ", line 4)", "takes a whole number (1 or more). Remove the quotes; the default is 3."),
        ("model '3' (" + path + ", line 5)", "Write for example 'optim:'"),
        ("data.source a list (" + path + ", line 6)", "takes text (not empty, a path)."),
        ("data.max_length '~' (" + path + ", line 6)", "takes a whole number (1 or more)."),
        ("'runn' (" + path + ", line 7)", "Did you mean 'run'?"),
        ("'--lr'", "Did you mean '--optim.lr'?"),
        ("--optim.schedule 'cosin'", "takes linear or cosine. Did you mean 'cosine'?"),
        ("--run.seed 'x'", "takes a whole number (0 or more, less than 4294967296). Correct it; the default is 0."),
        ("--optim.epochs without a value", "Write --optim.epochs VALUE."),
    ]:
        assert len([line for line in lines if value in line and fix in line]) == 1, (value, lines)
    assert len(lines) == 11


def test_stray_word_after_an_unknown_option_is_named_too() -> None:
    unknown, stray = errors_of(["--zzz", "--optim.lr", "3", "my.yaml"])
    assert "'--zzz'" in unknown
    assert "argument 'my.yaml'" in stray
    assert len(errors_of(["--zzz", "3", "--yyy=4", "--optim.lr", "3"])) == 2


def test_abbreviations_are_refused() -> None:
    assert "Did you mean '--optim.epochs'?" in errors_of(["--optim.epoch", "3"])[0]
    assert "Did you mean '--config'?" in errors_of(["--conf", "x.yaml"])[0]


@pytest.mark.parametrize(
    ("argv", "value", "fix"),
    [
        (["foo"], "argument 'foo'", "Write --section.field VALUE"),
        (["configs/debug.yaml"], "argument 'configs/debug.yaml'", "Write --config configs/debug.yaml"),
        (["optim.lr=3"], "argument 'optim.lr=3'", "Write --optim.lr=3"),
        (["optim.lr"], "argument 'optim.lr'", "Write --optim.lr VALUE"),
        (["--run.name", "../x"], "--run.name '../x'", "it must be a plain directory name. Use letters"),
        (["--engine.feature_cache_gigabytes", "1e308"], "--engine.feature_cache_gigabytes '1e308'", "at most"),
        (["--", "--optim.lr"], "argument '--optim.lr'", "remove it"),
        (["--debug=3"], "--debug '3'", "true or false"),
        (["--config"], "--config without a value", "Write --config VALUE"),
        (["--config="], "--config ''", "it cannot be read"),
        (["--optim", "fast"], "'--optim': a section", "Write --optim.FIELD VALUE"),
        (["--optim={lr: 1}"], "'--optim={lr: 1}': a section", "Write --optim.FIELD VALUE"),
        (["--print_config=some"], "--print_config 'some'", "it takes all or changed"),
        (["--optim.lr", "--run.seed", "1"], "--optim.lr without a value", "Write --optim.lr VALUE"),
        (["--optim.lr", "fast"], "--optim.lr 'fast'", "the default is 0.001"),
        (["--optim.lr="], "--optim.lr ''", "the default is 0.001"),
        (["--optim.lr", "null"], "--optim.lr 'null'", "the default is 0.001"),
        (["--optim.lr", "nan"], "--optim.lr 'nan'", "the default is 0.001"),
        (["--optim.epochs", "1.5"], "--optim.epochs '1.5'", "a whole number"),
        (["--optim.epochs", "3.0"], "--optim.epochs '3.0'", "a whole number"),
        (["--optim.epochs", "0"], "--optim.epochs '0'", "a whole number (1 or more)"),
        (["--data.validation_fraction", "1"], "--data.validation_fraction '1'", "a number (more than 0, less than 1)"),
        (["--optim.epochs", "true"], "--optim.epochs 'true'", "a whole number"),
        (["--data.limit_train", "few"], "--data.limit_train 'few'", "a whole number (1 or more) or null"),
        (["--run.overwrite", "maybe"], "--run.overwrite 'maybe'", "true or false"),
        (["--model.trainable_blocks", "al"], "--model.trainable_blocks 'al'", "Did you mean 'all'?"),
        (["--engine.precision", "bf61"], "--engine.precision 'bf61'", "Did you mean 'bf16'?"),
        (["--data.source", "null"], "--data.source 'null'", "takes text"),
        (["--run.dir", "$NOPE/runs"], "--run.dir '$NOPE/runs'", "the variable 'NOPE' is not set. Set it"),
        (["--data.cache_dir=~no_such_user"], "--data.cache_dir '~no_such_user'", "the user 'no_such_user' does not exist"),
        (["--config", "$NOPE.yaml"], "--config '$NOPE.yaml'", "the variable 'NOPE' is not set. Set it"),
    ],
)
def test_wrong_argument_is_named_with_a_fix(argv: list[str], value: str, fix: str) -> None:
    [line] = errors_of(argv)
    assert line.startswith(value)
    assert fix in line


def test_contradictions_are_reported_with_other_errors_unless_a_value_is_lost(tmp_path: Path) -> None:
    first, *both = errors_of(["--optim.lrr", "3", "--engine.offload", "all", "--batch.max_tokens_per_rank", "9"])
    assert first.startswith("unknown option '--optim.lrr'")
    assert [line.partition(" ")[0] for line in both] == ["batch.max_tokens_per_rank", "engine.offload", "engine.offload"]
    path = write(tmp_path / "a.yaml", "engine:\n  offload: all\n  backend: fsdp\noptim: fast\n")
    section, backend, stage = errors_of(["--config", path])
    assert section.startswith(f"optim 'fast' ({path}, line 4): a section takes settings below it.")
    assert backend.startswith(
        f"engine.offload all with engine.backend fsdp (engine.offload in {path}, line 2; engine.backend in {path}, line 3): "
    )
    assert stage.startswith(f"engine.offload all with engine.zero_stage 2 (engine.offload in {path}, line 2): ")
    path = write(tmp_path / "c.yaml", "batch: {max_tokens_per_rank: 10}")
    [size] = errors_of(["--config", path, "--batch.max_tokens_per_rank", "11"])
    assert size.startswith("batch.max_tokens_per_rank 11 is below data.max_length 256: "), "the flag counts, not the file"
    assert len(errors_of(["--batch.max_tokens_per_rank", "10", "--data.max_len", "5"])) == 1
    assert len(errors_of(["--engine.offload", "all", "--at"], [Option("--at", "Time.")])) == 3
    [unread] = errors_of(["--config", write(tmp_path / "b.yaml", "engine: ["), "--engine.offload", "all"])
    assert "b.yaml" in unread
    # max_length is unreadable, so max_tokens_per_rank is not compared with its default.
    [only] = errors_of(["--batch.max_tokens_per_rank", "128", "--data.max_length", "64k"])
    assert "--data.max_length '64k'" in only
    # Messages about other settings are reported.
    negative, unread = errors_of(["--optim.epochs", "2.5", "--model.trainable_blocks", "-1"])
    assert "--optim.epochs '2.5'" in unread
    assert negative.startswith("--model.trainable_blocks '-1': it takes a whole number (0 or more) or all.")


def test_texts_that_look_like_flags() -> None:
    options = [Option("text", "Texts.", nargs="*")]
    assert load(["-5 degrees", "--run.debug", "true", "yes"], options).options == {"text": ("-5 degrees", "yes")}
    [line] = errors_of(["-heavy"], options)
    assert "unknown option '-heavy': " in line
    assert "Correct or remove it, or write it after -- if it is a text; --help all" in line
    assert "after --" not in errors_of(["-heavy"], [])[0]
    assert load(["--", "-heavy", "--optim.lr"], options).options == {"text": ("-heavy", "--optim.lr")}


def test_long_values_are_cut_in_messages() -> None:
    for argv in (["--optim.lr", "x" * 5000], [f"--{'x' * 5000}"], ["x" * 5000], [f"--optim.epochs={'9' * 5000}x"]):
        assert all(len(line) < 200 for line in errors_of(argv))


def test_options_of_a_command() -> None:
    options = [
        Option("text", "Texts.", nargs="*"),
        Option("--file", "One text per line."),
        Option("--format", "How.", Literal["table", "jsonl"], "table"),
        Option("--top", "How many.", type=int, default=1),
    ]
    assert load([], options).options == {"text": (), "file": None, "format": "table", "top": 1}
    argv = ["a b", "--top=2", "-", "--format", "jsonl", "--optim.lr", "1", "--", "--file", "-x"]
    loaded = load(argv, options)
    assert loaded.options == {"text": ("a b", "-", "--file", "-x"), "file": None, "format": "jsonl", "top": 2}
    assert loaded.explicit == {"optim.lr"}
    format_line, top_line = errors_of(["--format", "json", "--top", "x"], options)
    assert "takes table or jsonl. Did you mean 'jsonl'? Correct it; the default is table." in format_line
    assert "takes a whole number. Correct it; the default is 1." in top_line


def test_bool_option_of_a_command_needs_no_value() -> None:
    options = [Option("--json", "Machine-readable.", type=bool, default=False), Option("--ranks", "How many.", type=int)]
    assert load([], options).options == {"json": False, "ranks": None}
    assert load(["--json", "--ranks", "8"], options).options == {"json": True, "ranks": 8}
    assert load(["--ranks=8", "--json"], options).options == {"json": True, "ranks": 8}
    assert load(["--json", "false"], options).options["json"] is False
    assert load(["--json"], [*options, Option("text", "Texts.", nargs="*")]).options["json"] is True
    [line] = errors_of(["--json", "yaml"], options)
    assert "--json 'yaml': it takes true or false. Correct it; the default is false." in line


def test_help_is_requested_whatever_else_is_wrong() -> None:
    for argv, level in (
        (["--no_such", "--help"], "basic"),
        (["-h"], "basic"),
        (["--help", "all"], "all"),
        (["--help=all"], "all"),
    ):
        with pytest.raises(HelpRequest) as request:
            load(argv)
        assert request.value.level == level


def test_help_after_two_dashes_is_a_positional_argument() -> None:
    assert load(["--", "--help"], [Option("text", "", nargs="*")]).options == {"text": ("--help",)}


def test_print_config_prints_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--optim.lr", "1e-5", "--data.limit_train", "5", "--run.name", "null", "--model.trainable_blocks", "all"]
    with pytest.raises(SystemExit) as stopped:
        load([*argv, "--print_config"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    path = write(tmp_path / "printed.yaml", shown)
    assert load(["--config", path]).config == load(argv).config
    for setting in all_settings().values():
        assert f"  # {setting.help[:40]}" in shown
    # A plain YAML parser reads the same values, nulls included.
    assert yaml.safe_load(shown) == load(argv).config.model_dump()


def test_print_config_changed_prints_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--optim.lr", "1e-5", "--optim.epochs", "3", "--run.name", "a"], []):
        with pytest.raises(SystemExit):
            load([*argv, "--print_config", "changed"])
        shown = capsys.readouterr().out
        assert yaml.safe_load(shown) == ({"optim": {"lr": 1e-5}, "run": {"name": "a"}} if argv else {})
        assert load(["--config", write(tmp_path / "printed.yaml", shown)]).config == load(argv).config


def test_print_config_reports_errors() -> None:
    assert "'optim.lrr'" in errors_of(["--optim.lrr", "1", "--print_config"])[0].replace("--", "")


def test_arguments_that_launchers_add_are_ignored() -> None:
    for added in ("--local_rank=1", "--local-rank=0"):
        assert load([added, "--optim.lr", "1e-5"]).config == load(["--optim.lr", "1e-5"]).config
    assert "--local_rank" in errors_of(["--local_rank", "1"])[0], "launchers write it with `=`"


def test_lists_are_values_of_options() -> None:
    options = [Option("--accept", "Names.", tuple[str, ...], ()), Option("--sizes", "Counts.", tuple[int, ...] | None)]
    assert load([], options).options == {"accept": (), "sizes": None}
    assert load(["--accept", "a, b,c", "--sizes=3"], options).options == {"accept": ("a", "b", "c"), "sizes": (3,)}
    assert load(["--accept", "a", "--accept=[b, c]"], options).options["accept"] == ("a", "b", "c")
    assert load(["--accept", ""], options).options["accept"] == ()
    assert load(["--sizes", "null"], options).options["sizes"] is None
    [line] = errors_of(["--sizes", "1,x"], options)
    assert line.startswith("--sizes '1,x', 'x': it takes a list a,b,... of a whole number or null.")
    [line] = errors_of(["--accept", "optim.lr,optim.lrr"], TRAINING_OPTIONS)
    assert line.startswith("--accept 'optim.lr,optim.lrr', 'optim.lrr': it takes a list a,b,... of model.dropout, optim.lr, ")
    assert line.endswith(" Did you mean 'optim.lr'? Correct it.")


def test_paths_are_expanded_and_other_texts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = write(
        tmp_path / "a.yaml", "run: {dir: ~/runs, name: $SCRATCH}\ndata: {cache_dir: '${SCRATCH}/c', source: $SCRATCH/news}"
    )
    config = load(["--config", path, "--checkpoint.resume=~", "--model.name", "~/m", "--data.revision", "~"]).config
    assert (config.run.dir, config.run.name) == ("/home/me/runs", "$SCRATCH")
    assert (config.data.cache_dir, config.data.source, config.data.revision) == ("/scratch/c", "/scratch/news", None)
    assert (config.checkpoint.resume, config.model.name) == ("/home/me", "/home/me/m")
    write(tmp_path / "$odd.yaml", "run: {seed: 7}")
    assert load(["--config", f"{tmp_path}/$$odd.yaml"]).config.run.seed == 7
    [line] = errors_of(["--config", write(tmp_path / "b.yaml", "\nrun:\n  dir: $NOPE/x\n")])
    assert line.startswith(f"run.dir '$NOPE/x' ({tmp_path / 'b.yaml'}, line 3): the variable 'NOPE' is not set. Set it")
    run = Option("run", "A run.", PathText, nargs="*")
    assert load(["~/a", "$SCRATCH/b"], [run]).options["run"] == ("/home/me/a", "/scratch/b")
    [line] = errors_of(["$NOPE/a"], [run])
    assert line.startswith("'$NOPE/a': the variable 'NOPE' is not set.")
    [line] = errors_of(["--output", "$NOPE"], [Option("--output", "Directory.", PathText)])
    assert line.startswith("--output '$NOPE': the variable 'NOPE' is not set.")
