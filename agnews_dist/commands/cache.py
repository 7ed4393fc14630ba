"""What the caches on disk hold, and clearing them. `python -m agnews_dist cache`, `python -m agnews_dist cache --clear all`.

WHAT ...    with --clear: all, features, tokens, or keys as they are listed
--clear     remove those, but never what a process uses
--json      one JSON object on standard output

Looks below data.cache_dir: the tokens of each data set, and the output of the frozen part for each of its splits.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from agnews_dist.commands.command import run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError, DataError, did_you_mean

OPTIONS = (
    cli.Option("what", nargs="*", help="With --clear: all, features, tokens, or keys as they are listed."),
    cli.Option("--clear", type=bool, default=False, help="Remove what WHAT names, but never what a process uses."),
    cli.Option("--json", type=bool, default=False, help="Print one JSON object instead of a list for people."),
)
GROUPS = ("all", "features", "tokens")
SHORT_KEY = 12
"""Characters of a key that are shown; fewer are enough to name it, if no other begins like it."""


@dataclass(frozen=True)
class Cached:
    """One cache of either kind."""

    kind: str
    key: str
    path: str
    what: str
    state: str
    """complete, in use, being built, unfinished."""
    last_used: float
    """Seconds since 1970."""
    disk_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code."""
    return run_command("cache", argv, run, OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """List what there is, or remove what is named and say what became of it, on rank 0 alone."""
    names, has_clear = cast(Sequence[str], loaded.options["what"]), loaded.options["clear"]
    if names and not has_clear:
        raise ConfigError(f"{names[0]!r} without --clear: a list shows everything. Write --clear {' '.join(names)}.")
    if has_clear and not names:
        raise ConfigError(
            f"--clear without a name: it would remove nothing. Name {', '.join(GROUPS)} or keys after it."
        )
    if not world.is_main:
        return
    # Imported here, not above: --help must not wait for numpy.
    from agnews_dist.storage.locations import cache_root

    root = cache_root(loaded.config.data.cache_dir)
    limit_bytes = int(loaded.config.engine.feature_cache_gigabytes * 1e9)
    try:
        caches = find(root)
    except OSError as error:
        raise DataError(
            f"cache directory {str(root)!r} cannot be read ({error.strerror}): what it holds is unknown. "
            "Set --data.cache_dir to one that this user may read."
        ) from error
    chosen = named(caches, names)
    outcomes = clear(root, chosen) if has_clear else None
    if loaded.options["json"]:
        print(json.dumps(as_json(root, limit_bytes, caches, outcomes), indent=2, allow_nan=False))
    else:
        show(root, limit_bytes, chosen if has_clear else caches, outcomes)


def find(root: Path) -> list[Cached]:
    """All caches below `root`: features, then tokens, each with the longest unused first."""
    from agnews_dist.data.token_cache import token_caches
    from agnews_dist.features.eviction import entries

    found: list[Cached] = []
    for entry in entries(root / "features"):
        states = ("in use", "complete") if entry.is_complete else ("being built", "unfinished")
        what = [str(entry.about[name]) for name in ("model", "split") if name in entry.about]
        what += [
            f"{entry.about[name]:,} {name}" for name in ("texts", "tokens") if isinstance(entry.about.get(name), int)
        ]
        state = states[0] if entry.is_used else states[1]
        facts = (", ".join(what), state, entry.last_used, entry.disk_bytes)
        found.append(Cached("features", entry.key, str(entry.path), *facts))
    for cache in token_caches(root):
        splits = cast("Mapping[str, Mapping[str, int]]", cache.about.get("splits", {}))
        what = [f"{name}: {each['texts']:,} texts, {each['tokens']:,} tokens" for name, each in splits.items()]
        state = "being built" if cache.is_used else "complete" if splits else "unfinished"
        facts = ("; ".join(what), state, cache.last_used, cache.disk_bytes)
        found.append(Cached("tokens", cache.key, str(cache.path), *facts))
    return found


def named(caches: Sequence[Cached], names: Sequence[str]) -> list[Cached]:
    """Those that `names` stand for: all, a kind, or the beginning of a key.

    Raises:
        ConfigError: a name stands for none, or begins several keys.
    """
    chosen: set[str] = set()
    for name in names:
        if name in GROUPS:
            chosen |= {cache.key for cache in caches if name in ("all", cache.kind)}
            continue
        hits = {cache.key for cache in caches if cache.key.startswith(name)}
        if len(hits) != 1:
            what = f"begins {len(hits)} keys" if hits else "is the key of no cache"
            known = [*GROUPS, *(cache.key[:SHORT_KEY] for cache in caches)]
            hint = " Write more of it." if hits else did_you_mean(name, known)
            raise ConfigError(
                f"--clear {name!r} {what}: nothing was removed. Name {', '.join(GROUPS)}, or a key that "
                f"python -m agnews_dist cache lists.{hint}"
            )
        chosen |= hits
    return [cache for cache in caches if cache.key in chosen]


def clear(root: Path, chosen: Sequence[Cached]) -> dict[str, str]:
    """Remove them as far as nobody uses them; what became of each key."""
    from agnews_dist.data.token_cache import remove_token_cache
    from agnews_dist.features import eviction as shelf

    shelf.make_room(root / "features", 0, sys.maxsize)  # evicts nothing, but finishes removals that were killed
    outcomes: dict[str, str] = {}
    for cache in chosen:
        try:
            is_gone = (shelf.remove if cache.kind == "features" else remove_token_cache)(Path(cache.path))
            outcomes[cache.key] = "removed" if is_gone else "kept: in use"
        except OSError as error:
            outcomes[cache.key] = f"kept: {error.strerror}"
        if outcomes[cache.key] == "kept: in use" and cache.state in ("complete", "unfinished"):
            outcomes[cache.key] = "kept: in use, or another user's"
    return outcomes


def as_json(
    root: Path, limit_bytes: int, caches: Sequence[Cached], outcomes: Mapping[str, str] | None
) -> dict[str, Any]:
    """The object of --json; `caches` as they were before the clearing."""
    listed = [
        asdict(cache) | ({"outcome": outcomes.get(cache.key)} if outcomes is not None else {}) for cache in caches
    ]
    return {"directory": str(root), "feature_limit_bytes": limit_bytes, "caches": listed, "total_bytes": _total(caches)}


def show(root: Path, limit_bytes: int, caches: Sequence[Cached], outcomes: Mapping[str, str] | None) -> None:
    """A table on a terminal, a line per cache elsewhere; `outcomes` stand in the place of states."""
    from rich.console import Console as Output

    from agnews_dist.report.console import draws
    from agnews_dist.report.formatting import visible
    from agnews_dist.storage.capacity import gigabytes

    # FORCE_COLOR, set for other tools, must not put cursor movements into a log file.
    out = Output(file=sys.stdout, force_terminal=sys.stdout.isatty())
    as_table = draws(out)
    header = ("cache", "key", "size", "last used", "state" if outcomes is None else "outcome", "of")
    rows = [
        (
            cache.kind,
            cache.key[:SHORT_KEY],
            gigabytes(cache.disk_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.last_used)),
            cache.state if outcomes is None else outcomes[cache.key],
            visible(cache.what, out.encoding) or "unknown",
        )
        for cache in caches
    ]
    place = visible(str(root), out.encoding)
    if not rows:
        print(f"no cache below {place}")
    elif as_table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for name in header:
            table.add_column(Text(name), justify="right" if name == "size" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        out.print(table)
    else:
        for cache, row in zip(caches, rows, strict=True):
            print("  ".join((*row, visible(cache.path, out.encoding))))
    if outcomes is None and rows:
        features = _total([cache for cache in caches if cache.kind == "features"])
        print(
            f"{gigabytes(_total(caches))} below {place}; features {gigabytes(features)} of the {gigabytes(limit_bytes)} that "
            "engine.feature_cache_gigabytes allows"
        )


def _total(caches: Sequence[Cached]) -> int:
    return sum(cache.disk_bytes for cache in caches)
