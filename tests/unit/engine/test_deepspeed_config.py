"""DeepSpeed's configuration: our decisions hold, the user's own settings stay, contradictions are errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from agnews_dist.engine.deepspeed_config import (
    LARGEST_BUCKET,
    REFUSED_SECTIONS,
    ZeroOptions,
    build_deepspeed_config,
    read_deepspeed_file,
)
from agnews_dist.errors import ConfigError


def build(zero: ZeroOptions, **changed: Any) -> dict[str, Any]:
    arguments = {"num_ranks": 8, "num_parameters": 7_090_000, "max_grad_norm": 1.0, "compress_gradients": False}
    return build_deepspeed_config(zero, **{**arguments, "pin_memory": True, **changed})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_settings_decide(stage) -> None:
    config = build(ZeroOptions(stage))
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 1)
    assert config["gradient_accumulation_steps"] == 1, "DeepSpeed would divide the loss by it"
    assert config["gradient_clipping"] == 1.0
    assert config["communication_data_type"] == "fp32"
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & config.keys()
    assert "offload_optimizer" not in config["zero_optimization"]
    assert config["zero_optimization"]["reduce_bucket_size"] == 7_090_000, "no larger than the trainable part"
    assert build(ZeroOptions(stage), num_parameters=10**9)["zero_optimization"]["reduce_bucket_size"] == LARGEST_BUCKET


def test_no_clipping_is_written_explicitly() -> None:
    """Check the value 0: without the key accelerate clips at 1.0."""
    assert build(ZeroOptions(2), max_grad_norm=0.0)["gradient_clipping"] == 0.0


def test_offloading_and_compression() -> None:
    optimizer, everything = (build(ZeroOptions(3, offload))["zero_optimization"] for offload in ("optimizer", "all"))
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in optimizer
    assert everything["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert build(ZeroOptions(3, "all"))["zero_force_ds_cpu_optimizer"] is False, "torch's AdamW runs on the host"
    assert build(ZeroOptions(2), compress_gradients=True)["communication_data_type"] == "bf16"


def test_user_settings_are_kept_and_override_sizes() -> None:
    own = {
        "wall_clock_breakdown": True,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5, "overlap_comm": False, "round_robin_gradients": True},
    }
    before = json.dumps(own)
    config = build(ZeroOptions(2, settings=own))
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_clipping"] == 1.0
    assert {key: config["zero_optimization"][key] for key in own["zero_optimization"]} == own["zero_optimization"]  # type: ignore[index]
    assert config["zero_optimization"]["allgather_bucket_size"] == 7_090_000
    assert not {"bf16", "fp16"} & config.keys()
    assert json.dumps(own) == before, "the user's dictionary is not changed"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage 3 against 2 \(engine.zero_stage\)"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping 0.5 against 1.0 \(optim.max_grad_norm\)"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps 4 against 1 \(batch.\*\)"),
        ({"train_batch_size": 32}, r"train_batch_size 32 against 8 \(batch.\*\)"),
        ({"communication_data_type": "fp16"}, r"communication_data_type fp16 against fp32 \(engine.gradient_compression\)"),
        ({"optimizer": {"type": "OneBitAdam", "params": {}}}, r"optimizer \(the optimizer is AdamW from optim.\*\)"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler \(the learning rate is optim.schedule\)"),
        ({"bf16": {"enabled": True}}, r"bf16 \(trainable weights are fp32 under autocast: engine.precision\)"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"offload_optimizer .*\(engine.offload\)"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"offload_param .*\(engine.offload\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_names_both_settings(own, message) -> None:
    with pytest.raises(ConfigError, match=rf"engine.deepspeed_config contradicts .*{message}.*Remove these keys from the file"):
        build(ZeroOptions(2, settings=own))


def test_all_contradictions_are_listed() -> None:
    own = {"optimizer": {"type": "Lamb"}, "gradient_clipping": 3, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError) as error:
        build(ZeroOptions(2, settings=own))
    assert all(key in str(error.value) for key in ("optimizer (", "gradient_clipping 3", "zero_optimization.stage 1"))


def test_the_file_may_repeat_the_offload_setting() -> None:
    own = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 8}}}
    config = build(ZeroOptions(2, "optimizer", own))["zero_optimization"]["offload_optimizer"]
    assert config == {"device": "cpu", "pin_memory": False, "buffer_count": 8}
    with pytest.raises(ConfigError, match=r"offload_optimizer.device nvme against cpu \(engine.offload\)"):
        build(ZeroOptions(2, "optimizer", {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}))


@pytest.mark.parametrize("section", sorted(REFUSED_SECTIONS))
def test_refused_sections_may_only_be_off(section) -> None:
    with pytest.raises(ConfigError, match=section):
        build(ZeroOptions(2, settings={section: {"enabled": True}}))
    assert section not in build(ZeroOptions(2, settings={section: {"enabled": False}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"cannot be read \(No such file"), ("{'a': 1}", r"is not valid JSON \(.*Remove comments"), ("[1]", "holds a list")],
)
def test_read_deepspeed_file_refuses_other_files(tmp_path: Path, text, message) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"engine.deepspeed_config '.*ds.json': the file {message}"):
        read_deepspeed_file(str(path))


def test_read_deepspeed_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"steps_per_print": 10}')
    assert read_deepspeed_file(str(tmp_path / "ds.json")) == {"steps_per_print": 10}
