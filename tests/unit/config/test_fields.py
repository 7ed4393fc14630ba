"""Values and names of settings: the same rules in YAML and on the command line."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.settings import errors_of, write

from agnews_dist.commands.arguments import Option, load
from agnews_dist.config.fields import (
    LIMITS,
    Quoted,
    all_settings,
    choices_of,
    convert,
    describe_type,
    format_value,
    is_path,
    make_config,
    split_type,
)
from agnews_dist.config.schema import Config, PathText
from agnews_dist.config.yaml_file import dump
from agnews_dist.storage.directories import check_directory_name


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
        got = getattr(getattr(load(argv).config, section), name)
        assert got == value, argv
        assert type(got) is type(value), argv


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
        ("--debgu", "'--debug' or '--run.debug'"),
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


def texts_of(type_: Any) -> st.SearchStrategy[Any]:
    """Values that the type admits, drawn from its own description."""
    strategies: list[st.SearchStrategy[Any]] = []
    for member, limits in split_type(type_):
        bounds = {
            name: getattr(limit, name)
            for limit in limits
            for name in ("ge", "gt", "le", "lt", "min_length")
            if hasattr(limit, name)
        }
        low, high = bounds.get("ge", bounds.get("gt", 0)), bounds.get("le", bounds.get("lt", 10**6))
        if member is int:
            strategies.append(st.integers(low, high - ("lt" in bounds)))
        elif member is float:
            strategies.append(st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds))
        elif get_origin(member) is tuple:
            least = max((limit.min_length for limit in limits if hasattr(limit, "min_length")), default=0)
            strategies.append(st.lists(texts_of(get_args(member)[0]), min_size=least).map(tuple))
        elif any(getattr(limit, "func", None) is check_directory_name for limit in limits):
            strategies.append(st.sampled_from(["null", "1e-4", "- x", "a$b", "true", "007", "~", "a: b", "#x"]))
        elif member is str:
            texts = st.text(st.characters(codec="utf-8"), min_size=1) | st.sampled_from(
                ["null", "1e-4", "- x", "a\nb", "a$b", "true"]
            )
            paths = texts.map(lambda text: f"./{text}".replace("\0", ""))
            strategies.append(paths if is_path(type_) else texts)
        elif member is bool:
            strategies.append(st.booleans())
        elif member is type(None):
            strategies.append(st.none())
        else:
            strategies.append(st.sampled_from(get_args(member)))
    return st.one_of(strategies)


def without_contradictions(sections: dict[str, dict[str, Any]]) -> Config:
    """Build the configuration; settings that contradict others get their defaults."""
    while True:
        try:
            return make_config(sections)
        except ValidationError as error:
            (found,) = error.errors()
            assert found["loc"] == (), found
            removed = [
                key
                for key in all_settings()
                if key in found["msg"] and sections[key.rpartition(".")[0]].pop(key.rpartition(".")[2], 0)
            ]
            assert removed, found


def escape(value: Any) -> Any:
    """Write a path, or each path of a list, without a variable in it."""
    if isinstance(value, tuple):
        return tuple(map(escape, value))
    return value.replace("$", "$$") if isinstance(value, str) else value


@pytest.mark.slow
@settings(max_examples=50)
@given(st.data())
def test_any_config_is_the_same_printed_and_read_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for key, setting in all_settings().items():
        value = data.draw(texts_of(setting.type), label=key)
        written = escape(value) if is_path(setting.type) else value
        sections.setdefault(setting.section, {})[setting.name] = written
    config = without_contradictions(sections)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    for only_changed in (False, True):
        path.write_text(dump(config, only_changed=only_changed), encoding="utf-8", newline="")
        loaded = load(["--config", str(path)])
        assert loaded.config == config
        assert (len(loaded.explicit) == len(all_settings())) != only_changed


WRONG = {
    int: {"x", "1.5", "3.0", "1e3", "true", "'3'", '"3"', "[1]", "{a: 1}", "nan", "''", "0x"},
    float: {"x", "true", "'1'", "[1]", "{a: 1}", "nan", "inf", "1e999", "''", "1,5"},
    bool: {"x", "2", "1", "'true'", "[true]", "{a: 1}", "t", "''"},
    str: {"[1]", "{a: 1}", "[]", "{}"},
    tuple: {"{a: 1}", "[{a: 1}]", "[[1]]", "{}"},
    Literal: {"x", "[1]", "{a: 1}", "[[1]]", "{}", "''", "true", "nan", "9"},
}
"""Member of a type -> YAML that it does not admit."""


def wrong_texts(type_: Any) -> list[str]:
    """YAML values that no member of the type admits, or that are out of its limits."""
    members = [member for member, _ in split_type(type_)]
    wrong = set.intersection(*(WRONG[get_origin(each) or each] for each in members if each is not type(None)))
    wrong |= set() if type(None) in members else {"null", "~"}
    limits = {
        name: getattr(limit, name)
        for _, found in split_type(type_)
        for limit in found
        for name in LIMITS
        if hasattr(limit, name)
    }
    outside = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
    return sorted(wrong | {str(value + outside[name]) if name in outside else "''" for name, value in limits.items()})


@pytest.mark.parametrize("key", all_settings())
def test_any_wrong_value_is_named_with_its_place(tmp_path: Path, key: str) -> None:
    setting = all_settings()[key]
    texts = wrong_texts(setting.type)
    assert len(texts) >= 4
    for text in texts:
        path = write(tmp_path / "a.yaml", f"# one\n\n{key}: {text}\n")
        [line] = errors_of(["--config", path])
        assert line.startswith(f"{key} ")
        assert re.search(rf"\({re.escape(str(path))}, line 3\)(, .+)?: it takes ", line)
        assert line.endswith(f"; the default is {format_value(setting.default)}.")
        if text[0] not in "[{'\"~":
            [line] = errors_of([f"--{key}={text}"])
            assert line.startswith(f"--{key} {text!r}: it takes ")


def test_a_path_that_is_not_utf8_is_named() -> None:
    [line] = errors_of(["--data.source", "a\udcff.csv"])
    assert re.fullmatch(r"--data.source 'a\\udcff.csv': not UTF-8. Rename the file.", line)


def test_types_are_described_in_plain_words() -> None:
    assert describe_type(int | None) == "a whole number or null"
    assert describe_type(tuple[int, ...]) == "a list a,b,... of a whole number"
    assert describe_type(all_settings()["model.trainable_blocks"].type) == "a whole number (0 or more) or all"
    assert describe_type(all_settings()["optim.warmup_ratio"].type) == "a number (0 or more, at most 1)"


def test_lists_of_paths_and_choices() -> None:
    assert is_path(tuple[PathText, ...] | None)
    assert not is_path(tuple[str, ...])
    written = format_value(("$a", "b"), escape=True)
    assert convert(tuple[str, ...], yaml.safe_load(written)) == ("$$a", "b")
    assert choices_of(tuple[Literal["a", "b"], ...]) == ["a", "b"]
    assert describe_type(tuple[Literal["a", "b"], ...] | None) == "a list a,b,... of a or b or null"


def test_lists_in_yaml_and_on_the_command_line_are_tuples() -> None:
    for value in (["a", "b"], "a,b", "a , b"):
        assert convert(tuple[str, ...], value) == ("a", "b")
    assert convert(tuple[int, ...] | None, ["1", "2"]) == (1, 2)
    assert convert(tuple[str, ...], []) == ()
    assert format_value(("a", "b, c")) == "[a, 'b, c']"
    for wrong in (None, {}, ["1", ["2"]], [Quoted("1")], "1,,2", "1,", ","):
        with pytest.raises((ValueError, TypeError)):
            convert(tuple[int, ...], wrong)
