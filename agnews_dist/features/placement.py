"""The placement of a run's features: device, host memory, disk, or none. Decided from sizes alone, without torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from agnews_dist.storage.capacity import gigabytes

Place = Literal["device", "host", "disk", "off"]
RequestedPlace = Literal["auto", "device", "host", "disk", "off"]
MEMORY_SHARE = 0.6
"""Largest share of free memory for features. Training and other processes need the rest."""
WORTH_EXTENDING = 0.5
"""Smallest share of the features on disk for which auto computes the others for a single epoch."""
DISK_SHARE = 0.9
"""Largest share of free disk space for features."""


@dataclass(frozen=True)
class Resources:
    """Ranks and free bytes of a job. The bytes are the minimum over all ranks, so every rank decides the same."""

    num_ranks: int
    ranks_per_node: int
    has_gpu: bool
    device_bytes: int
    """Free memory of each rank's device."""
    host_bytes: int
    """Free memory of each node."""
    shared_bytes: int
    """Free memory of each node that its ranks can share."""
    disk_bytes: int
    """Free space of the cache directory's file system."""
    disk_limit_bytes: int
    """Limit of all feature caches on disk together."""


@dataclass(frozen=True)
class Choice:
    """The chosen place, and the reason for the log."""

    place: Place
    reason: str
    refusal: str | None = None
    """Message if another place was requested."""
    has_no_room: bool = False
    """Features are computed at every use because they fit nowhere."""


def choose(
    requested: Literal["auto", "device", "host", "disk"],
    num_bytes: int,
    resources: Resources,
    *,
    num_epochs: int,
    missing_bytes: int,
    cached_share: float,
    failed: Collection[Place] = (),
    excluded: Collection[Place] = (),
) -> Choice:
    """Choose the first place where `num_bytes` of features fit.

    The order of auto: disk if all features are there (`cached_share`); with a GPU its memory, host memory, disk; without one
    disk, host memory; off. A CPU computes features more slowly than a disk takes them, and files survive a kill.
    Auto computes features at every use if there is one epoch and less than half of them are on disk. So does every place
    without any epoch. Another requested place comes before this order. Places where storing the features has `failed` are left
    out. `num_bytes` counts the features of all ranks, `missing_bytes` those that are not on disk. `cached_share` is the share
    of tokens that earlier runs left there. Places that are `excluded` are not mentioned.
    """
    if requested in ("auto", "disk") and cached_share == 1 and "disk" not in failed:
        # The free space does not matter: the files exist.
        return Choice("disk", f"{gigabytes(num_bytes)}, cached by an earlier run")
    if not num_epochs:
        return Choice("off", "computed at their use: nothing is trained on them")
    if requested == "auto" and num_epochs == 1 and cached_share < WORTH_EXTENDING:
        return Choice("off", "computed at every use, which is once in one epoch")
    automatic: list[Place] = ["device", "host", "disk"] if resources.has_gpu else ["disk", "host"]
    first: list[Place] = [] if requested == "auto" else [requested]
    misfits: list[str] = []
    # Rounded down: less than all is never 100%.
    cached = f", {math.floor(100 * cached_share)}% cached by earlier runs" if 0 < cached_share < 1 else ""
    for place in first + [place for place in automatic if place not in {*first, *excluded}]:
        needed_bytes = missing_bytes if place == "disk" else num_bytes
        misfit = f"{place} failed" if place in failed else _explain_misfit(place, needed_bytes, resources)
        if misfit is None:
            reason = "as requested" if place == requested else "; ".join(misfits) or "fits"
            refusal = None if requested in ("auto", place) else f"{'; '.join(misfits)}. Features are cached in {place}"
            return Choice(place, f"{gigabytes(num_bytes)}{cached}, {reason}", refusal)
        misfits.append(misfit)
    reasons = "; ".join(misfits)
    refusal = None if requested == "auto" else f"{reasons}. Features are computed at every use"
    reason = f"computed at every use: {gigabytes(num_bytes)} fit nowhere ({reasons})"
    return Choice("off", reason, refusal, has_no_room=True)


def _explain_misfit(place: Place, num_bytes: int, resources: Resources) -> str | None:
    """Return why the features do not fit in this place; None if they do."""
    needed, share = num_bytes, MEMORY_SHARE
    if place == "device":
        needed, free, memory = -(-num_bytes // resources.num_ranks), resources.device_bytes, "device memory per rank"
    elif place == "host" and resources.ranks_per_node > 1 and resources.shared_bytes < resources.host_bytes:
        free, memory = resources.shared_bytes, "shared memory of the node"
    elif place == "host":
        free, memory = resources.host_bytes, "host memory"
    elif resources.disk_limit_bytes < num_bytes:
        return f"{gigabytes(num_bytes)} exceed engine.feature_cache_gigabytes ({gigabytes(resources.disk_limit_bytes)})"
    else:
        free, share, memory = resources.disk_bytes, DISK_SHARE, "disk space"
    if needed <= share * free:
        return None
    return f"{gigabytes(needed)} exceed {share:.0%} of the free {memory} ({gigabytes(int(share * free))})"
