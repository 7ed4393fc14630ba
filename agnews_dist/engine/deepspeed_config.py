"""DeepSpeed's settings as one dictionary: what our configuration decides, sizes that fit what trains, and the user's own. Pure.

The optimizer is always torch's AdamW, the weights that train are always fp32 and the step is ours, so that no result depends on
the engine and none of DeepSpeed's C++ extensions is compiled.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from agnews_dist.errors import ConfigError

Offload = Literal["none", "optimizer", "all"]
LARGEST_BUCKET = 2**25
"""Elements that are reduced, or gathered ahead, at once: 128 MiB in fp32. DeepSpeed's 5e8 would be 2 GB for any model."""
FOREIGN = {
    "optimizer": "the optimizer is AdamW from optim.*",
    "scheduler": "the learning rate is optim.schedule",
    "fp16": "what trains is fp32 under autocast: engine.precision",
    "bf16": "what trains is fp32 under autocast: engine.precision",
    "amp": "what trains is fp32 under autocast: engine.precision",
    "torch_autocast": "autocast is engine.precision",
    "fp8": "what trains is fp32 under autocast: engine.precision",
    "data_efficiency": "the batches are the plan's",
    "curriculum_learning": "the batches are the plan's",
    "compression_training": "the exported weights would not be the trained ones",
    "progressive_layer_drop": "blocks would be left out of the gradient",
    "elasticity": "batch.global_batch_size holds on any number of ranks",
    "tensor_parallel": "the ranks divide the data",
    "pipeline": "the ranks divide the data",
}
"""Sections of DeepSpeed that would decide what is decided elsewhere, and where."""


@dataclass(frozen=True)
class ZeroOptions:
    """How what trains is divided over the ranks."""

    stage: Literal[1, 2, 3]
    offload: Offload = "none"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The user's own DeepSpeed dictionary."""


def read_settings(path: str) -> dict[str, Any]:
    """The user's DeepSpeed JSON.

    Raises:
        ConfigError: no such file, or it holds no JSON object.
    """
    try:
        read: object = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"engine.deepspeed_config {path!r} cannot be read ({error.strerror}): DeepSpeed would run with other settings than "
            "you wrote. Check the path, or leave the setting out."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"engine.deepspeed_config {path!r} is no JSON ({error}): its settings are lost. Correct the file; comments and "
            "trailing commas are not allowed."
        ) from error
    if not isinstance(read, dict):
        raise ConfigError(
            f"engine.deepspeed_config {path!r} holds a {type(read).__name__}: DeepSpeed's settings are a JSON object. "
            'Write {"zero_optimization": {...}}.'
        )
    return cast(dict[str, Any], read)


def deepspeed_dictionary(
    zero: ZeroOptions,
    *,
    num_ranks: int,
    num_parameters: int,
    max_grad_norm: float,
    compress_gradients: bool,
    pin_memory: bool,
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes for `num_parameters` that train. `max_grad_norm` 0: no clipping.

    Raises:
        ConfigError: the user's settings contradict ours; all contradictions in one message.
    """
    decided: dict[str, Any] = {
        # A number that must be there. The batches come from the plan, their micro-batches from the step.
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": num_ranks,
        "gradient_accumulation_steps": 1,
        # Not left out where it is 0: accelerate would clip at 1.
        "gradient_clipping": float(max_grad_norm),
        "communication_data_type": "bf16" if compress_gradients else "fp32",
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW updates on the host too; DeepSpeed's own would be compiled for minutes first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": zero.stage, **_offloaded(zero, {"device": "cpu"})},
    }
    bucket = min(num_parameters, LARGEST_BUCKET)
    proposed: dict[str, Any] = {
        "zero_optimization": {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "overlap_comm": True,
            **_offloaded(zero, {"pin_memory": pin_memory}),
        }
    }
    # Found in either: nothing of the user's is lost, and nothing is silently ours.
    wrong = [
        f"{name} ({why})" for name, why in FOREIGN.items() if name in zero.settings and not _is_off(zero.settings[name])
    ]
    wrong += _contradictions(decided, zero.settings)
    if wrong:
        raise ConfigError(
            f"engine.deepspeed_config contradicts the configuration: {'; '.join(wrong)}. Two places that decide the same thing "
            "would leave it to chance which one holds. Remove these keys from the file, or change the setting named."
        )
    own = {name: value for name, value in zero.settings.items() if name not in FOREIGN}
    return _merged(_merged(proposed, own), decided)


def _offloaded(zero: ZeroOptions, settings: dict[str, Any]) -> dict[str, Any]:
    names = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(names[zero.offload], settings)


def _is_off(section: Any) -> bool:
    return section in (None, False, "auto") or (
        isinstance(section, Mapping) and section.get("enabled") in (False, "auto")
    )


SETTING = {
    "train_batch_size": "the batches are the plan's: batch.*",
    "train_micro_batch_size_per_gpu": "the batches are the plan's: batch.*",
    "gradient_accumulation_steps": "the batches are the plan's: batch.*",
    "gradient_clipping": "optim.max_grad_norm",
    "communication_data_type": "engine.gradient_compression",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param.device": "engine.offload",
}
"""DeepSpeed's key -> the setting that decides it; what is missing here is fixed."""


def _contradictions(decided: Mapping[str, Any], own: Mapping[str, Any], path: str = "") -> list[str]:
    """Keys of the user's that have another value than ours; 'auto' leaves it to us."""
    found: list[str] = []
    for name, value in decided.items():
        key = f"{path}{name}"
        theirs = own.get(name, "auto")
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            found += _contradictions(cast(Mapping[str, Any], value), cast(Mapping[str, Any], theirs), f"{key}.")
        elif theirs not in ("auto", value):
            found.append(f"{key} {theirs} against {value} ({SETTING.get(key, 'fixed')})")
    if path == "zero_optimization.":
        for name in ("offload_optimizer", "offload_param"):
            theirs = own.get(name)
            wants = isinstance(theirs, Mapping) and cast(Mapping[str, Any], theirs).get("device") not in (
                None,
                "none",
                "auto",
            )
            if wants and name not in decided:
                found.append(f"{path}{name} {json.dumps(theirs)} against none (engine.offload)")
    return found


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins, section by section, except where it says 'auto'."""
    merged = copy.deepcopy(dict(below))
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merged(merged[name], cast(Mapping[str, Any], value))
        elif value != "auto":
            merged[name] = copy.deepcopy(value)
    return merged
