"""`Config`: valid defaults, immutable sections, and one message per broken rule with value and fix."""

import dataclasses
import math
import typing
from typing import Any

import pytest

from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, validate


def config_with(**values: Any) -> Config:
    """Return the defaults with fields changed: `config_with(optim__lr=1.0)`."""
    config = Config()
    for key, value in values.items():
        section, _, name = key.partition("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def test_validate_accepts_the_defaults() -> None:
    assert validate(Config()) == []


def test_config_has_the_documented_settings() -> None:
    public = {
        "data": ["source", "revision", "max_length", "pad_token", "limit_train", "limit_validation", "limit_test", "cache_dir"],
        "model": ["name", "revision", "init", "trainable_blocks"],
        "batch": ["global_batch_size", "global_token_budget", "max_tokens_per_rank", "bucket_window"],
        "optim": ["lr", "epochs", "weight_decay", "warmup_ratio", "schedule", "max_grad_norm"],
        "engine": ["precision", "allow_tf32", "timeout_seconds"],
        "run": ["dir", "name", "seed", "overwrite"],
    }
    names = {f"{section}.{field}" for section, fields in public.items() for field in fields}
    assert len(names) == 29
    assert names <= set(all_settings())


def test_config_defaults_to_gpt2_and_ag_news() -> None:
    config = Config()
    assert (config.model.name, config.data.source) == ("gpt2", "fancyzhx/ag_news")
    assert (config.model.trainable_blocks, config.data.pad_token, config.model.init) == (1, "new", "pretrained")


def test_config_is_immutable_and_keyword_only() -> None:
    hints = typing.get_type_hints(Config)
    assert len(hints) == 7
    for section, cls in hints.items():
        part = getattr(Config(), section)
        first = dataclasses.fields(cls)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, first, getattr(part, first))
        with pytest.raises(TypeError):
            cls(getattr(part, first))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data = DataConfig()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("data__max_length", 0, "Set it to 1 or more."),
        ("data__limit_train", 0, "Set it to 1 or more."),
        ("data__limit_validation", -3, "Set it to 1 or more."),
        ("data__limit_test", 0, "Set it to 1 or more."),
        ("data__seed", -1, "Set it to 0 or more."),
        ("batch__global_batch_size", 0, "Set it to 1 or more."),
        ("batch__bucket_window", 0, "Set it to 1 or more."),
        ("optim__epochs", 0, "Set it to 1 or more."),
        ("engine__timeout_seconds", 0, "Set it to 1 or more."),
        ("run__seed", -1, "Set it to 0 or more."),
        ("data__validation_fraction", 0.0, "Set it between 0 and 1"),
        ("data__validation_fraction", 1.0, "Set it between 0 and 1"),
        ("model__trainable_blocks", -1, "Set 0 (final norm and head only), a count, or all."),
        ("optim__lr", -1e-3, "Set it to 0 or more."),
        ("optim__lr", math.inf, "Set it to 0 or more."),
        ("optim__lr", math.nan, "Set it to 0 or more."),
        ("optim__weight_decay", -0.1, "Set it to 0 or more."),
        ("optim__max_grad_norm", math.inf, "Set it to 0 or more."),
        ("optim__warmup_ratio", 1.5, "Set it between 0 and 1."),
        ("optim__warmup_ratio", -0.5, "Set it between 0 and 1."),
    ],
)
def test_validate_names_a_value_out_of_range(field: str, value: float, fix: str) -> None:
    [line] = validate(config_with(**{field: value}))
    assert line.startswith(f"{field.replace('__', '.')} {value}: ")
    assert fix in line


def test_validate_names_a_seed_too_large_for_torch() -> None:
    [line] = validate(config_with(run__seed=2**32))
    assert line == "run.seed 4294967296: too large. Set it to 4294967295 or less."
    assert validate(config_with(run__seed=2**32 - 1)) == []


def test_validate_accepts_the_limits_of_each_range() -> None:
    config = Config(
        data=DataConfig(max_length=1, limit_train=1, limit_validation=1, limit_test=1, validation_fraction=0.999),
        model=ModelConfig(trainable_blocks=0),
        batch=BatchConfig(global_batch_size=1, max_tokens_per_rank=1, bucket_window=1),
        optim=OptimConfig(lr=0.0, epochs=1, weight_decay=0.0, warmup_ratio=1.0, max_grad_norm=0.0),
    )
    assert validate(config) == []
    assert validate(config_with(model__trainable_blocks="all", optim__warmup_ratio=0.0)) == []


def test_validate_names_sizes_that_contradict_each_other() -> None:
    [line] = validate(config_with(batch__max_tokens_per_rank=255))
    assert line.startswith("batch.max_tokens_per_rank 255 is below data.max_length 256: ")
    assert "Raise the first or lower the second." in line
    assert validate(config_with(batch__max_tokens_per_rank=256)) == []
    [line] = validate(config_with(batch__global_token_budget=255))
    assert line.startswith("batch.global_token_budget 255 is below data.max_length 256: ")
    assert "Raise the first or lower the second." in line
    assert validate(config_with(batch__global_token_budget=256, batch__bucket_window="epoch")) == []


@pytest.mark.parametrize("field", ["data__source", "model__name"])
def test_validate_names_an_empty_source_or_model(field: str) -> None:
    [line] = validate(config_with(**{field: ""}))
    assert line.startswith(f"{field.replace('__', '.')} is empty: ")
    assert "Set a hub id, a path, or " in line


def test_validate_returns_all_messages_at_once() -> None:
    assert len(validate(config_with(optim__lr=-1.0, optim__epochs=0, run__seed=-1, data__validation_fraction=2.0))) == 4


@pytest.mark.parametrize(("field", "value"), [("zero_stage", 3), ("offload", "optimizer"), ("deepspeed_config", "ds.json")])
@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_validate_refuses_deepspeed_settings_without_deepspeed(backend: str, field: str, value: object) -> None:
    [line] = validate(config_with(engine__backend=backend, **{f"engine__{field}": value}))
    assert line.startswith(f"engine.{field} {value} with engine.backend {backend}: it is a setting of DeepSpeed")
    assert "Set engine.backend deepspeed, or leave it out." in line
    assert validate(config_with(engine__backend="deepspeed", **{f"engine__{field}": value})) == []


def test_validate_allows_offloaded_weights_with_stage_3_only() -> None:
    config = config_with(engine__backend="deepspeed", engine__offload="all")
    [line] = validate(config)
    assert "engine.offload all with engine.zero_stage 2" in line
    assert "Set engine.zero_stage 3, or engine.offload optimizer." in line
    assert validate(config_with(engine__backend="deepspeed", engine__offload="all", engine__zero_stage=3)) == []


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_validate_allows_longest_first_with_ddp_only(backend: str) -> None:
    [line] = validate(config_with(engine__backend=backend, batch__longest_first=True))
    assert line.startswith(f"batch.longest_first with engine.backend {backend}: ")
    assert validate(config_with(batch__longest_first=True)) == []


def test_validate_refuses_fp16_with_fsdp() -> None:
    [line] = validate(config_with(engine__backend="fsdp", engine__precision="fp16"))
    assert "engine.precision fp16 with engine.backend fsdp" in line
    assert "Set engine.backend deepspeed with zero_stage 3, or engine.precision fp32." in line
    assert validate(config_with(engine__backend="ddp", engine__precision="fp16")) == []
