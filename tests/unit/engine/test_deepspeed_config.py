"""DeepSpeed's dictionary: it holds what the configuration decides, keeps the user's own, and names what contradicts."""

import json
from pathlib import Path
from typing import Any

import pytest

from agnews_dist.engine.deepspeed_config import (
    FOREIGN,
    LARGEST_BUCKET,
    ZeroOptions,
    deepspeed_dictionary,
    read_settings,
)
from agnews_dist.errors import ConfigError


def dictionary(zero: ZeroOptions, **changed: Any) -> dict[str, Any]:
    given = {"num_ranks": 8, "num_parameters": 7_090_000, "max_grad_norm": 1.0, "compress_gradients": False}
    return deepspeed_dictionary(zero, **{**given, "pin_memory": True, **changed})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_configuration_decides(stage) -> None:
    made = dictionary(ZeroOptions(stage))
    assert made["zero_optimization"]["stage"] == stage
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (8, 1)
    assert made["gradient_accumulation_steps"] == 1, "ours; DeepSpeed would divide by it"
    assert made["gradient_clipping"] == 1.0
    assert made["communication_data_type"] == "fp32"
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & made.keys()
    assert "offload_optimizer" not in made["zero_optimization"]
    assert made["zero_optimization"]["reduce_bucket_size"] == 7_090_000, "no larger than what trains"
    assert (
        dictionary(ZeroOptions(stage), num_parameters=10**9)["zero_optimization"]["reduce_bucket_size"]
        == LARGEST_BUCKET
    )


def test_no_clipping_is_said_and_not_left_out() -> None:
    """accelerate clips at 1.0 where the key is missing."""
    assert dictionary(ZeroOptions(2), max_grad_norm=0.0)["gradient_clipping"] == 0.0


def test_offload_and_compression() -> None:
    optimizer, everything = (
        dictionary(ZeroOptions(3, offload))["zero_optimization"] for offload in ("optimizer", "all")
    )
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in optimizer
    assert everything["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert dictionary(ZeroOptions(3, "all"))["zero_force_ds_cpu_optimizer"] is False, (
        "torch's AdamW updates on the host"
    )
    assert dictionary(ZeroOptions(2), compress_gradients=True)["communication_data_type"] == "bf16"


def test_the_users_own_settings_are_kept_and_win_over_sizes() -> None:
    own = {
        "wall_clock_breakdown": True,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 5,
            "overlap_comm": False,
            "round_robin_gradients": True,
        },
    }
    before = json.dumps(own)
    made = dictionary(ZeroOptions(2, settings=own))
    assert made["wall_clock_breakdown"] is True
    assert made["gradient_clipping"] == 1.0
    assert {key: made["zero_optimization"][key] for key in own["zero_optimization"]} == own["zero_optimization"]  # type: ignore[index]
    assert made["zero_optimization"]["allgather_bucket_size"] == 7_090_000
    assert not {"bf16", "fp16"} & made.keys()
    assert json.dumps(own) == before, "the user's dictionary is not changed"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage 3 against 2 \(engine.zero_stage\)"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping 0.5 against 1.0 \(optim.max_grad_norm\)"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps 4 against 1 \(the batches are the plan's"),
        ({"train_batch_size": 32}, r"train_batch_size 32 against 8 \(the batches are the plan's"),
        (
            {"communication_data_type": "fp16"},
            r"communication_data_type fp16 against fp32 \(engine.gradient_compression\)",
        ),
        ({"optimizer": {"type": "OneBitAdam", "params": {}}}, r"optimizer \(the optimizer is AdamW from optim.\*\)"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler \(the learning rate is optim.schedule\)"),
        ({"bf16": {"enabled": True}}, r"bf16 \(what trains is fp32 under autocast: engine.precision\)"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"offload_optimizer .*\(engine.offload\)"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"offload_param .*\(engine.offload\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_an_error_that_names_both(own, said) -> None:
    with pytest.raises(
        ConfigError, match=rf"engine.deepspeed_config contradicts .*{said}.*Remove these keys from the file"
    ):
        dictionary(ZeroOptions(2, settings=own))


def test_all_contradictions_come_at_once() -> None:
    own = {"optimizer": {"type": "Lamb"}, "gradient_clipping": 3, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError) as error:
        dictionary(ZeroOptions(2, settings=own))
    assert all(key in str(error.value) for key in ("optimizer (", "gradient_clipping 3", "zero_optimization.stage 1"))


def test_the_offload_that_is_asked_for_may_be_in_the_file_too() -> None:
    own = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 8}}}
    made = dictionary(ZeroOptions(2, "optimizer", own))["zero_optimization"]["offload_optimizer"]
    assert made == {"device": "cpu", "pin_memory": False, "buffer_count": 8}
    with pytest.raises(ConfigError, match=r"offload_optimizer.device nvme against cpu \(engine.offload\)"):
        dictionary(ZeroOptions(2, "optimizer", {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}))


@pytest.mark.parametrize("section", sorted(FOREIGN))
def test_every_foreign_section_is_refused_when_on_and_dropped_when_off(section) -> None:
    with pytest.raises(ConfigError, match=section):
        dictionary(ZeroOptions(2, settings={section: {"enabled": True}}))
    assert section not in dictionary(ZeroOptions(2, settings={section: {"enabled": False}}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"cannot be read \(No such file"),
        ("{'a': 1}", r"is no JSON \(.*Correct the file"),
        ("[1]", "holds a list"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text, said) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"engine.deepspeed_config '.*ds.json' {said}"):
        read_settings(str(path))


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"steps_per_print": 10}')
    assert read_settings(str(tmp_path / "ds.json")) == {"steps_per_print": 10}
