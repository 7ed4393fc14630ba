"""Copies in the local cache of the hub: found under every spelling of an id and every kind of revision."""

from pathlib import Path

import pytest
from support.hub_server import cache_copy, use_hub

from agnews_dist.data.hub_cache import Kind, Repository, choose, find_built, find_copies, find_directory, is_commit

OLD, NEW = "0a1b2c3" + "0" * 33, "0a1b2c4" + "f" * 33


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_hub(monkeypatch, tmp_path, None)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "folder", "name"),
    [
        ("model", "models--gpt2", "gpt2"),
        ("model", "models--gpt2", "openai-community/gpt2"),
        ("model", "models--openai-community--gpt2", "gpt2"),
        ("model", "models--OpenAI-Community--GPT2", "openai-community/gpt2"),
        ("dataset", "datasets--ag_news", "fancyzhx/ag_news"),
        ("dataset", "datasets--fancyzhx--ag_news", "ag_news"),
        ("dataset", "datasets--fancyzhx--ag_news", "fancyzhx/AG_News"),
        ("dataset", "datasets--Me--News", "me/news"),
    ],
)
def test_a_copy_is_found_under_other_spellings_of_its_id(home: Path, kind: Kind, folder: str, name: str) -> None:
    directory = cache_copy(home, folder, {"README.md": b""})
    assert find_directory(Repository(kind, name)) == directory


@pytest.mark.parametrize("name", ["someone/gpt2", "gpt2-medium", "gpt"])
def test_another_repository_is_not_taken(home: Path, name: str) -> None:
    cache_copy(home, "models--gpt2", {"config.json": b""})
    cache_copy(home, "datasets--someone--gpt2", {"config.json": b""})
    assert find_directory(Repository("model", name)) is None


def test_the_own_spelling_comes_first(home: Path) -> None:
    other = cache_copy(home, "models--openai-community--gpt2", {"config.json": b""})
    own = cache_copy(home, "models--gpt2", {"config.json": b""})
    assert [copy.directory for copy in find_copies(Repository("model", "gpt2"))] == [own, other]
    assert [copy.directory for copy in find_copies(Repository("model", "openai-community/gpt2"))] == [other, own]


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, NEW), ("main", NEW), ("v1", OLD), ("refs/pr/1", OLD), (OLD, OLD), (OLD[:7], OLD), (NEW[:7].upper(), NEW)],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(home: Path, revision: str | None, commit: str) -> None:
    cache_copy(home, "models--gpt2", {"config.json": b""}, commit=NEW)
    for tag in ("v1", "refs/pr/1"):
        cache_copy(home, "models--gpt2", {"config.json": b""}, commit=OLD, ref=tag)
    directory = find_directory(Repository("model", "gpt2", revision))
    assert directory is not None
    assert directory.name == commit


@pytest.mark.parametrize("revision", ["v2", "0a1b2c", "0a1b", "1" * 40, None])
def test_an_unknown_or_ambiguous_revision_is_not_guessed(home: Path, revision: str | None) -> None:
    for commit in (OLD, NEW):
        cache_copy(home, "models--gpt2", {"config.json": b""}, commit=commit, ref=None)
    assert find_directory(Repository("model", "gpt2", revision)) is None


def test_a_cache_without_refs_has_its_only_commit(home: Path) -> None:
    directory = cache_copy(home, "models--gpt2", {"config.json": b""}, ref=None)
    assert find_directory(Repository("model", "gpt2")) == directory


def test_a_chosen_directory_stays_although_the_cache_changes(home: Path) -> None:
    repository, first = Repository("model", "gpt2"), cache_copy(home, "models--gpt2", {"config.json": b""})
    choose(repository, first)
    cache_copy(home, "models--gpt2", {"config.json": b""}, commit=NEW)
    assert find_directory(repository) == first


def test_a_listing_of_the_commit_is_read_and_a_damaged_one_ignored(home: Path) -> None:
    directory = cache_copy(home, "models--gpt2", {"config.json": b""}, commit=NEW)
    listing = directory.parents[1] / "trees" / f"{NEW}.json"
    listing.parent.mkdir()
    for content, names in (('{"files": {"a": {}, "b/c": {}}}', ("a", "b/c")), ("{", None), ("[]", None)):
        listing.write_text(content)
        [copy] = find_copies(Repository("model", "gpt2"))
        assert copy.listing == names


def test_only_a_whole_commit_is_one() -> None:
    assert is_commit(OLD)
    assert not any(is_commit(other) for other in (None, "main", OLD[:7], "x" * 40))


@pytest.mark.parametrize(
    ("name", "revision", "subset", "expected"),
    [
        ("me/BigNews", None, None, "default/0.0.0/abc"),
        ("ME/big_news", "main", None, "default/0.0.0/abc"),
        ("me/BigNews", "abc", None, "default/0.0.0/abc"),
        ("me/BigNews", "abd", None, None),
        ("me/BigNews", None, "de", "de/0.0.0/abc"),
        ("me/BigNews", None, "fr", None),
        ("you/BigNews", None, None, None),
    ],
)
def test_what_datasets_has_built_is_found(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None, subset: str | None, expected: str | None
) -> None:
    for config in ("default", "de"):
        folder = home / "built" / "me___big_news" / config / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "built"))
    found = find_built(Repository("dataset", name, revision), subset)
    assert found == (home / "built" / "me___big_news" / expected if expected else None)
