"""Output of the cache command: a table on a terminal, one line per cache elsewhere, or one JSON object."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agnews_dist.features.inventory import SHORT_KEY, CacheFacts
from agnews_dist.report.formatting import can_draw, create_output, create_table, escape_text
from agnews_dist.storage.capacity import gigabytes


def caches_to_json(
    root: Path, limit_bytes: int, caches: Sequence[CacheFacts], outcomes: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the object of --json. `caches` are those before the removal, `outcomes` those of the removal."""
    rows = [asdict(cache) | ({"outcome": outcomes.get(cache.key)} if outcomes is not None else {}) for cache in caches]
    return {"directory": str(root), "feature_limit_bytes": limit_bytes, "caches": rows, "total_bytes": _sum_bytes(caches)}


def show_caches(root: Path, limit_bytes: int, caches: Sequence[CacheFacts], outcomes: Mapping[str, str] | None) -> None:
    """Print the caches and their total. With `outcomes` of a removal, print these instead of states and total."""
    out = create_output(sys.stdout)
    directory = escape_text(str(root), out.encoding)
    if not caches:
        print(f"no cache below {directory}")
        return
    rows = [
        (
            cache.kind,
            cache.key[:SHORT_KEY],
            gigabytes(cache.disk_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.last_used)),
            cache.state if outcomes is None else outcomes[cache.key],
            escape_text(cache.what, out.encoding) or "unknown",
        )
        for cache in caches
    ]
    if can_draw(out):
        header = ("cache", "key", "size", "last used", "state" if outcomes is None else "outcome", "of")
        out.print(create_table(header, rows, right=("size",)))
    else:
        for cache, row in zip(caches, rows, strict=True):
            print("  ".join((*row, escape_text(cache.path, out.encoding))))
    if outcomes is None:
        features = _sum_bytes([cache for cache in caches if cache.kind == "features"])
        print(
            f"{gigabytes(_sum_bytes(caches))} below {directory}; features {gigabytes(features)} of the "
            f"{gigabytes(limit_bytes)} that engine.feature_cache_gigabytes allows"
        )


def _sum_bytes(caches: Sequence[CacheFacts]) -> int:
    return sum(cache.disk_bytes for cache in caches)
