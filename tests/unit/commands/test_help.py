"""`--help`: short and complete enough at 80 columns; `--help all` explains every setting."""

import importlib
import re

import pytest

from agnews_dist.__main__ import COMMANDS, MODULES
from agnews_dist.commands.arguments import Command, Option
from agnews_dist.commands.help import format_help
from agnews_dist.config.fields import all_settings, format_value

NAMES = list(COMMANDS)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def command_of(name: str) -> Command:
    return importlib.import_module(MODULES[name]).COMMAND


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_on_a_page_with_sentences_examples_and_basic_settings(name: str) -> None:
    command = command_of(name)
    shown = format_help(command)
    lines = shown.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: agnews-dist {name} ")
    assert command.name == name
    assert len(re.findall(r"[.] (?=[A-Z])|[.]$", command.summary)) == 2
    assert len(command.examples) == 3
    assert shown.index(command.examples[0]) < shown.index("options:")
    assert all(f"--{word}" in shown for word in ("config", "debug", "print_config", "help"))
    for key in all_settings():
        assert bool(re.search(rf"  --{key}\s", shown)) == command.shows(key), key


def test_training_shows_the_basic_settings() -> None:
    basic = [key for key, setting in all_settings().items() if setting.level == "basic"]
    assert [key for key in all_settings() if command_of("train").shows(key)] == basic
    assert not any(command_of("schema").shows(key) for key in all_settings())
    assert command_of("cache").shows("data.cache_dir")


def test_help_all_explains_every_setting_with_values_and_default() -> None:
    options = (Option("text", "Texts, 100% yours.", nargs="*"), Option("--file", "One per line."))
    shown = "".join(format_help(Command("predict", "Classify.", (), options), everything=True).split())
    assert len(all_settings()) > 30
    for key, setting in all_settings().items():
        assert f"--{key}" in shown
        text = "".join(setting.help.split()) + "Ittakes"
        assert text in shown, key
        if setting.default not in (None, False) or (setting.default == 0.0 and setting.default is not False):
            after = shown[shown.index(text) :].split(".[", 1)[1]
            assert after.startswith("".join(format_value(setting.default).split()) + "]"), key
    for words in ("[TEXT ...]", "100% yours", "--file TEXT", "--optim.schedule linear|cosine", "--engine.fast_path true|false"):
        assert words.replace(" ", "") in shown


def test_passed_on_options_are_in_the_long_help_only() -> None:
    assert "--profile" not in format_help(command_of("doctor"))
    assert "--profile" in format_help(command_of("doctor"), everything=True)
    assert "--profile" in format_help(command_of("train"))


def test_defaults_are_shown_unless_a_saved_model_has_them() -> None:
    shown = format_help(command_of("train"))
    for words in ("Peak learning rate [0.001]", "Seed of weights, batches and dropout [0]", "--model.trainable_blocks INT|all"):
        assert words in shown
    assert "[3]" in format_help(command_of("restarts"))
    assert "[256]" not in format_help(command_of("predict"))
    assert "[gpt2]" not in format_help(command_of("evaluate"))
