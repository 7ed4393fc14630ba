"""config: defaults are sound, nothing can be changed, every contradiction is named with value and remedy."""

import dataclasses
import math
import typing
from typing import Any

import pytest

from agnews_dist.config.fields import all_settings
from agnews_dist.config.schema import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, validate


def changed(**values: Any) -> Config:
    """The defaults with fields changed: `changed(optim__lr=1.0)`."""
    config = Config()
    for key, value in values.items():
        section, _, name = key.partition("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def test_defaults_contradict_nothing() -> None:
    assert validate(Config()) == []


def test_the_public_names_are_there() -> None:
    public = {
        "data": [
            "source",
            "revision",
            "max_length",
            "pad_token",
            "limit_train",
            "limit_validation",
            "limit_test",
            "cache_dir",
        ],
        "model": ["name", "revision", "init", "trainable_blocks"],
        "batch": ["global_batch_size", "global_token_budget", "max_tokens_per_rank", "bucket_window"],
        "optim": ["lr", "epochs", "weight_decay", "warmup_ratio", "schedule", "max_grad_norm"],
        "engine": ["precision", "allow_tf32", "timeout_seconds"],
        "run": ["dir", "name", "seed", "overwrite"],
    }
    names = {f"{section}.{field}" for section, fields in public.items() for field in fields}
    assert len(names) == 29
    assert names <= set(all_settings())


def test_zero_arguments_are_gpt2_and_ag_news_from_the_hub() -> None:
    config = Config()
    assert (config.model.name, config.data.source) == ("gpt2", "fancyzhx/ag_news")
    assert (config.model.trainable_blocks, config.data.pad_token, config.model.init) == (1, "new", "pretrained")


def test_nothing_can_be_changed_and_nothing_is_positional() -> None:
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
    ("field", "value", "remedy"),
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
        ("optim__lr", -1e-3, "Set a finite number of at least 0."),
        ("optim__lr", math.inf, "Set a finite number of at least 0."),
        ("optim__lr", math.nan, "Set a finite number of at least 0."),
        ("optim__weight_decay", -0.1, "Set a finite number of at least 0."),
        ("optim__max_grad_norm", math.inf, "Set a finite number of at least 0."),
        ("optim__warmup_ratio", 1.5, "Set it between 0 and 1."),
        ("optim__warmup_ratio", -0.5, "Set it between 0 and 1."),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: float, remedy: str) -> None:
    [line] = validate(changed(**{field: value}))
    assert line.startswith(f"{field.replace('__', '.')} {value}: ")
    assert remedy in line


def test_a_seed_too_large_for_torch_is_named() -> None:
    [line] = validate(changed(run__seed=2**32))
    assert line.startswith("run.seed 4294967296 is above 4294967295: ")
    assert "Set a smaller one." in line
    assert validate(changed(run__seed=2**32 - 1)) == []


def test_the_last_values_in_range_are_taken() -> None:
    config = Config(
        data=DataConfig(max_length=1, limit_train=1, limit_validation=1, limit_test=1, validation_fraction=0.999),
        model=ModelConfig(trainable_blocks=0),
        batch=BatchConfig(global_batch_size=1, max_tokens_per_rank=1, bucket_window=1),
        optim=OptimConfig(lr=0.0, epochs=1, weight_decay=0.0, warmup_ratio=1.0, max_grad_norm=0.0),
    )
    assert validate(config) == []
    assert validate(changed(model__trainable_blocks="all", optim__warmup_ratio=0.0)) == []


def test_fields_that_exclude_each_other() -> None:
    [line] = validate(changed(batch__max_tokens_per_rank=255))
    assert line.startswith("batch.max_tokens_per_rank 255 is below data.max_length 256: ")
    assert "Raise the first or lower the second." in line
    assert validate(changed(batch__max_tokens_per_rank=256)) == []
    [line] = validate(changed(batch__global_token_budget=255))
    assert line.startswith("batch.global_token_budget 255 is below data.max_length 256: ")
    assert "Raise the first or lower the second." in line
    assert validate(changed(batch__global_token_budget=256, batch__bucket_window="epoch")) == []


@pytest.mark.parametrize("field", ["data__source", "model__name"])
def test_an_empty_place_is_named(field: str) -> None:
    [line] = validate(changed(**{field: ""}))
    assert "data.source or model.name is empty: " in line
    assert "Give a hub id, a path, or synthetic / embedded." in line


def test_all_contradictions_at_once() -> None:
    assert len(validate(changed(optim__lr=-1.0, optim__epochs=0, run__seed=-1, data__validation_fraction=2.0))) == 4


@pytest.mark.parametrize(
    ("field", "value"), [("zero_stage", 3), ("offload", "optimizer"), ("deepspeed_config", "ds.json")]
)
@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_what_only_deepspeed_knows(backend: str, field: str, value: object) -> None:
    [line] = validate(changed(engine__backend=backend, **{f"engine__{field}": value}))
    assert line.startswith(f"engine.{field} {value} with engine.backend {backend}: only DeepSpeed knows it")
    assert "Set engine.backend deepspeed, or leave it out." in line
    assert validate(changed(engine__backend="deepspeed", **{f"engine__{field}": value})) == []


def test_weights_are_offloaded_by_stage_3_alone() -> None:
    config = changed(engine__backend="deepspeed", engine__offload="all")
    [line] = validate(config)
    assert "engine.offload all with engine.zero_stage 2" in line
    assert "Set engine.zero_stage 3, or engine.offload optimizer." in line
    assert validate(changed(engine__backend="deepspeed", engine__offload="all", engine__zero_stage=3)) == []


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_the_rehearsal_is_for_ddp(backend: str) -> None:
    [line] = validate(changed(engine__backend=backend, batch__longest_first=True))
    assert line.startswith(f"batch.longest_first with engine.backend {backend}: ")
    assert validate(changed(batch__longest_first=True)) == []


def test_half_precision_is_scaled_on_whole_gradients() -> None:
    [line] = validate(changed(engine__backend="fsdp", engine__precision="fp16"))
    assert "engine.precision fp16 with engine.backend fsdp" in line
    assert "Set engine.backend deepspeed with zero_stage 3, or engine.precision fp32." in line
    assert validate(changed(engine__backend="ddp", engine__precision="fp16")) == []
