"""The space that a training takes below run.dir, estimated before it begins."""

import math
from collections.abc import Mapping, Sized
from pathlib import Path

from agnews_dist.config.schema import Config
from agnews_dist.model.export import run_bytes
from agnews_dist.report.formatting import sum_parameters
from agnews_dist.storage.directories import cache_root

STEP_BYTES = 300
"""Line of a step in events.jsonl."""
ROW_BYTES, CLASS_BYTES = 60, 14
"""Line of a prediction, and each probability in it."""
MAX_CLASSES = 256
"""Probabilities of a line, at most: of more classes only the most probable ones are written."""


def estimate_run_bytes(
    config: Config, parameters: Mapping[str, tuple[int, int]], splits: Mapping[str, Sized], num_classes: int
) -> int:
    """Estimate what a training writes below run.dir at most."""
    rows = {name: len(split) for name, split in splits.items()}
    lines = sum(count for name, count in rows.items() if name != "train") * (
        ROW_BYTES + CLASS_BYTES * min(num_classes, MAX_CLASSES)
    )
    num_steps = config.optim.max_steps or config.optim.epochs * math.ceil(rows["train"] / config.batch.global_batch_size)
    # One checkpoint is written before another one is removed. A run of this name may have its checkpoints already.
    has_run = config.run.name is not None and (Path(config.run.dir) / config.run.name).exists()
    num_checkpoints = 1 if has_run else config.checkpoint.keep + 1
    has_average, other_bytes = config.optim.average != "none", lines + STEP_BYTES * num_steps
    return run_bytes(*sum_parameters(parameters), num_checkpoints, has_average=has_average, other_bytes=other_bytes)


def reserve_run_bytes(
    config: Config, parameters: Mapping[str, tuple[int, int]], splits: Mapping[str, Sized], num_classes: int
) -> int:
    """Return what features on disk must leave free: the run's own files, if they share a file system; else 0."""
    places = (Path(config.run.dir), cache_root(config.data.cache_dir))
    devices = {next(path for path in (place, *place.absolute().parents) if path.exists()).stat().st_dev for place in places}
    return estimate_run_bytes(config, parameters, splits, num_classes) if len(devices) == 1 else 0
