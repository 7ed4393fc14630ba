"""DeepSpeed's configuration: decided settings, proposed sizes, and the user's own JSON file. Needs no torch.

The optimizer is always torch's AdamW, trainable weights are always fp32, and the step is ours. So no result depends on the
engine, and no C++ extension of DeepSpeed is compiled.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from agnews_dist.errors import ConfigError
from agnews_dist.storage.atomic import to_json_value

Offload = Literal["none", "optimizer", "all"]
LARGEST_BUCKET = 2**25
"""Elements reduced or prefetched at once: 128 MiB in fp32. DeepSpeed's default of 5e8 takes 2 GB for any model."""
REFUSED_SECTIONS = {
    "optimizer": "the optimizer is AdamW from optim.*",
    "scheduler": "the learning rate is optim.schedule",
    **dict.fromkeys(("fp16", "bf16", "fp8", "amp"), "trainable weights are fp32 under autocast: engine.precision"),
    "torch_autocast": "autocast is engine.precision",
    **dict.fromkeys(("data_efficiency", "curriculum_learning"), "batch.* decides the batches"),
    "compression_training": "the exported weights would not be the trained ones",
    "progressive_layer_drop": "gradients would lack blocks",
    "elasticity": "batch.global_batch_size is the same on any number of ranks",
    **dict.fromkeys(("tensor_parallel", "pipeline"), "ranks are data-parallel"),
}
"""DeepSpeed section -> reason: the setting or part of this package that decides it."""


@dataclass(frozen=True)
class ZeroOptions:
    """ZeRO stage, offloading and the user's DeepSpeed settings."""

    stage: Literal[1, 2, 3]
    offload: Offload = "none"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Content of engine.deepspeed_config."""


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Read the user's DeepSpeed JSON.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    try:
        read: object = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"engine.deepspeed_config {path!r}: the file cannot be read ({error.strerror}). Check the path."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"engine.deepspeed_config {path!r}: the file is not valid JSON ({error}). Remove comments and trailing commas."
        ) from error
    if not isinstance(read, dict):
        raise ConfigError(
            f"engine.deepspeed_config {path!r}: the file holds a {type(read).__name__}, not a JSON object. "
            'Write {"zero_optimization": {...}}.'
        )
    return cast(dict[str, Any], read)


def build_deepspeed_config(
    zero: ZeroOptions, *, num_ranks: int, num_parameters: int, max_grad_norm: float, compress_gradients: bool, pin_memory: bool
) -> dict[str, Any]:
    """Build the configuration of `deepspeed.initialize` for `num_parameters` trainable weights. `max_grad_norm` 0: no clipping.

    Raises:
        ConfigError: the user's settings contradict ours. The message lists all contradictions.
    """
    decided: dict[str, Any] = {
        # Required but unused: batches come from the plan, micro-batches from the step.
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": num_ranks,
        "gradient_accumulation_steps": 1,
        # Also if 0: without the key accelerate would clip at 1.
        "gradient_clipping": float(max_grad_norm),
        "communication_data_type": "bf16" if compress_gradients else "fp32",
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the host too; DeepSpeed's own is first compiled for minutes.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": zero.stage, **_offload_sections(zero, {"device": "cpu"})},
    }
    bucket = min(num_parameters, LARGEST_BUCKET)
    proposed: dict[str, Any] = {
        "zero_optimization": {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "overlap_comm": True,
            **_offload_sections(zero, {"pin_memory": pin_memory}),
        }
    }
    wrong = [f"{name} ({why})" for name, why in REFUSED_SECTIONS.items() if not _is_off(zero.settings.get(name))]
    wrong += _list_contradictions(decided, zero.settings)
    if wrong:
        raise ConfigError(
            f"engine.deepspeed_config contradicts the configuration: {'; '.join(wrong)}. "
            "Remove these keys from the file, or change the named settings."
        )
    own = {name: value for name, value in zero.settings.items() if name not in REFUSED_SECTIONS}
    return _merge(_merge(proposed, own), decided)


def _offload_sections(zero: ZeroOptions, settings: dict[str, Any]) -> dict[str, Any]:
    names = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(names[zero.offload], settings)


def _is_off(section: Any) -> bool:
    return section in (None, False, "auto") or (isinstance(section, Mapping) and section.get("enabled") in (False, "auto"))


DECIDING_SETTINGS = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "batch.*"),
    "gradient_clipping": "optim.max_grad_norm",
    "communication_data_type": "engine.gradient_compression",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param.device": "engine.offload",
}
"""DeepSpeed key -> the setting that decides it. Decided keys that are not listed are fixed."""


def _list_contradictions(decided: Mapping[str, Any], own: Mapping[str, Any], path: str = "") -> list[str]:
    """List the user's keys whose values differ from ours. The value 'auto' never differs."""
    found: list[str] = []
    for name, value in decided.items():
        key = f"{path}{name}"
        theirs = own.get(name, "auto")
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            found += _list_contradictions(cast(Mapping[str, Any], value), cast(Mapping[str, Any], theirs), f"{key}.")
        elif theirs not in ("auto", value):
            found.append(f"{key} {theirs} against {value} ({DECIDING_SETTINGS.get(key, 'fixed')})")
    if path == "zero_optimization.":
        for name in ("offload_optimizer", "offload_param"):
            theirs = own.get(name)
            wants = isinstance(theirs, Mapping) and cast(Mapping[str, Any], theirs).get("device") not in (None, "none", "auto")
            if wants and name not in decided:
                shown = json.dumps(to_json_value(theirs), allow_nan=False)
                found.append(f"{path}{name} {shown} against none (engine.offload)")
    return found


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two dictionaries by section. Values of `above` win unless they are 'auto'."""
    merged = copy.deepcopy(dict(below))
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merge(merged[name], cast(Mapping[str, Any], value))
        elif value != "auto":
            merged[name] = copy.deepcopy(value)
    return merged
