"""`Config`: valid defaults, immutable sections, limits, and one message per contradiction with values and fix."""

import functools
import math
from typing import Any

import pytest
from pydantic import ValidationError

from agnews_dist.config.fields import all_sections, all_settings, make_config
from agnews_dist.config.schema import BatchConfig, Config, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig


def config_with(**values: Any) -> Config:
    """Return the defaults with fields changed: `config_with(optim__lr=1.0)`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return make_config(sections)


def contradictions(**values: Any) -> list[str]:
    """Return the messages about settings that contradict each other."""
    try:
        config_with(**values)
    except ValidationError as error:
        (found,) = error.errors()
        assert found["loc"] == ()
        return found["msg"].removeprefix("Value error, ").splitlines()
    return []


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


def test_sections_are_immutable_keyword_only_and_refuse_unknown_fields() -> None:
    assert len(all_sections()) == 9
    for section, (model, _) in all_sections().items():
        part = functools.reduce(getattr, section.split("."), Config())
        first = next(iter(model.model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, first, getattr(part, first))
        with pytest.raises(TypeError):
            model(getattr(part, first))
        with pytest.raises(ValidationError, match="Extra inputs"):
            model(no_such_field=1)
    with pytest.raises(ValidationError, match="frozen"):
        Config().data = DataConfig()  # pyright: ignore[reportAttributeAccessIssue]


def test_python_values_are_not_converted() -> None:
    assert OptimConfig(lr=1).lr == 1.0
    for model, values in ((OptimConfig, {"epochs": 3.0}), (OptimConfig, {"lr": "1e-3"}), (RunConfig, {"overwrite": "yes"})):
        with pytest.raises(ValidationError):
            model(**values)


def test_levels_resume_and_sweep_are_set_for_every_field() -> None:
    basic = [key for key, setting in all_settings().items() if setting.level == "basic"]
    assert 10 < len(basic) <= 25
    assert {"data.source", "model.name", "optim.lr", "run.name"} <= set(basic)
    changing = [key for key, setting in all_settings().items() if setting.sweep == "changes features"]
    # What a source has for validation and test is the same with each of them.
    data = ["data.max_length", "data.pad_token", "data.limit_train", "data.exclude"]
    blocks = ["model.trainable_blocks", "model.train_embeddings", "model.pooling"]
    assert changing == [*data, "model.name", "model.revision", "model.init", *blocks]
    for key, setting in all_settings().items():
        assert setting.help.endswith("."), key
        # Its features or its steps differ, so another value is another training.
        if setting.sweep == "free":
            assert setting.resume != "ignored", key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 0) for field in ("data__max_length", "data__limit_train", "data__limit_test", "batch__global_batch_size")),
        *((field, 0) for field in ("batch__bucket_window", "optim__epochs", "engine__timeout_seconds", "checkpoint__keep")),
        *((field, -1) for field in ("data__limit_validation", "data__seed", "run__seed", "model__trainable_blocks")),
        ("run__seed", 2**32),
        ("data__validation_fraction", 0.0),
        ("data__validation_fraction", 1.0),
        ("data__validation_fraction", math.nan),
        *(("optim__lr", value) for value in (-1e-3, math.inf, math.nan)),
        ("model__dropout", 1.0),
        ("optim__weight_decay", -0.1),
        ("optim__max_grad_norm", math.inf),
        ("optim__warmup_ratio", 1.5),
        ("optim__warmup_ratio", -0.5),
        ("engine__feature_cache_gigabytes", -1.0),
        ("checkpoint__every_minutes", 0.0),
        ("run__max_minutes", math.inf),
        ("data__source", ""),
        ("model__name", ""),
        ("checkpoint__resume", ""),
    ],
)
def test_value_out_of_range_is_refused(field: str, value: float | str) -> None:
    with pytest.raises(ValidationError) as raised:
        config_with(**{field: value})
    assert {error["loc"][0] for error in raised.value.errors()} == {field.partition("__")[2]}


def test_limits_of_each_range_are_accepted() -> None:
    Config(
        data=DataConfig(max_length=1, limit_train=1, limit_validation=1, limit_test=1, validation_fraction=0.999),
        model=ModelConfig(trainable_blocks=0),
        batch=BatchConfig(global_batch_size=1, max_tokens_per_rank=1, bucket_window=1),
        optim=OptimConfig(lr=0.0, epochs=1, weight_decay=0.0, warmup_ratio=1.0, max_grad_norm=0.0),
        engine=EngineConfig(feature_cache_gigabytes=0.0),
        run=RunConfig(seed=2**32 - 1),
    )
    config_with(model__trainable_blocks="all", optim__warmup_ratio=0.0)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    [line] = contradictions(batch__max_tokens_per_rank=255)
    assert line.startswith("batch.max_tokens_per_rank 255 is below data.max_length 256: ")
    assert "Raise the first or lower the second." in line
    assert contradictions(batch__max_tokens_per_rank=256) == []
    [line] = contradictions(batch__global_token_budget=255)
    assert line.startswith("batch.global_token_budget 255 is below data.max_length 256: ")
    assert "Raise the first or lower the second." in line
    assert contradictions(batch__global_token_budget=256, batch__bucket_window="epoch") == []


def test_all_contradictions_are_reported_at_once() -> None:
    found = contradictions(
        engine__offload="all", batch__max_tokens_per_rank=1, engine__fast_path=False, engine__feature_cache="disk"
    )
    assert [line.partition(" ")[0] for line in found] == [
        "batch.max_tokens_per_rank",
        "engine.feature_cache",
        "engine.offload",
        "engine.offload",
    ]


@pytest.mark.parametrize(("field", "value"), [("zero_stage", 3), ("offload", "optimizer"), ("deepspeed_config", "ds.json")])
@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_config_refuses_deepspeed_settings_without_deepspeed(backend: str, field: str, value: object) -> None:
    [line] = contradictions(engine__backend=backend, **{f"engine__{field}": value})
    assert line.startswith(f"engine.{field} {value} with engine.backend {backend}: it is DeepSpeed's")
    assert "Set engine.backend deepspeed, or leave it out." in line
    assert contradictions(engine__backend="deepspeed", **{f"engine__{field}": value}) == []


def test_config_allows_offloaded_weights_with_stage_3_only() -> None:
    [line] = contradictions(engine__backend="deepspeed", engine__offload="all")
    assert "engine.offload all with engine.zero_stage 2" in line
    assert "Set engine.zero_stage 3, or offload optimizer." in line
    assert contradictions(engine__backend="deepspeed", engine__offload="all", engine__zero_stage=3) == []


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_config_allows_longest_first_with_ddp_only(backend: str) -> None:
    [line] = contradictions(engine__backend=backend, batch__longest_first=True)
    assert line.startswith(f"batch.longest_first true with engine.backend {backend}: ")
    assert contradictions(batch__longest_first=True) == []


def test_config_refuses_fp16_with_fsdp() -> None:
    [line] = contradictions(engine__backend="fsdp", engine__precision="fp16")
    assert "engine.precision fp16 with engine.backend fsdp" in line
    assert "Set engine.backend deepspeed with zero_stage 3, or engine.precision fp32." in line
    assert contradictions(engine__backend="ddp", engine__precision="fp16") == []


def test_trained_embeddings_need_all_blocks() -> None:
    [line] = contradictions(model__train_embeddings=True, model__trainable_blocks=2)
    assert line.startswith("model.train_embeddings true with model.trainable_blocks 2: ")
    assert contradictions(model__train_embeddings=True, model__trainable_blocks="all") == []


def test_recipes_of_the_head_need_a_frozen_model() -> None:
    [line] = contradictions(model__standardize=True)
    assert line.startswith("model.standardize true with model.trainable_blocks 1: ")
    [line] = contradictions(optim__solver="lbfgs")
    assert line.startswith("optim.solver lbfgs with model.trainable_blocks 1: ")
    alone = {"optim__solver": "lbfgs", "model__trainable_blocks": 0}
    assert contradictions(**alone, model__standardize=True, optim__lr=0.1) == []
    lines = contradictions(**alone, optim__max_steps=5, optim__patience=2, optim__evaluate_every=3)
    assert [line.partition(" with ")[0] for line in lines] == [
        "optim.max_steps 5",
        "optim.evaluate_every 3",
        "optim.patience 2",
    ]
    [line] = contradictions(**alone, engine__backend="fsdp")
    assert line.startswith("engine.backend fsdp with optim.solver lbfgs: ")
    lines = contradictions(**alone, batch__longest_first=True)
    assert lines == ["batch.longest_first true with optim.solver lbfgs: it has no steps to try. Leave it out."]


def test_freeze_schedule_begins_with_all_blocks_and_never_rises() -> None:
    assert contradictions(model__trainable_blocks=3, model__freeze_schedule=(3, 3, 1, 0)) == []
    [line] = contradictions(model__freeze_schedule=(2, 1))
    assert line.startswith("model.freeze_schedule 2,1 with model.trainable_blocks 1: ")
    assert line.endswith("Set model.trainable_blocks 2.")
    [line] = contradictions(model__trainable_blocks="all", model__freeze_schedule=(12, 1))
    assert line.startswith("model.freeze_schedule 12,1 with model.trainable_blocks all: ")
    [line] = contradictions(model__trainable_blocks="all", model__train_embeddings=True, model__freeze_schedule=(4, 1))
    assert line.startswith("model.freeze_schedule 4,1 with model.train_embeddings true: ")
    [line] = contradictions(model__trainable_blocks=2, model__freeze_schedule=(2, 1, 2))
    assert line.startswith("model.freeze_schedule 2,1,2: a frozen block stays frozen.")
    for numbers, epochs in (((2,), 3), ((2, 2), 3), ((2, 2, 1), 2)):
        [line] = contradictions(model__trainable_blocks=2, model__freeze_schedule=numbers, optim__epochs=epochs)
        assert f" with optim.epochs {epochs}: it freezes nothing." in line
    for backend in ("fsdp", "deepspeed"):
        [line] = contradictions(model__trainable_blocks=2, model__freeze_schedule=(2, 1), engine__backend=backend)
        assert line.startswith(f"model.freeze_schedule 2,1 with engine.backend {backend}: ")
