"""Where the features are kept: a decision from sizes alone, with its reason in words. Pure."""

from dataclasses import dataclass
from typing import Literal

from agnews_dist.storage.capacity import gigabytes

Place = Literal["device", "host", "disk", "off"]
Wanted = Literal["auto", "device", "host", "disk", "off"]
MEMORY_SHARE = 0.6
"""Of free memory that features may take: training needs some too, and so does what else runs there."""
DISK_SHARE = 0.9


@dataclass(frozen=True)
class FreeSpace:
    """Free bytes, the least over all ranks, so that every rank decides alike."""

    device: int
    """Per rank."""
    host: int
    """Per node."""
    shared: int
    """The part of the host's memory that several ranks of a node can share."""
    disk: int
    """Below the cache's directory."""
    disk_limit: int
    """What all feature caches on disk may take together."""


@dataclass(frozen=True)
class Choice:
    """The place and why it is that one; `refused` says why an explicit wish was not obeyed."""

    place: Place
    why: str
    refused: str | None = None


def choose(
    wanted: Wanted,
    num_bytes: int,
    room: FreeSpace,
    *,
    num_ranks: int,
    ranks_per_node: int,
    num_epochs: int,
    has_gpu: bool,
    is_on_disk: bool,
    failed: frozenset[Place] = frozenset(),
) -> Choice:
    """The first place in which `num_bytes` of features fit.

    auto: what a former run left whole on disk; the device, if it is a GPU; the host; the disk; computing at every use. Another
    wish comes first, then what auto would take. `failed`: places that turned out not to work.
    """
    if wanted == "off":
        return Choice("off", "as asked: computed anew at every use")
    if wanted in ("auto", "disk") and is_on_disk and "disk" not in failed:
        # Not asked whether it fits: what is there has its space, which is no longer free.
        return Choice("disk", f"{gigabytes(num_bytes)}, kept by a former run")
    if wanted == "auto" and num_epochs == 1:
        return Choice("off", "computed as they are needed: one epoch needs each once")
    automatic: list[Place] = ["device", "host", "disk"] if has_gpu else ["host", "disk"]
    first: list[Place] = [] if wanted == "auto" else [wanted]
    places = first + [place for place in automatic if place not in first]
    misfits: list[str] = []
    for place in places:
        if place in failed:
            misfits.append(f"{place} failed")
            continue
        misfit = _misfit(place, num_bytes, room, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
        if misfit is None:
            asked = "as asked" if place == wanted else "; ".join(misfits) or "fits"
            refused = None if wanted in ("auto", place) else f"{'; '.join(misfits)}: kept in {place} instead"
            return Choice(place, f"{gigabytes(num_bytes)}, {asked}", refused)
        misfits.append(misfit)
    nowhere = "; ".join(misfits)
    refused = None if wanted == "auto" else f"{nowhere}: computed anew at every use"
    return Choice("off", f"computed anew at every use: {gigabytes(num_bytes)} fit nowhere ({nowhere})", refused)


def _misfit(place: Place, num_bytes: int, room: FreeSpace, *, num_ranks: int, ranks_per_node: int) -> str | None:
    """Why the features do not fit there, or None."""
    if place == "device":
        need, limit, what = -(-num_bytes // num_ranks), MEMORY_SHARE * room.device, "free device memory per rank"
    elif place == "host" and ranks_per_node > 1 and room.shared < room.host:
        need, limit, what = num_bytes, MEMORY_SHARE * room.shared, "free shared memory of the node"
    elif place == "host":
        need, limit, what = num_bytes, MEMORY_SHARE * room.host, "free host memory"
    elif room.disk_limit < num_bytes:
        return f"{gigabytes(num_bytes)} exceed engine.feature_cache_gigabytes ({gigabytes(room.disk_limit)})"
    else:
        need, limit, what = num_bytes, DISK_SHARE * room.disk, "free disk space"
    if need <= limit:
        return None
    return f"{gigabytes(need)} exceed what may be taken of the {what} ({gigabytes(int(limit))})"
