"""The feature cache through the real door: the same results wherever features are kept, and whatever happens to the files."""

import fcntl
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support import fork_server
from support.events import read_events
from support.processes import REPOSITORY, environment
from transformers import GPT2Model

from agnews_dist.model.embedded import embedded_config, embedded_tokenizer, scale_embeddings

STORY = [
    *("train", "--data.source", "synthetic", "--optim.epochs", "3"),
    *("--data.limit_train", "240", "--data.limit_validation", "60", "--data.limit_test", "240"),
    *("--batch.global_batch_size", "12", "--optim.lr", "3e-3"),
]
ON_DISK = ("--engine.feature_cache", "disk")
PLACES = ("off", "host", "device", "disk")


@dataclass(frozen=True)
class Run:
    """What a training left behind it."""

    directory: Path
    out: str

    @property
    def result(self) -> dict:
        return json.loads((self.directory / "result.json").read_text(encoding="utf-8"))

    @property
    def scores(self) -> dict:
        return self.result["splits"]

    @property
    def predictions(self) -> dict[str, bytes]:
        names = ("validation", "test")
        return {name: (self.directory / f"predictions-{name}.jsonl").read_bytes() for name in names}

    @property
    def probabilities(self) -> np.ndarray:
        rows = b"".join(self.predictions.values()).splitlines()
        return np.array([json.loads(row)["probabilities"] for row in rows])

    def said(self, event: str) -> list[dict]:
        return [each for each in read_events(self.directory / "events.jsonl") if each["event"] == event]

    @property
    def header(self) -> str:
        """Where features are, and why."""
        return self.said("RunStarted")[0]["facts"]["features"]

    @property
    def warnings(self) -> list[str]:
        return [each["message"] for each in self.said("Warned")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded model without dropout, whose masks would tell numbers of ranks and kinds of paths apart."""
    directory = tmp_path_factory.mktemp("model")
    config = embedded_config()
    config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        gpt2 = GPT2Model(config)
    scale_embeddings(gpt2)
    gpt2.save_pretrained(directory)
    embedded_tokenizer().save_pretrained(directory)
    return directory


Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(model) -> Words:
    def story(directory: Path, name: str, *more: object) -> list[str]:
        """Of a training; words given later win; `directory` holds runs and cache."""
        place = ("--run.dir", directory, "--run.name", name, "--data.cache_dir", directory / "cache")
        return [str(word) for word in (*STORY, "--model.name", model, *place, *more)]

    return story


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def tell() -> Callable[[list[str]], tuple[int, str, str]]:
    """Run a command in a forked process; return exit code, standard output and standard error."""

    def run(words: list[str]) -> tuple[int, str, str]:
        done = fork_server.run_python("-m", "agnews_dist", *words, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def train(tell, words) -> Train:
    def run(directory: Path, name: str, *more: object) -> Run:
        code, out, err = tell(words(directory, name, *more))
        assert (code, err) == (0, ""), err
        return Run(directory / name, out)

    return run


def cache_of(directory: Path) -> Path:
    return directory / "cache" / "features"


def present(pattern: str) -> list[Path]:
    """What matches at this moment; `Path.glob` fails where a job takes a directory away meanwhile."""
    return [Path(found) for found in glob.glob(pattern)]  # noqa: PTH207


def finished(directory: Path) -> dict[Path, int]:
    """The segments that are there, and when each was written."""
    marks = present(f"{cache_of(directory)}/*/marks/*")
    return {mark.relative_to(directory): mark.stat().st_mtime_ns for mark in marks if mark.stat().st_size}


@dataclass(frozen=True)
class Places:
    """One process trained once for each place."""

    directory: Path
    found: dict[str, Run]
    caches: dict[str, Path]
    """Split -> the directory of its features on disk."""
    num_segments: int
    """Of all splits."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train) -> Places:
    directory = tmp_path_factory.mktemp("places")
    found = {place: train(directory, place, "--engine.feature_cache", place) for place in PLACES}
    caches = {about(path)["split"]: path for path in cache_of(directory).iterdir()}
    return Places(directory, found, caches, len(finished(directory)))


def about(cache: Path) -> dict:
    return json.loads((cache / "about.json").read_text(encoding="utf-8"))


def check_same(found: Run, expected: Run) -> None:
    """To the last bit."""
    assert found.scores == expected.scores
    assert found.predictions == expected.predictions


def check_close(found: Run, expected: Run, *, tolerance: float = 1e-5) -> None:
    """Other sums, so other last bits; the same answers."""
    for split, scores in expected.scores.items():
        assert found.scores[split]["num_correct"] == scores["num_correct"]
        assert found.scores[split]["loss"] == pytest.approx(scores["loss"], abs=tolerance)
    assert found.probabilities == pytest.approx(expected.probabilities, abs=10 * tolerance)


def test_every_place_gives_the_same_results(runs):
    found = runs.found
    for place in PLACES:
        assert found[place].header.startswith(f"{place}: ")
        assert found[place].warnings == []
    check_same(found["device"], found["host"])
    check_same(found["disk"], found["host"])
    # Computed at every use in calls of its own batch.
    check_close(found["off"], found["host"])
    assert found["host"].scores["test"]["accuracy"] > 0.35, "better than chance, so that the results mean something"


def test_header_and_result_say_where_features_are_and_why(runs):
    found = runs.found
    assert found["off"].header == "off: as asked: computed anew at every use"
    for place in ("host", "device", "disk"):
        assert found[place].header.endswith("MB, as asked")
        assert "features" in found[place].out
        assert found[place].result["feature_cache"] == place
    assert found["off"].result["feature_cache"] == "off"


@pytest.fixture(scope="module")
def reused(runs, train) -> Run:
    """Another seed, learning rate and batch size, one epoch, `auto`."""
    directory = runs.directory
    others = ("--run.seed", 5, "--optim.lr", "1e-3", "--batch.global_batch_size", 16, "--optim.epochs", 1)
    before = finished(directory)
    run = train(directory, "other", *others)
    assert len(before) > 50
    assert finished(directory) == before, "no segment was computed or written again"
    return run


def test_later_runs_find_the_features_whatever_trains_on_them(runs, reused, train, tmp_path):
    directory, found = runs.directory, runs.found
    assert reused.header.startswith("disk: ")
    assert reused.header.endswith("kept by a former run")
    assert reused.scores != found["disk"].scores, "it is another training"
    before = finished(directory)
    check_same(train(directory, "again", "--engine.feature_cache", "disk"), found["host"])
    assert finished(directory) == before
    # Fewer rows of one split leave the features of the others as they are.
    train(directory, "fewer", *ON_DISK, "--data.limit_test", 30, "--optim.epochs", 1)
    after = finished(directory)
    assert before.items() < after.items()
    assert len({name.parts[2] for name in after}) == 4
    # The negative control: what the features are a function of makes new ones.
    other = ("--model.trainable_blocks", 2, "--optim.epochs", 1)
    train(tmp_path, "two-blocks", *ON_DISK, *other, "--data.cache_dir", directory / "cache")
    assert len({name.parts[2] for name in finished(directory)}) == 7


def test_a_run_that_keeps_nothing_on_disk_takes_what_is_there(runs, reused, train):
    directory, found = runs.directory, runs.found
    before = finished(directory)
    check_same(train(directory, "host-from-disk", "--engine.feature_cache", "host"), found["host"])
    assert finished(directory) == before


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "gone", "no mark", "a foreign mark"])
def test_damaged_files_are_mended_and_the_result_is_the_same(runs, reused, train, damage):
    directory, found = runs.directory, runs.found
    train_cache = runs.caches["train"]
    rows, before = train_cache / "rows.bin", finished(directory)
    content = rows.read_bytes()
    mark = sorted((train_cache / "marks").iterdir())[3]
    if damage == "a flipped bit":
        flip(rows, len(content) // 2 + 3)
    elif damage == "cut off":
        os.truncate(rows, len(content) * 3 // 4)
    elif damage == "gone":
        rows.unlink()
    elif damage == "no mark":
        mark.unlink()
    else:
        mark.write_text("f" * 64)
    run = train(directory, f"mended-{damage.replace(' ', '-')}", "--engine.feature_cache", "disk")
    check_same(run, found["host"])
    assert rows.read_bytes() == content
    again = {name: when for name, when in finished(directory).items() if before[name] != when}
    assert set(again) <= {name for name in before if train_cache.name in name.parts}
    num_segments = len(list((train_cache / "marks").iterdir()))
    expected = {"a flipped bit": 1, "no mark": 1, "a foreign mark": 1, "gone": num_segments}.get(
        damage, num_segments // 4
    )
    assert len(again) == pytest.approx(expected, rel=0.2), "what was whole is not computed again"


def test_a_limit_that_is_too_low_is_named_and_nothing_is_lost(tmp_path, runs, train):
    found = runs.found
    low = ("--engine.feature_cache", "disk", "--engine.feature_cache_gigabytes", "0.001")
    run = train(tmp_path, "low", *low)
    check_same(run, found["host"])
    (warning,) = run.warnings
    assert warning.startswith("engine.feature_cache disk: ")
    assert "exceed engine.feature_cache_gigabytes (1 MB): kept in host instead" in warning
    assert run.header.startswith("host: ")
    assert not list(cache_of(tmp_path).glob("*"))


@pytest.fixture
def small_disk(tmp_path, runs) -> Iterator[Path]:
    """A file system in memory with room for the features that training needs, but not for those of the test split too."""
    sizes = {split: about(cache)["bytes"] for split, cache in runs.caches.items()}
    needed = sizes["train"] + sizes["validation"]
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    size = int(needed / 0.9) + 600_000
    assert needed + sizes["test"] > size > needed / 0.9
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_point)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here (it takes root)")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_a_full_disk_costs_a_warning_and_nothing_else(small_disk, tmp_path, runs, train):
    found = runs.found
    run = train(tmp_path, "full", "--data.cache_dir", small_disk, "--engine.feature_cache", "disk")
    check_same(run, found["host"])
    assert run.header == f"disk: {found['disk'].header.removeprefix('disk: ')}", "it seemed to fit"
    (warning,) = run.warnings
    assert warning.startswith("features cannot be kept in disk (No space left on device): nothing is lost, ")
    assert "the run goes on with features in host (" in warning
    assert "Free some space, or set another --data.cache_dir or --engine.feature_cache." in warning
    assert run.result["feature_cache"] == "host"
    assert not list((small_disk / "features").glob("*")), "what could not be finished does not take the space of others"


def test_the_plain_path_is_the_reference_and_keeps_nothing(tmp_path, runs, train, tell, words):
    directory, found = runs.directory, runs.found
    plain = train(directory, "plain", "--engine.fast_path", "false")
    check_close(plain, found["host"])
    assert plain.header == "off: the plain path computes them at every step"
    assert plain.probabilities.tolist() != found["off"].probabilities.tolist(), "it is another computation"
    data = ("--data.source", "synthetic", "--data.cache_dir", str(directory / "cache"), "--data.limit_test", "240")
    for number, fast_path in enumerate(("true", "false")):
        model = ("--model.name", str(directory / "host"), "--engine.fast_path", fast_path)
        output = tmp_path / f"scores-{number}"
        code, _, err = tell(["evaluate", *model, *data, "--output", str(output)])
        assert code == 0, err
        scores = json.loads((output / "result.json").read_text())["splits"]["test"]
        assert scores["num_correct"] == found["host"].scores["test"]["num_correct"]
        assert scores["loss"] == pytest.approx(found["host"].scores["test"]["loss"], abs=1e-5)
    code, out, err = tell(
        ["predict", *model, "--format", "jsonl", "shares fell on profit fears", "a goal in extra time"]
    )
    assert (code, len(out.splitlines())) == (0, 2), err
    code, out, err = tell(["plan", *words(tmp_path, "planned", "--engine.fast_path", "false")[1:], "--json"])
    assert code == 0, err
    assert json.loads(out)["num_epochs"] == 3


@pytest.mark.parametrize("wanted", ["device", "host", "disk"])
def test_the_plain_path_with_a_cache_contradicts_itself(tmp_path, tell, wanted, words):
    code, _, err = tell(words(tmp_path, "never", "--engine.fast_path", "false", "--engine.feature_cache", wanted))
    assert code == 2
    assert f"engine.feature_cache {wanted} with engine.fast_path false: the plain path is the reference" in err
    assert "Leave feature_cache at auto, or the fast path on." in err
    assert not (tmp_path / "never").exists()


# Several processes


def start(story: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "agnews_dist", *story]
    return subprocess.Popen(
        command, env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    try:
        while not condition():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.001)
    except BaseException:
        process.terminate()  # torchrun passes it on to its ranks
        process.communicate()
        raise


def test_two_trainings_at_once_fill_one_empty_cache(tmp_path, runs, words):
    found = runs.found
    processes = [start(words(tmp_path, name, *ON_DISK)) for name in ("one", "two")]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    for name in ("one", "two"):
        run = Run(tmp_path / name, "")
        check_same(run, found["host"])
        assert run.result["feature_cache"] == "disk"
    assert len(list(cache_of(tmp_path).iterdir())) == 3


def test_a_builder_that_was_killed_is_taken_up_where_it_was(tmp_path, runs, train, words):
    whole = runs.num_segments
    for attempt in range(3):  # on a busy machine this process may come too late
        directory = tmp_path / str(attempt)
        killed = start(words(directory, "killed", *ON_DISK))
        until(lambda directory=directory: len(finished(directory)) >= 3, killed)
        killed.kill()
        killed.communicate()
        before = finished(directory)
        if len(before) < whole - 10:
            break
    assert 3 <= len(before) < whole - 10, "it was killed before it was done"
    check_same(train(directory, "resumed", *ON_DISK), runs.found["host"])
    after = finished(directory)
    assert before.items() <= after.items(), "what was finished was not computed again"
    assert len(after) == whole


SHARED_MEMORY = Path("/dev/shm") / f"agnews_dist-{os.getuid()}"


def shared_jobs(keys: set[str]) -> set[str]:
    """Jobs of this user whose shared memory holds one of these features."""
    return {path.parent.name for path in present(f"{SHARED_MEMORY}/*/*") if path.name in keys}


@pytest.fixture
def left_in_shared_memory() -> Iterator[tuple[Path, Path]]:
    """What a killed job left, and what a living one (this process) uses."""
    dead, alive = (SHARED_MEMORY / f"test-{name}-{os.getpid()}" / ("0" * 64) for name in ("dead", "alive"))
    for directory in (dead, alive):
        directory.mkdir(parents=True)
        (directory / "in-use").touch()
        (directory / "rows.bin").write_bytes(b"x" * 1000)
    with (alive / "in-use").open() as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        yield dead, alive
    for directory in (dead, alive):
        shutil.rmtree(directory.parent, ignore_errors=True)


def killed_in_shared_memory(story: list[str], keys: set[str]) -> set[str]:
    """Kill a job of two ranks, and what launched it, while its features still have names; those that stay behind."""
    before = shared_jobs(keys)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen(
        [*launcher, "-m", "agnews_dist.train", *story],
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: bool(shared_jobs(keys) - before), job)
    everybody = [job, *psutil.Process(job.pid).children(recursive=True)]
    for process in everybody:
        process.send_signal(signal.SIGKILL)
    job.wait()
    psutil.wait_procs(everybody[1:], timeout=30)
    return shared_jobs(keys) - before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory with names here")
def test_two_ranks_share_the_hosts_memory_and_leave_nothing_there(tmp_path, runs, words, left_in_shared_memory):
    keys = {path.name for path in runs.caches.values()}
    dead, alive = left_in_shared_memory

    def two_ranks(name: str, wanted: str) -> Run:
        story = words(tmp_path, name, "--engine.feature_cache", wanted)
        done = fork_server.run_ranks(2, "-m", "agnews_dist.train", *story[1:])
        return Run(tmp_path / name, done.stdout)

    before = shared_jobs(keys)
    # So many rows that there is time; the features of the validation split have their names from the start.
    many = ("--data.limit_train", 4000, "--engine.feature_cache", "host")
    story = words(tmp_path, "killed", *many, "--run.overwrite")[1:]
    # Again if another test's training has swept it meanwhile, as every training does at its start.
    left = next(filter(None, (killed_in_shared_memory(story, keys) for _ in range(4))), set())
    assert len(left) == 1, "the case is a job that was killed before it took the names away"
    host = two_ranks("host", "host")
    assert host.header.endswith("MB, as asked")
    assert not shared_jobs(keys) - before, "neither its own nor those of the killed job"
    assert not dead.parent.exists()
    assert (alive / "rows.bin").exists(), "who is alive keeps what it uses"
    check_close(host, runs.found["host"])

    check_same(two_ranks("disk", "disk"), host)
    device = two_ranks("device", "device")
    check_close(device, host)
    # Each rank computes what it holds: unequal shares, and the result says so.
    assert device.result["rank_balance"] < host.result["rank_balance"]
