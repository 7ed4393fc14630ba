"""Repositories of the Hugging Face hub in the local cache (HF_HUB_CACHE): which copies are there, and of which commit.

Nothing here uses the network. A copy may be incomplete: who reads it knows which files it needs.
"""

import json
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]
DEFAULT_BRANCH = "main"
_COMMIT = re.compile(r"[0-9a-f]{5,40}", re.IGNORECASE)
_MOVED: dict[Kind, dict[str, str]] = {
    "model": {
        **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
        "distilgpt2": "distilbert/distilgpt2",
    },
    "dataset": {
        **{name: f"fancyzhx/{name}" for name in ("ag_news", "amazon_polarity", "dbpedia_14", "yelp_polarity")},
        **{name: f"stanfordnlp/{name}" for name in ("imdb", "sst2")},
        "banking77": "PolyAI/banking77",
        "emotion": "dair-ai/emotion",
        "glue": "nyu-mll/glue",
        "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
        "trec": "CogComp/trec",
        "tweet_eval": "cardiffnlp/tweet_eval",
        "yahoo_answers_topics": "community-datasets/yahoo_answers_topics",
        "yelp_review_full": "Yelp/yelp_review_full",
    },
}
"""Id of the hub's first years -> its present one. The hub redirects the first; caches hold both."""


@dataclass(frozen=True)
class Repository:
    """A model or a data set on the hub, at one revision."""

    kind: Kind
    name: str
    """`name` or `owner/name`."""
    revision: str | None = None
    """Branch, tag, or commit, which may be cut; None: the branch main."""


@dataclass(frozen=True)
class Copy:
    """One commit of a repository in the local cache."""

    directory: Path
    commit: str
    listing: tuple[str, ...] | None
    """Names of all files of this commit, if the cache has them; None: unknown."""


_chosen: dict[Repository, Path] = {}


def cache_directory() -> Path:
    """Return the root of the cache (HF_HUB_CACHE, or `hub` in HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(repository: Repository) -> Path:
    """Return the folder into which the hub's library downloads a repository."""
    return cache_directory() / _folder_name(repository.kind, repository.name)


def choose(repository: Repository, directory: Path) -> None:
    """Make `find_directory` return this directory from now on: another job may update the cache while this one reads."""
    _chosen[repository] = directory


@contextmanager
def keep_choices() -> Generator[None]:
    """Begin the block without choices of `choose`, and restore those of before at its end."""
    before = dict(_chosen)
    _chosen.clear()
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def find_directory(repository: Repository) -> Path | None:
    """Return the directory with the files of a repository; None: no copy is in the cache."""
    return _chosen.get(repository) or next((copy.directory for copy in find_copies(repository)), None)


def find_copies(repository: Repository) -> Iterator[Copy]:
    """Yield the copies of a repository at its revision. One folder per spelling of its id may be there, its own first."""
    for folder in _find_folders(repository):
        commit = _find_commit(folder, repository.revision)
        if commit is not None:
            yield Copy(folder / "snapshots" / commit, commit, _read_listing(folder / "trees" / f"{commit}.json"))


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a whole commit, which never changes."""
    return revision is not None and len(revision) == 40 and _COMMIT.fullmatch(revision) is not None


def find_built(repository: Repository, subset: str | None) -> Path | None:
    """Return the newest directory that the `datasets` library has built for a data set in its own cache, as arrow files."""
    from huggingface_hub import constants

    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    names = {_flat(name.replace("/", "___")) for name in _spellings(repository)}
    folders = [folder for folder in _list(root) if _flat(folder.name) in names]
    configs = [config for folder in folders for config in _list(folder) if config.is_dir()]
    wanted = subset or ("default" if any(config.name == "default" for config in configs) else None)
    if wanted is None and len({config.name for config in configs}) == 1:
        wanted = configs[0].name
    built = [path.parent for config in configs if config.name == wanted for path in config.glob("*/*/dataset_info.json")]
    if repository.revision not in (None, DEFAULT_BRANCH):
        # The library names the directory by the commit.
        commits = [copy.commit for copy in find_copies(repository)] or [str(repository.revision)]
        built = [path for path in built if any(path.name.startswith(commit) for commit in commits)]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def _spellings(repository: Repository) -> list[str]:
    """Return the ids by which a cache may hold the repository: its own first."""
    moved, name = _MOVED[repository.kind], repository.name
    others = [present for first, present in moved.items() if first == name.lower()]
    others += [first for first, present in moved.items() if present.lower() == name.lower()]
    return [name, *others]


def _folder_name(kind: Kind, name: str) -> str:
    return f"{kind}s--{name.replace('/', '--')}"


def _find_folders(repository: Repository) -> list[Path]:
    names = [_folder_name(repository.kind, name) for name in _spellings(repository)]
    lower = [name.lower() for name in names]
    # The hub ignores case.
    found = [folder for folder in _list(cache_directory()) if folder.name.lower() in lower]
    return sorted(found, key=lambda folder: (folder.name not in names, lower.index(folder.name.lower()), folder.name))


def _find_commit(folder: Path, revision: str | None) -> str | None:
    """Return the commit of a revision, if its files are in the cache."""
    commits = [path.name for path in _list(folder / "snapshots") if path.is_dir()]
    try:
        commit = (folder / "refs" / (revision or DEFAULT_BRANCH)).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = None
    if commit is not None:
        return commit if commit in commits else None
    if revision in (None, DEFAULT_BRANCH):
        # A cache that was copied without its refs.
        return commits[0] if len(commits) == 1 else None
    matches = [each for each in commits if _COMMIT.fullmatch(str(revision)) and each.startswith(str(revision).lower())]
    return matches[0] if len(matches) == 1 else None


def _read_listing(path: Path) -> tuple[str, ...] | None:
    """Read the names of all files of a commit, which newer versions of huggingface_hub write."""
    try:
        return tuple(map(str, json.loads(path.read_bytes())["files"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _flat(name: str) -> str:
    """Return a name as it is without case and underscores: `datasets` writes BigNews as big_news."""
    owner, _, rest = name.lower().rpartition("___")
    return f"{owner.replace('_', '')}/{rest.replace('_', '')}"
