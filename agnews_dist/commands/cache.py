"""`agnews-dist cache`: list the caches below data.cache_dir, of tokens and of features, or clear some of them."""

from collections.abc import Sequence

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError

COMMAND = Command(
    "cache",
    "List the tokens and features kept on disk, or remove some of them. What a process uses is never removed.",
    ("agnews-dist cache", "agnews-dist cache --clear features", "agnews-dist cache --data.cache_dir /scratch/cache --json"),
    (
        Option("what", "With --clear: all, features, tokens, or keys.", nargs="*"),
        Option("--clear", "Remove the named caches.", bool, False),
        Option("--json", "Print one JSON object.", bool, False),
    ),
    ("data.cache_dir", "engine.feature_cache_gigabytes"),
)


def run(world: World, loaded: Loaded) -> None:
    """List the caches, or clear the named ones and list the outcomes. Only rank 0 does anything."""
    names: Sequence[str] = loaded.options["what"]
    is_clearing: bool = loaded.options["clear"]
    if names and not is_clearing:
        raise ConfigError(f"{names[0]!r} without --clear: a list shows everything. Write --clear {' '.join(names)}.")
    if is_clearing and not names:
        raise ConfigError("--clear without a name: it would remove nothing. Name all, features, tokens or keys after it.")
    if not world.is_main:
        return
    # Imported here, so that --help does not wait for numpy.
    with importing():
        from agnews_dist.features.inventory import choose_caches, clear_caches, list_all_caches
        from agnews_dist.report.cache_view import caches_to_json, show_caches
        from agnews_dist.report.result_files import print_json
        from agnews_dist.storage.directories import cache_root

    root = cache_root(loaded.config.data.cache_dir)
    limit_bytes = int(loaded.config.engine.feature_cache_gigabytes * 1e9)
    caches = list_all_caches(root)
    chosen = choose_caches(caches, names) if is_clearing else caches
    outcomes = clear_caches(root, chosen) if is_clearing else None
    if loaded.options["json"]:
        print_json(caches_to_json(root, limit_bytes, caches, outcomes))
    else:
        show_caches(root, limit_bytes, chosen, outcomes)
