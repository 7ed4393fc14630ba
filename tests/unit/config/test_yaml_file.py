"""YAML files: shipped ones, wrong ones, and the meaning of their values."""

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from support.processes import REPOSITORY
from support.settings import errors_of, write

from agnews_dist.commands.arguments import load
from agnews_dist.commands.print_schema import json_schema
from agnews_dist.config.schema import CheckpointConfig, Config, RunConfig
from agnews_dist.config.yaml_file import SHIPPED

CONFIGS = REPOSITORY / "configs"


def test_quoted_yaml_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "run: {name: 'null'}\ndata: {revision: \"1\", pad_token: 'eos'}")
    config = load(["--config", path]).config
    assert (config.run.name, config.data.revision, config.data.pad_token) == ("null", "1", "eos")


def test_shipped_configs_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(["--debug"]).config.run.debug is True
    assert load(["--config", "debug.yaml"]).config.run.debug is True
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "debug.yaml", "run: {name: mine}")
    assert load(["--debug"]).config == Config(run=RunConfig(name="mine"))


@pytest.mark.slow
def test_installed_wheel_finds_shipped_configs_by_name(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    build = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run([sys.executable, *build], cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in (*SHIPPED, "configs/debug.yaml"):
        command = [sys.executable, "-m", "agnews_dist", "train", "--config", name, "--print_config", "changed"]
        environ = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
        shipped = yaml.safe_load((CONFIGS / Path(name).name).read_text(encoding="utf-8"))
        assert yaml.safe_load(done.stdout) == shipped, name


def test_mistyped_path_is_not_replaced_by_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [line] = errors_of(["--config", "experiments/debug.yaml"])
    assert "'experiments/debug.yaml'" in line


@pytest.mark.parametrize(
    ("text", "value", "fix"),
    [
        (b"- a\n", "holds a list", "Write for example 'optim:'"),
        (b"just words\n", "holds 'just words'", "Write for example 'optim:'"),
        (b"optim:\n  - lr\n", "optim a list", "Write for example 'optim:'"),
        (b"optim: 'lr: 3'\n", "optim 'lr: 3'", "Write for example 'optim:'"),
        (b"optim:\n  epochs: 3.0\n", "optim.epochs '3.0'", "takes a whole number (1 or more)"),
        (b"optim:\n  lr: '1e-3'\n", "optim.lr '1e-3'", "Remove the quotes; the default is 0.001."),
        (b"run:\n  debug: maybe\n", "run.debug 'maybe'", "takes true or false"),
        (b"optim:\n  lr: -1\n", "optim.lr '-1'", "takes a number (0 or more, finite)"),
        (b"optim: &a\n  lr: 1\n", "line 1, has an anchor", "Write the value itself"),
        (b"optim: ''\n", "optim ''", "Write for example 'optim:'"),
        (b"optim:\n  lr: '" + b"x" * 5000 + b"'\n", "xxx'... (", "Remove the quotes"),
        (b'data:\n  cache_dir: "a\\0b"\n', "data.cache_dir 'a\\x00b'", "a path has no NUL character"),
        (b"run:\n  name: !!python/name:os.system\n", "line 2, has a tag", "Write the value itself"),
        (b"a: " + b"[" * 5000, "is nested too deeply", "Write for example 'optim:'"),
        (b"#" * 5_000_000, "larger than 100 kB", "Give a file of settings"),
        (b"optim: {lr: 1\nrun: [", "line 2", "Correct the file"),
        (b"run:\n  seed: 1\n\tname: x\n", "line 3", "Correct the file"),
        (b"run: {seed: 1}\n---\nrun: {seed: 2}\n", "line 2", "Correct the file"),
        (b"run: {name: \x00}\n", "line 1, is not valid YAML (special characters", "Correct the file"),
        (b"run: {name: caf\xe9}\n", "byte 15 (line 1) is not UTF-8", "Save the file as UTF-8"),
        ("run: {seed: 1}".encode("utf-16"), "(line 1) is not UTF-8", "Save the file as UTF-8"),
        (b"run:\n  seed: 1\n  seed: 2\n", "run.seed twice", "lines 2 and 3"),
        (b"run: {seed: 1}\noptim: {lr: 1}\nrun: {name: x}\n", "run twice", "lines 1 and 3"),
        (b"run: {seed: 1}\nrun.seed: 2\n", "run.seed twice", "lines 1 and 2"),
        (b"run: null\n", "run 'null'", "Write for example 'optim:'"),
        (b"? [a]\n: 1\n", "a list as a key", "Write for example 'optim:'"),
        (b"run: {seed: {a: 1}}\n", "run.seed a mapping", "takes a whole number"),
        (b"data: {source: }\n", "data.source null", "takes text"),
        (b"lr: 3\n", "unknown key 'lr'", "Did you mean 'optim.lr'?"),
        (b"1: 3\n", "unknown key '1'", "--help all lists"),
    ],
)
def test_wrong_file_is_named_with_line_and_fix(tmp_path: Path, text: bytes, value: str, fix: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    [line] = errors_of(["--config", str(path)])
    assert str(path) in line
    assert value in line
    assert fix in line


def test_tags_build_nothing_and_every_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "run: !!python/object/apply:os.system ['touch made']\nbatch: &a {}\noptim: *a\n"
    lines = errors_of(["--config", write(tmp_path / "a.yaml", text)])
    assert [line.partition(": ")[0] for line in lines] == [
        f"{tmp_path / 'a.yaml'}, line {n}, has {what}" for n, what in ((1, "a tag"), (2, "an anchor"), (3, "an alias"))
    ]
    assert not (tmp_path / "made").exists()


def test_config_of_the_version_before_still_loads() -> None:
    path = Path(__file__).with_name("config-0.1.yaml")
    loaded = load(["--config", str(path)])
    before = CheckpointConfig(every_minutes=5.0)
    assert loaded.config == Config(checkpoint=before), "only this default has changed"
    assert len(loaded.explicit) == 50


def test_shipped_configs_name_the_schema_that_the_program_prints() -> None:
    schema = json.loads((CONFIGS / "settings.schema.json").read_text(encoding="utf-8"))
    assert schema == json_schema(), "write it again with: make docs"
    for name in SHIPPED:
        lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
        assert "# yaml-language-server: $schema=settings.schema.json" in lines, name


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    [missing] = errors_of(["--config", "configs/debgu.yaml"])
    assert "Did you mean 'configs/debug.yaml'?" in missing
    [directory] = errors_of(["--config", str(tmp_path)])
    assert f"{str(tmp_path)!r}: it cannot be read (Is a directory)" in directory


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}\n", "optim:\nrun:\n", "\ufeff{}\n"])
def test_file_without_values_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load(["--config", write(tmp_path / "a.yaml", text)]) == load([])


def test_shipped_configs_name_their_command_and_repeat_no_default() -> None:
    found = sorted(CONFIGS.glob("*.yaml"))
    assert [path.name for path in found] == list(SHIPPED)
    assert len(found) == 6
    for path in found:
        loaded = load(["--config", str(path)])
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
    assert load(["--config", str(CONFIGS / "gpt2_ddp.yaml")]) == load([])
    debug = load(["--config", str(CONFIGS / "debug.yaml")]).config
    assert (debug.run.debug, debug.model.name, debug.data.source) == (True, "embedded", "synthetic")
    quickstart = load(["--config", str(CONFIGS / "quickstart.yaml")]).config
    assert (quickstart.model.name, quickstart.data.source, quickstart.data.limit_train) == ("embedded", "synthetic", 2000)
