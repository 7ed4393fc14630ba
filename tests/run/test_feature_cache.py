"""The feature cache through the command line: the same results for every place, and after any damage to the files."""

import fcntl
import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server, small_run
from support.events import read_events
from support.jobs import ForkedJob
from support.processes import wait_until
from transformers import GPT2Model

from agnews_dist.data.token_cache import read_tokens
from agnews_dist.model.embedded import embedded_config, embedded_tokenizer, scale_embeddings

TRAINING = [
    *("train", "--optim.epochs", "3", "--batch.global_batch_size", "12", "--optim.lr", "3e-3"),
    *("--data.limit_train", "240", "--data.limit_validation", "60"),
]
ON_DISK = ("--engine.feature_cache", "disk")
PLACES = ("off", "host", "device", "disk")


@dataclass(frozen=True)
class Run:
    """The files and the output of a training."""

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

    def events(self, kind: str) -> list[dict]:
        return read_events(self.directory / "events.jsonl", kind)

    @property
    def header(self) -> str:
        """The place of the features and the reason for it."""
        return self.events("RunStarted")[0]["facts"]["features"]

    @property
    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events("Warned")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded model without dropout, as masks would differ between paths."""
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


Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(model) -> Arguments:
    def make(directory: Path, name: str, *more: object) -> list[str]:
        """Return the arguments of a training with runs and cache in `directory`; later arguments override."""
        place = ("--run.dir", directory, "--run.name", name, "--data.cache_dir", directory / "cache")
        inputs = ("--data.source", small_run.write_inputs() / "rows", "--model.name", model)
        return [str(argument) for argument in (*TRAINING, *inputs, *place, *more)]

    return make


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def run_command() -> Callable[[list[str]], tuple[int, str, str]]:
    """Run a command in a forked process; return exit code, standard output and standard error."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        done = fork_server.run_python("-m", "agnews_dist", *arguments, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def train(run_command, arguments) -> Train:
    def run(directory: Path, name: str, *more: object) -> Run:
        code, out, err = run_command(arguments(directory, name, *more))
        assert (code, err) == (0, ""), err
        return Run(directory / name, out)

    return run


def cache_of(directory: Path) -> Path:
    return directory / "cache" / "features"


def match_paths(pattern: str) -> list[Path]:
    """Return the paths that match. `Path.glob` fails if a job removes a directory meanwhile."""
    return [Path(found) for found in glob.glob(pattern)]  # noqa: PTH207


SHA256_CHARACTERS = 64


def finished_segments(directory: Path) -> dict[Path, int]:
    """Return the finished segments and the time of each; the mark of an unfinished one may name a process."""
    marks = match_paths(f"{cache_of(directory)}/*/marks/*")
    return {mark.relative_to(directory): mark.stat().st_mtime_ns for mark in marks if mark.stat().st_size == SHA256_CHARACTERS}


@dataclass(frozen=True)
class Places:
    """One training for each place."""

    directory: Path
    by_place: dict[str, Run]
    cache: Path
    """Directory of the features on disk."""
    num_segments: int
    """Number of its segments."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train) -> Places:
    directory = tmp_path_factory.mktemp("places")
    found = {place: train(directory, place, "--engine.feature_cache", place) for place in PLACES}
    (cache,) = cache_of(directory).iterdir()
    return Places(directory, found, cache, len(finished_segments(directory)))


def check_same(found: Run, expected: Run) -> None:
    """Compare two runs bit for bit."""
    assert found.scores == expected.scores
    assert found.predictions == expected.predictions


def check_close(found: Run, expected: Run, *, tolerance: float = 1e-5) -> None:
    """Compare two runs whose sums have another order, and so other last bits."""
    for split, scores in expected.scores.items():
        assert found.scores[split]["num_correct"] == scores["num_correct"]
        assert found.scores[split]["loss"] == pytest.approx(scores["loss"], abs=tolerance)
    assert found.probabilities == pytest.approx(expected.probabilities, abs=10 * tolerance)


def test_every_place_gives_the_same_results(runs):
    found = runs.by_place
    for place in PLACES:
        assert found[place].header.startswith(f"{place}: ")
        assert found[place].warnings == []
    check_same(found["device"], found["host"])
    check_same(found["disk"], found["host"])
    check_same(found["off"], found["host"])
    assert found["host"].scores["test"]["accuracy"] > 0.35, "better than chance"


def test_header_and_result_name_the_place(runs):
    found = runs.by_place
    assert found["off"].header == "off: as requested, computed at every use"
    for place in ("host", "device", "disk"):
        assert found[place].header.endswith("MB, as requested")
        assert "features" in found[place].out
        assert found[place].result["feature_cache"] == place
    assert found["off"].result["feature_cache"] == "off"


@pytest.fixture(scope="module")
def reused(runs, train) -> Run:
    """Another seed, learning rate and batch size, one epoch, `auto`."""
    directory = runs.directory
    others = ("--run.seed", 5, "--optim.lr", "1e-3", "--batch.global_batch_size", 16, "--optim.epochs", 1)
    before = finished_segments(directory)
    run = train(directory, "other", *others)
    assert len(before) > 50
    assert finished_segments(directory) == before, "no segment was written again"
    return run


def test_later_runs_reuse_the_files(runs, reused, train, tmp_path):
    directory, found = runs.directory, runs.by_place
    assert reused.header.startswith("disk: ")
    assert reused.header.endswith("cached by an earlier run")
    assert reused.scores != found["disk"].scores, "control: another training"
    before = finished_segments(directory)
    check_same(train(directory, "again", "--engine.feature_cache", "disk"), found["host"])
    assert finished_segments(directory) == before
    # Fewer rows are there already.
    train(directory, "fewer", *ON_DISK, "--data.limit_train", 100, "--data.limit_test", 30, "--optim.epochs", 1)
    assert finished_segments(directory) == before
    # Control: another freeze boundary needs other features.
    other = ("--model.trainable_blocks", 2, "--optim.epochs", 1)
    train(tmp_path, "two-blocks", *ON_DISK, *other, "--data.cache_dir", directory / "cache")
    assert len({name.parts[2] for name in finished_segments(directory)}) == 2


def test_training_on_grown_data_gives_the_results_of_an_empty_cache(tmp_path, runs, train):
    shutil.copytree(runs.directory / "cache", tmp_path / "cache")
    size = ("--data.limit_train", 260)
    grown = train(tmp_path, "grown", *ON_DISK, *size)
    scratch = train(tmp_path, "scratch", *ON_DISK, *size, "--data.cache_dir", tmp_path / "empty")
    check_same(grown, scratch)
    weights = [load_file(next(run.directory.rglob("model.safetensors"))) for run in (grown, scratch)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert re.search(r"MB, 9\d% cached by earlier runs, as requested$", grown.header)
    assert scratch.header.endswith("MB, as requested"), "control: an empty cache"


def test_run_with_features_in_memory_reads_existing_files(runs, reused, train):
    directory, found = runs.directory, runs.by_place
    before = finished_segments(directory)
    check_same(train(directory, "host-from-disk", "--engine.feature_cache", "host"), found["host"])
    assert finished_segments(directory) == before


def flip_bit(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("damage", ["one segment", "truncated", "missing"])
def test_damaged_files_are_repaired_and_results_stay_the_same(runs, reused, train, damage):
    directory, found = runs.directory, runs.by_place
    rows, before = runs.cache / "rows.bin", finished_segments(directory)
    content = rows.read_bytes()
    marks = sorted((runs.cache / "marks").iterdir())
    if damage == "one segment":
        flip_bit(rows, len(content) // 2 + 3)
        marks[3].unlink()
        marks[5].write_text("f" * 64)
    elif damage == "truncated":
        os.truncate(rows, len(content) * 3 // 4)
    else:
        rows.unlink()
    run = train(directory, f"repaired-{damage.replace(' ', '-')}", "--engine.feature_cache", "disk")
    check_same(run, found["host"])
    assert rows.read_bytes() == content
    again = {name: when for name, when in finished_segments(directory).items() if before[name] != when}
    assert set(again) <= {name for name in before if runs.cache.name in name.parts}
    expected = {"one segment": 3, "truncated": len(marks) // 4, "missing": len(marks)}[damage]
    assert len(again) == pytest.approx(expected, rel=0.2), "undamaged segments are not computed again"


def test_too_low_limit_is_named_and_another_place_is_used(tmp_path, runs, train):
    found = runs.by_place
    low = ("--engine.feature_cache", "disk", "--engine.feature_cache_gigabytes", "0.001")
    run = train(tmp_path, "low", *low)
    check_same(run, found["host"])
    (warning,) = run.warnings
    assert warning.startswith("engine.feature_cache disk: ")
    assert "exceed engine.feature_cache_gigabytes (1 MB). Features are cached in host." in warning
    assert run.header.startswith("host: ")
    assert not list(cache_of(tmp_path).glob("*"))


def feature_bytes(runs: Places, splits: tuple[str, ...]) -> int:
    """Return the size of the features of some splits: one row of 128 numbers per token of a distinct text."""
    caches = [path for path in cache_of(runs.directory).parent.iterdir() if path.is_dir() and path.name != "features"]
    # Other tests add token caches with fewer rows.
    largest = max((read_tokens(path).splits for path in caches), key=lambda found: sum(map(len, found.values())))
    found = [largest[split] for split in splits]
    texts = {each.tokens[begin:end].tobytes() for each in found for begin, end in pairwise(each.offsets)}
    return sum(len(text) // found[0].tokens.itemsize for text in texts) * 128 * 4


@pytest.fixture
def small_disk(tmp_path, runs) -> Iterator[Path]:
    """A file system in memory that is large enough for the training's features, but not for those of the test split too."""
    needed, all_bytes = (feature_bytes(runs, splits) for splits in (("train", "validation"), ("train", "validation", "test")))
    assert all_bytes == json.loads((runs.cache / "about.json").read_text(encoding="utf-8"))["bytes"]
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    size = int(needed / 0.9) + 600_000
    assert all_bytes > size > needed / 0.9
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_point)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounts a small file system: needs root")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_full_disk_causes_a_warning_and_another_place(small_disk, tmp_path, runs, train):
    found = runs.by_place
    run = train(tmp_path, "full", "--data.cache_dir", small_disk, "--engine.feature_cache", "disk")
    check_same(run, found["host"])
    assert run.header == f"disk: {found['disk'].header.removeprefix('disk: ')}", "at the start, the features seem to fit"
    (warning,) = run.warnings
    assert warning.startswith("features cannot be cached in disk (No space left on device): now host, ")
    assert "Free some space, or set another --data.cache_dir or --engine.feature_cache." in warning
    assert run.result["feature_cache"] == "host"
    assert not list((small_disk / "features").glob("*")), "unfinished files are removed"


def test_plain_path_gives_close_results_without_a_cache(tmp_path, runs, train, run_command, arguments):
    directory, found = runs.directory, runs.by_place
    plain = train(directory, "plain", "--engine.fast_path", "false")
    check_close(plain, found["host"])
    assert plain.header == "off: the plain path computes features at every use"
    assert plain.probabilities.tolist() != found["off"].probabilities.tolist(), "control: another computation"
    data = ("--data.source", str(small_run.write_inputs() / "rows"), "--data.cache_dir", str(directory / "cache"))
    for number, fast_path in enumerate(("true", "false")):
        model = ("--model.name", str(directory / "host"), "--engine.fast_path", fast_path)
        output = tmp_path / f"scores-{number}"
        code, _, err = run_command(["evaluate", *model, *data, "--output", str(output)])
        assert code == 0, err
        scores = json.loads((output / "result.json").read_text())["splits"]["test"]
        assert scores["num_correct"] == found["host"].scores["test"]["num_correct"]
        assert scores["loss"] == pytest.approx(found["host"].scores["test"]["loss"], abs=1e-5)
    code, out, err = run_command(
        ["predict", *model, "--format", "jsonl", "shares fell on profit fears", "a goal in extra time"]
    )
    assert (code, len(out.splitlines())) == (0, 2), err
    code, out, err = run_command(["plan", *arguments(tmp_path, "planned", "--engine.fast_path", "false")[1:], "--json"])
    assert code == 0, err
    assert json.loads(out)["num_epochs"] == 3


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_plain_path_with_a_cache_is_refused(tmp_path, run_command, place, arguments):
    code, _, err = run_command(arguments(tmp_path, "never", "--engine.fast_path", "false", "--engine.feature_cache", place))
    assert code == 2
    assert f"engine.feature_cache {place} with engine.fast_path false: the reference path has no cache" in err
    assert "Set engine.feature_cache auto, or engine.fast_path true." in err
    assert not (tmp_path / "never").exists()


# --- several processes


def kill_when(condition: Callable[[], bool], job: ForkedJob, log: Path) -> None:
    """Kill all ranks of a job as soon as `condition` is true."""
    try:
        assert wait_until(lambda: condition() or job.has_ended(), every=0.001), "the condition never became true"
        assert not job.has_ended(), log.read_text()
    finally:
        job.kill()


def test_two_concurrent_trainings_fill_one_cache(tmp_path, runs, arguments):
    found, log = runs.by_place, tmp_path / "log.txt"
    jobs = [ForkedJob(arguments(tmp_path, name, *ON_DISK)[1:], log, num_ranks=1) for name in ("one", "two")]
    for job in jobs:
        wait_until(job.has_ended)
        job.kill()
        assert job.codes() == [0], log.read_text()
    for name in ("one", "two"):
        run = Run(tmp_path / name, "")
        check_same(run, found["host"])
        assert run.result["feature_cache"] == "disk"
    assert len(list(cache_of(tmp_path).iterdir())) == 1


def test_killed_training_loses_no_finished_segment(tmp_path, runs, train, arguments):
    for attempt in range(3):  # on a busy machine the kill may come too late
        directory = tmp_path / str(attempt)
        log = tmp_path / f"log-{attempt}.txt"
        killed = ForkedJob(arguments(directory, "killed", *ON_DISK)[1:], log, num_ranks=1)
        kill_when(lambda directory=directory: len(finished_segments(directory)) >= 3, killed, log)
        before = finished_segments(directory)
        if len(before) < runs.num_segments - 10:
            break
    assert 3 <= len(before) < runs.num_segments - 10, "killed before it was complete"
    check_same(train(directory, "resumed", *ON_DISK), runs.by_place["host"])
    after = finished_segments(directory)
    assert before.items() <= after.items(), "finished segments are not computed again"
    assert len(after) == runs.num_segments


SHARED_MEMORY = Path("/dev/shm") / f"agnews_dist-{os.getuid()}"


def shared_jobs(model: Path) -> set[str]:
    """Return the jobs of this user with features of a model in shared memory."""
    jobs: set[str] = set()
    for about in match_paths(f"{SHARED_MEMORY}/*/*/about.json"):
        with suppress(OSError):  # a job has removed it meanwhile
            if str(model) in about.read_text(encoding="utf-8"):
                jobs.add(about.parent.parent.name)
    return jobs


@pytest.fixture
def leftovers() -> Iterator[tuple[Path, Path]]:
    """Directories in shared memory of a killed job, and of a living one (this process)."""
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


def kill_job(arguments: list[str], model: Path, log: Path) -> set[str]:
    """Kill a job of two ranks while its files in shared memory have names; return the jobs that stay there."""
    before = shared_jobs(model)
    kill_when(lambda: bool(shared_jobs(model) - before), ForkedJob(arguments, log), log)
    return shared_jobs(model) - before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory with names here")
def test_two_ranks_share_host_memory_and_leave_no_files(tmp_path, runs, model, arguments, leftovers):
    dead, alive = leftovers

    def train_on_two_ranks(place: str) -> Run:
        training = arguments(tmp_path, place, "--engine.feature_cache", place)
        done = fork_server.run_ranks(2, "-m", "agnews_dist.train", *training[1:])
        return Run(tmp_path / place, done.stdout)

    before = shared_jobs(model)
    # With this many rows there is time for the kill.
    rows = shutil.copytree(small_run.write_inputs() / "rows", tmp_path / "rows")
    (rows / "train.jsonl").write_text((rows / "train.jsonl").read_text() * 7)
    many = ("--data.source", rows, "--data.limit_train", 4000, "--engine.feature_cache", "host")
    training = arguments(tmp_path, "killed", *many, "--run.overwrite")[1:]
    # Repeated if a training of another test has removed the directory, as every training does at its start.
    left = next(filter(None, (kill_job(training, model, tmp_path / "log.txt") for _ in range(4))), set())
    assert len(left) == 1, "a job was killed before it removed the names"
    host = train_on_two_ranks("host")
    assert host.header.endswith("MB, as requested")
    assert not shared_jobs(model) - before, "neither its own files nor those of the killed job"
    assert not dead.parent.exists()
    assert (alive / "rows.bin").exists(), "files of a living job stay"
    check_close(host, runs.by_place["host"])

    check_same(train_on_two_ranks("disk"), host)
    device = train_on_two_ranks("device")
    check_close(device, host)
    # Each rank computes the texts whose features it holds, so the ranks are less balanced.
    assert device.result["rank_balance"] < host.result["rank_balance"]
