"""Command `cache`: lists for people and programs, removal by name, caches in use are kept."""

import json
import os
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import in_a_terminal, python

from agnews_dist.__main__ import main
from agnews_dist.data.token_cache import CachedTokens, TokenSplit, publish, read_tokens, write_tokens
from agnews_dist.features.store import FeatureFile
from agnews_dist.storage.locks import try_lock

FEATURES, UNFINISHED, TOKENS = "a1" * 32, "a2" * 32, "b3" * 32


def make_features(root: Path, key: str, *, is_whole: bool = True) -> FeatureFile:
    about = {"model": "gpt2", "texts": 1200, "tokens": 34567}
    file = FeatureFile(root / "features" / key, key=key, bounds_S=[0, 4, 8], width=1024, dtype=torch.float32, about=about)
    file.allocate()
    if is_whole:
        file.make_worker(lambda segment: torch.ones(4, 1024))()
    file.close()
    return file


def make_tokens(root: Path, key: str) -> Path:
    offsets, labels = np.array([0, 3, 5]), np.array([0, 1])
    split = TokenSplit("train", np.arange(5, dtype=np.uint16), offsets, labels, 0)
    root.mkdir(parents=True, exist_ok=True)
    publish(root / key, lambda directory: write_tokens(directory, CachedTokens({"train": split}, ("a", "b"), (), ()), key))
    return root / key


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "cache"
    make_features(root, FEATURES)
    make_features(root, UNFINISHED, is_whole=False)
    make_tokens(root, TOKENS)
    for path in (root / "features" / FEATURES / "in-use", root / "features" / UNFINISHED / "in-use", root / TOKENS):
        os.utime(path, (1e9, 1e9))
    return root


def run_cache(capsys, root: Path, *arguments: str) -> str:
    code = main(["cache", "--data.cache_dir", str(root), *arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def run_json(capsys, root: Path, *arguments: str) -> dict[str, dict]:
    found = json.loads(run_cache(capsys, root, "--json", *arguments))
    assert found["directory"] == str(root)
    assert found["total_bytes"] == sum(each["disk_bytes"] for each in found["caches"])
    return {each["key"]: each for each in found["caches"]}


def list_directories(root: Path) -> set[str]:
    places = [*root.iterdir(), *(root / "features").iterdir()]
    return {path.name for path in places if path.is_dir()} - {"features"}


def test_json_has_all_facts(root, capsys):
    found = run_json(capsys, root)
    assert set(found) == {FEATURES, UNFINISHED, TOKENS}
    assert [each["state"] for each in found.values()] == ["complete", "unfinished", "complete"]
    assert {each["last_used"] for each in found.values()} == {1e9}
    whole = found[FEATURES]
    assert (whole["kind"], whole["path"]) == ("features", str(root / "features" / FEATURES))
    assert whole["what"] == "gpt2, 1,200 texts, 34,567 tokens"
    assert whole["disk_bytes"] >= 8 * 1024 * 4
    assert (found[TOKENS]["kind"], found[TOKENS]["path"]) == ("tokens", str(root / TOKENS))
    assert found[TOKENS]["what"] == "train: 2 texts, 5 tokens"
    assert found[TOKENS]["disk_bytes"] > 0
    assert "outcome" not in whole


def test_a_pipe_gets_lines(root, capsys):
    *lines, total = run_cache(capsys, root).splitlines()
    assert len(lines) == 3
    assert re.match(rf"features  {FEATURES[:12]}  \d+ kB  2001-09-0\d \d\d:\d\d  complete  gpt2, 1,200 texts", lines[0])
    assert "  unfinished  " in lines[1]
    assert lines[2].endswith(f"complete  train: 2 texts, 5 tokens  {root / TOKENS}")
    assert re.match(rf"\d+ kB below {re.escape(str(root))}; features \d+ kB of the 100\.0 GB that engine", total)
    limited = run_cache(capsys, root, "--engine.feature_cache_gigabytes", "2.5").splitlines()[-1]
    assert "of the 2.5 GB that engine.feature_cache_gigabytes allows" in limited


@pytest.mark.slow
def test_a_terminal_gets_a_table(root):
    written = in_a_terminal("-m", "agnews_dist", "cache", "--data.cache_dir", str(root), COLUMNS="120")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert re.search(r"cache +key +size +last used +state +of", text)
    assert re.search(rf"features +{FEATURES[:12]} +\d+ kB +2001-09-0\d .*complete +gpt2, 1,200", text)
    # Control: a pipe gets no table.
    piped = python("-m", "agnews_dist", "cache", "--data.cache_dir", str(root)).stdout
    assert "last used" not in piped
    assert "\x1b" not in piped


def test_states_of_caches_in_use(root, capsys):
    reader = make_features(root, FEATURES)
    builder = make_features(root, UNFINISHED, is_whole=False)
    reader.lock()
    builder.lock()
    with closing(try_lock(root / f"{TOKENS}.lock")):
        found = run_json(capsys, root)
    assert {key: each["state"] for key, each in found.items()} == {
        FEATURES: "in use",
        UNFINISHED: "being built",
        TOKENS: "being built",
    }
    reader.close()
    builder.close()
    assert {each["state"] for each in run_json(capsys, root).values()} == {"complete", "unfinished"}


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["all"], set()),
        (["features"], {TOKENS}),
        (["tokens"], {FEATURES, UNFINISHED}),
        ([UNFINISHED], {FEATURES, TOKENS}),
        (["b3b3", "a2"], {FEATURES}),
    ],
    ids=["all", "features", "tokens", "a key", "short keys"],
)
def test_clear_removes_only_the_named_caches(root, capsys, names, kept):
    lines = run_cache(capsys, root, "--clear", *names).splitlines()
    assert list_directories(root) == kept
    assert len(lines) == 3 - len(kept)
    assert all("  removed  " in line for line in lines)


@pytest.mark.parametrize("names", [["all"], [FEATURES[:12]]], ids=["all", "key"])
def test_clear_keeps_features_in_use(root, capsys, names):
    reader = make_features(root, FEATURES)
    reader.lock()
    found = run_json(capsys, root, "--clear", *names)
    assert found[FEATURES]["outcome"] == "kept: in use"
    assert FEATURES in list_directories(root)
    reader.close()
    assert run_json(capsys, root, "--clear", *names)[FEATURES]["outcome"] == "removed"
    assert FEATURES not in list_directories(root)


def test_clear_keeps_tokens_being_opened_or_built(root, capsys):
    with closing(try_lock(root / f"{TOKENS}.lock")):
        assert run_json(capsys, root, "--clear", "tokens")[TOKENS]["outcome"] == "kept: in use"
        assert read_tokens(root / TOKENS).splits["train"].tokens.tolist() == [0, 1, 2, 3, 4]
    assert run_json(capsys, root, "--clear", "tokens")[TOKENS]["outcome"] == "removed"
    assert TOKENS not in list_directories(root)


def test_clear_removes_leftovers_of_killed_processes(root, capsys):
    key = "c4" * 32
    building = root / f"{key}.building-elsewhere-1-0a"
    building.mkdir()
    trash = root / "features" / ".trash-0a"
    trash.mkdir()
    assert run_json(capsys, root)[key]["state"] == "unfinished"
    # A builder on another machine may be alive.
    assert run_json(capsys, root, "--clear", "all")[key]["outcome"].startswith("kept: in use")
    assert building.is_dir()
    assert not trash.exists()
    os.utime(building, (0, 0))
    assert run_json(capsys, root, "--clear", "all")[key]["outcome"] == "removed"
    assert list_directories(root) == set()


def test_opening_tokens_updates_their_last_use(root, capsys):
    assert run_json(capsys, root)[TOKENS]["last_used"] == 1e9
    read_tokens(root / TOKENS)
    assert run_json(capsys, root)[TOKENS]["last_used"] > 1.7e9


def test_other_files_are_neither_listed_nor_removed(root, capsys):
    (root / "notes").mkdir()
    (root / "features" / "notes").mkdir()
    (root / TOKENS / "meta.json").write_text("[1]")
    found = run_json(capsys, root, "--clear", "all")
    assert set(found) == {FEATURES, UNFINISHED, TOKENS}
    assert found[TOKENS]["what"] == ""
    assert list_directories(root) == {"notes"}
    assert (root / "features" / "notes").is_dir()


def test_control_characters_are_escaped(root, capsys):
    about = root / "features" / FEATURES / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "model": "gpt2\x1b[31m"}))
    out = run_cache(capsys, root)
    assert "\x1b" not in out
    assert r"gpt2\x1b[31m, 1,200" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all"], r"error: 'all' without --clear: a list shows everything\. Write --clear all\."),
        (["--clear"], r"error: --clear without a name: it would remove nothing\. Name all, features, tokens or keys"),
        (["--clear", "featurs"], r"error: --clear 'featurs' is not the key of a cache: .* Did you mean 'features'\?"),
        (["--clear", "a"], r"error: --clear 'a' begins 2 keys: nothing was removed\. .* Write more of the key\."),
        (["--clear", "all", "ffff"], r"error: --clear 'ffff' is not the key of a cache: nothing was removed\. Name all"),
    ],
)
def test_bad_names_are_refused_before_any_removal(root, capsys, arguments, message):
    assert main(["cache", "--data.cache_dir", str(root), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(message, err)
    assert list_directories(root) == {FEATURES, UNFINISHED, TOKENS}


def test_a_missing_directory_has_no_caches(tmp_path, capsys):
    assert run_cache(capsys, tmp_path / "nowhere") == f"no cache below {tmp_path / 'nowhere'}\n"
    assert run_json(capsys, tmp_path / "nowhere") == {}
    assert run_cache(capsys, tmp_path / "nowhere", "--clear", "all") == f"no cache below {tmp_path / 'nowhere'}\n"
    assert not (tmp_path / "nowhere").exists()


def test_an_unreadable_directory_is_a_user_error(tmp_path, capsys):
    directory = tmp_path / ("x" * 300)  # a name that is too long is an error for root too
    assert main(["cache", "--data.cache_dir", str(directory)]) == 1
    message = r"error: data.cache_dir '.*': the directory cannot be read \(File name too long\). Set --data.cache_dir"
    assert re.match(message, capsys.readouterr().err)


@pytest.mark.slow
def test_listing_needs_no_torch(root):
    code = (
        "import sys\nfrom agnews_dist.__main__ import main\n"
        f"assert main(['cache', '--data.cache_dir', {str(root)!r}]) == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    *lines, loaded = python("-c", code).stdout.splitlines()
    assert len(lines) == 4
    assert loaded == "[]"


def test_only_rank_0_lists_and_removes(root, capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run_cache(capsys, root, "--clear", "all") == ""
    assert list_directories(root) == {FEATURES, UNFINISHED, TOKENS}
