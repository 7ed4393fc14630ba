"""Values and names of settings: the same rules in YAML and on the command line."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.settings import errors_of, write

from agnews_dist.config.command_line import Option, dump, load
from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import BatchConfig, Config, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig


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


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    members = get_args(type_) or (type_,)
    choices: list[st.SearchStrategy[Any]] = []
    for member in members:
        if member is str:
            choices.append(st.text(st.characters(codec="utf-8")) | st.sampled_from(["null", "~", "", "1e-4", "- x", "a\nb"]))
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


@pytest.mark.slow
@settings(max_examples=50)
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
