"""`--node_cache` in whole runs: what nodes share is read once per node, and where copies lie changes no bit of a result."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from watching import recorded, recording

from agnews_dist.report.event_log import read_run_log

STORY = [
    *(
        "--model.name",
        "embedded",
        "--data.source",
        "synthetic",
        "--optim.epochs",
        "2",
        "--batch.global_batch_size",
        "24",
    ),
    *("--data.limit_train", "240", "--data.limit_validation", "60", "--data.limit_test", "120"),
]
ON_DISK = ("--engine.feature_cache", "disk")
TWO_NODES = """
import os, sys
from agnews_dist import train
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", SLURM_TMPDIR=sys.argv[1] + os.environ["RANK"])
sys.exit(train.main(sys.argv[2:]))
"""
"""Two ranks of which each is a node of its own, as far as they can tell."""
TAKEN_FOR_A_DISK = """
import sys
from agnews_dist import train
from agnews_dist.features import cache
cache.is_memory = lambda _: False
sys.exit(train.main(sys.argv[1:]))
"""
"""A small file system is one in memory here."""
FULL_LATER = """
import errno, os, sys
from pathlib import Path
from agnews_dist import train
from agnews_dist.features.store import FeatureFile
node, write = Path(sys.argv[1]), FeatureFile._write
def fill(self, segment, rows):
    if os.environ["RANK"] == "1" and node in self.directory.parents:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(self, segment, rows)
FeatureFile._write = fill
sys.exit(train.main(sys.argv[2:]))
"""
"""A node's disk that others fill after its space was promised, as some file systems promise it."""


def words(cache: Path, run: Path, *more: object) -> list[str]:
    place = ("--data.cache_dir", cache, "--run.dir", run.parent, "--run.name", run.name)
    return [str(word) for word in (*STORY, *place, *more)]


def train(cache: Path, run: Path, *more: object) -> Path:
    warm.ranks(2, *recording(log_of(run), "agnews_dist.train"), *words(cache, run, *more))
    return run


def log_of(run: Path) -> Path:
    """Of the files that its ranks opened."""
    return run.with_suffix(".opened")


def check_same(found: Path, expected: Path) -> None:
    """To the last bit."""
    for file in ("predictions-validation.jsonl", "predictions-test.jsonl"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()
    scores = [json.loads((run / "result.json").read_text())["splits"] for run in (found, expected)]
    assert scores[0] == scores[1]


def facts(run: Path) -> dict[str, str]:
    (event,) = (each for each in read_run_log(run / "events.jsonl") if each["event"] == "RunStarted")
    return event["facts"]


def warnings(run: Path) -> list[str]:
    return [each["message"] for each in read_run_log(run / "events.jsonl") if each["event"] == "Warned"]


def features(cache: Path) -> dict[str, Path]:
    """Split -> the directory of its features."""
    return {json.loads((path / "about.json").read_text())["split"]: path for path in (cache / "features").iterdir()}


def num_segments(directory: Path) -> int:
    marks = list((directory / "marks").iterdir())
    assert all(mark.stat().st_size for mark in marks)
    return len(marks)


def tokens(cache: Path) -> Path:
    (meta,) = cache.glob("*/meta.json")
    return meta.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """(cache, run): two ranks without a node cache, which leave tokens and features on the disk that nodes share."""
    directory = tmp_path_factory.mktemp("plain")
    return directory / "cache", train(directory / "cache", directory / "run", *ON_DISK)


@pytest.fixture
def cache(plain, tmp_path) -> Path:
    """A cache of the test's own, as that run left it."""
    return Path(shutil.copytree(plain[0], tmp_path / "cache"))


def test_two_ranks_read_what_is_shared_once(plain, cache, tmp_path):
    token_files, kept = list(tokens(cache).iterdir()), features(cache)
    assert set(kept) == {"train", "validation", "test"}
    run = train(cache, tmp_path / "run", *ON_DISK, "--node_cache", tmp_path / "node")
    counted = recorded(log_of(run))
    assert [counted[file] for file in token_files] == [1] * len(token_files)
    for directory in kept.values():
        # A segment at a time, each by one of the ranks; what training reads in both epochs is the copy.
        assert counted[directory / "rows.bin"] == num_segments(directory)
        copy = tmp_path / "node" / "features" / directory.name
        assert (copy / "rows.bin").read_bytes() == (directory / "rows.bin").read_bytes()
        assert num_segments(copy) == num_segments(directory)
    check_same(run, plain[1])
    assert facts(run)["node cache"] == str(tmp_path / "node")
    assert facts(run)["features"].endswith("kept by a former run")
    assert warnings(run) == []

    again = train(cache, tmp_path / "again", *ON_DISK, "--node_cache", tmp_path / "node")
    check_same(again, plain[1])
    counted = recorded(log_of(again))
    assert not counted.keys() & {*token_files, *(directory / "rows.bin" for directory in kept.values())}
    assert counted.keys() & set((tmp_path / "node").rglob("rows.bin")), "all is on the node"


def test_two_nodes_share_the_computing_and_each_has_its_copy(plain, tmp_path):
    cache = tmp_path / "cache"
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    story = words(cache, tmp_path / "run", *ON_DISK, "--node_cache", "auto")
    warm.ranks(2, "-c", TWO_NODES, str(tmp_path / "node"), *story)
    check_same(tmp_path / "run", plain[1])
    kept = features(cache)
    assert {directory.name for directory in kept.values()} == {path.name for path in features(plain[0]).values()}
    for node in tmp_path.glob("node?/*"):
        for directory in kept.values():
            copy = node / "features" / directory.name
            assert num_segments(copy) == num_segments(directory) > 0
            assert (copy / "rows.bin").read_bytes() == (directory / "rows.bin").read_bytes()
        assert (node / tokens(cache).name / "meta.json").is_file()
    assert len(list(tmp_path.glob("node?/*"))) == 2


def test_damage_on_either_side_is_mended(plain, cache, tmp_path):
    node = tmp_path / "node"
    train(cache, tmp_path / "first", *ON_DISK, "--node_cache", node)
    name = features(cache)["train"].name
    for number, rows in enumerate((cache, node)):
        file = rows / "features" / name / "rows.bin"
        content = bytearray(whole := file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
        if rows == cache:
            shutil.rmtree(node / "features")
        check_same(train(cache, tmp_path / f"again{number}", *ON_DISK, "--node_cache", node), plain[1])
        assert file.read_bytes() == whole


@pytest.fixture
def small_node(tmp_path) -> Iterator[Path]:
    """A node's disk with room for the tokens, but not for the features."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here (it takes root)")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_without_room_on_the_node_the_shared_files_are_used(plain, cache, small_node, tmp_path):
    assert (features(cache)["train"] / "rows.bin").stat().st_size > 300 << 10
    run = tmp_path / "run"
    warm.ranks(2, "-c", TAKEN_FOR_A_DISK, *words(cache, run, *ON_DISK, "--node_cache", small_node))
    check_same(run, plain[1])
    (warning,) = warnings(run)
    assert warning == (
        f"no features can be kept in {small_node / 'features'} (No space left on device): they are read from "
        f"{cache / 'features'}."
    )
    assert (small_node / tokens(cache).name).is_dir()


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept by a former run", "to be computed"])
def test_a_copy_that_breaks_off_costs_nothing_that_is_shared(plain, cache, tmp_path, is_kept):
    node, kept = tmp_path / "node", features(cache)
    if not is_kept:
        shutil.rmtree(cache / "features")
    run = tmp_path / "run"
    warm.ranks(2, "-c", FULL_LATER, str(node), *words(cache, run, *ON_DISK, "--node_cache", node))
    check_same(run, plain[1])
    (warning,) = warnings(run)
    assert warning.startswith(
        f"no features can be kept in {node / 'features'} (No space left on device): they are read"
    )
    assert facts(run)["features"].startswith("disk: ")
    # Whole, as without a node's disk; what was copied of it is gone from there.
    whole = features(plain[0])
    assert {split: path.name for split, path in features(cache).items()} == {split: p.name for split, p in kept.items()}
    for split, directory in features(cache).items():
        assert num_segments(directory) == num_segments(whole[split])
        assert (directory / "rows.bin").read_bytes() == (whole[split] / "rows.bin").read_bytes()
    assert list((node / "features").iterdir()) == []


def test_copies_of_other_features_make_room(plain, cache, tmp_path):
    """A sweep over models does not fill the node's disk."""
    other = tmp_path / "node" / "features" / ("0" * 64)
    other.mkdir(parents=True)
    (other / "rows.bin").write_bytes(bytes(2 << 20))
    needed = sum((path / "rows.bin").stat().st_size for path in features(cache).values())
    limit = ("--engine.feature_cache_gigabytes", f"{(needed + (1 << 20)) / 1e9}")
    check_same(train(cache, tmp_path / "run", *ON_DISK, *limit, "--node_cache", tmp_path / "node"), plain[1])
    left = {path.name for path in (tmp_path / "node" / "features").iterdir()}
    assert left == {path.name for path in features(cache).values()}


def test_in_memory_features_are_held_as_without_a_disk(plain, cache, tmp_path):
    """Two ranks share them in the host's memory anyway: a second copy there would be a waste, and would outlive the job."""
    kept = features(cache)
    place = Path("/dev/shm") / f"test-node-cache-{os.getpid()}"
    try:
        run = train(cache, tmp_path / "run", "--node_cache", place)
        assert facts(run)["features"].startswith("host: ")
        assert [path.name for path in place.iterdir() if path.is_dir()] == [tokens(cache).name]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    counted = recorded(log_of(run))
    for split in ("train", "validation"):
        assert counted[kept[split] / "rows.bin"] == num_segments(kept[split]), "taken from the disk, once"
    check_same(run, plain[1])


def test_evaluation_reads_the_copy_too(plain, cache, tmp_path):
    story = [
        str(word)
        for word in ("--config", plain[1] / "config.yaml", "--model.name", plain[1], "--data.cache_dir", cache)
    ]
    # The tokens of the test split alone are a cache of their own.
    warm.ranks(2, "-m", "agnews_dist.evaluate", *story, "--output", str(tmp_path / "expected"))
    log = tmp_path / "opened"
    where = ("--node_cache", str(tmp_path / "node"), "--output", str(tmp_path / "scores"))
    warm.ranks(2, *recording(log, "agnews_dist.evaluate"), *story, *where)
    (copy,) = (meta.parent for meta in (tmp_path / "node").glob("*/meta.json"))
    counted, names = recorded(log), [path.name for path in copy.iterdir()]
    assert [counted[cache / copy.name / name] for name in names] == [1] * len(names)
    scores, expected = (tmp_path / name / "predictions-test.jsonl" for name in ("scores", "expected"))
    assert scores.read_bytes() == expected.read_bytes()
