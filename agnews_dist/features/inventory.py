"""All caches on disk, of tokens and of features: list them, choose some by name, remove them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from agnews_dist.data.token_cache import list_token_caches, remove_token_cache
from agnews_dist.errors import ConfigError, DataError, did_you_mean
from agnews_dist.features import eviction

GROUPS = ("all", "features", "tokens")
"""Names that stand for several caches."""
SHORT_KEY = 12
"""Characters of a key in lists. The first characters name a cache if no other key has them."""


@dataclass(frozen=True)
class CacheFacts:
    """One cache of features or tokens."""

    kind: str
    """features or tokens."""
    key: str
    path: str
    what: str
    """Model or splits, and sizes; empty if they cannot be read."""
    state: str
    """complete, in use, being built or unfinished."""
    last_used: float
    """Seconds since 1970."""
    disk_bytes: int


def list_all_caches(root: Path) -> list[CacheFacts]:
    """List the caches below `root`: features, then tokens, each least recently used first.

    Raises:
        DataError: the directory cannot be read.
    """
    try:
        return [*_list_features(root / "features"), *_list_tokens(root)]
    except OSError as error:
        raise DataError(
            f"data.cache_dir {str(root)!r}: the directory cannot be read ({error.strerror}). "
            "Set --data.cache_dir to a directory that this user may read."
        ) from error


def _list_features(root: Path) -> list[CacheFacts]:
    found: list[CacheFacts] = []
    for entry in eviction.list_caches(root):
        state, state_in_use = ("complete", "in use") if entry.is_complete else ("unfinished", "being built")
        what = [str(entry.about["model"])] if "model" in entry.about else []
        counts = {name: entry.about.get(name) for name in ("texts", "tokens")}
        what += [f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int)]
        facts = (", ".join(what), state_in_use if entry.is_used else state, entry.last_used, entry.disk_bytes)
        found.append(CacheFacts("features", entry.key, str(entry.path), *facts))
    return found


def _list_tokens(root: Path) -> list[CacheFacts]:
    found: list[CacheFacts] = []
    for cache in list_token_caches(root):
        splits = cast("Mapping[str, Mapping[str, int]]", cache.about.get("splits", {}))
        what = [f"{name}: {split['texts']:,} texts, {split['tokens']:,} tokens" for name, split in splits.items()]
        state = "being built" if cache.is_used else "complete" if splits else "unfinished"
        facts = ("; ".join(what), state, cache.last_used, cache.disk_bytes)
        found.append(CacheFacts("tokens", cache.key, str(cache.path), *facts))
    return found


def choose_caches(caches: Sequence[CacheFacts], names: Sequence[str]) -> list[CacheFacts]:
    """Choose the caches that `names` match: all, a kind, or the first characters of a key.

    Raises:
        ConfigError: a name matches no cache, or begins several keys.
    """
    chosen: set[str] = set()
    for name in names:
        if name in GROUPS:
            chosen |= {cache.key for cache in caches if name in ("all", cache.kind)}
            continue
        keys = {cache.key for cache in caches if cache.key.startswith(name)}
        if len(keys) != 1:
            fault = f"begins {len(keys)} keys" if keys else "is not the key of a cache"
            known = [*GROUPS, *(cache.key[:SHORT_KEY] for cache in caches)]
            hint = " Write more of the key." if keys else did_you_mean(name, known)
            raise ConfigError(
                f"--clear {name!r} {fault}: nothing was removed. Name {', '.join(GROUPS)}, or a key that "
                f"python -m agnews_dist cache lists.{hint}"
            )
        chosen |= keys
    return [cache for cache in caches if cache.key in chosen]


def clear_caches(root: Path, chosen: Sequence[CacheFacts]) -> dict[str, str]:
    """Remove the chosen caches that no process uses; return the outcome for each key."""
    eviction.evict(root / "features", 0, sys.maxsize)  # evicts nothing, but removes what killed removals left
    outcomes: dict[str, str] = {}
    for cache in chosen:
        remove = eviction.remove if cache.kind == "features" else remove_token_cache
        try:
            is_gone = remove(Path(cache.path))
        except OSError as error:
            outcomes[cache.key] = f"kept: {error.strerror}"
            continue
        kept = "kept: in use"
        if cache.state in ("complete", "unfinished"):
            kept = "kept: in use, or another user's"
        outcomes[cache.key] = "removed" if is_gone else kept
    return outcomes
