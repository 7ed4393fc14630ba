"""A save that is killed or fails at any system call leaves the previous checkpoint, or itself, complete.

A library loaded before libc (fail_calls.c) counts every call that changes the disk; each call gets each kind of fault.
"""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from save_with_faults import (
    FAIL,
    FOREVER,
    KILL_AFTER,
    KILL_BEFORE,
    KILL_HALFWAY,
    SHORT,
    Answer,
    Order,
    save,
    state_of,
    tensors_of,
)
from support.processes import REPOSITORY, TIMEOUT, environment
from support.tools import skip_without

from agnews_dist.run.resume import read_newest_usable
from agnews_dist.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, sweep

HERE = Path(__file__).parent
A, B, C = 7, 14, 21
"""Steps of the previous checkpoint, of the one that gets the fault, and of one saved later."""
CHANGING = {"open", "mkdir", "write", "fsync", "close", "rename", "unlink", "rmdir"}
ADDING = "open mkdir write fsync rename"
"""Calls that a full disk refuses."""

Do = Callable[[Order], Answer]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The compiled fail_calls.c."""
    skip_without("cc")
    shared_object = tmp_path_factory.mktemp("library") / "fail_calls.so"
    command = [
        "cc",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(shared_object),
        str(HERE / "fail_calls.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return shared_object


@pytest.fixture(scope="session")
def do(library) -> Iterator[Do]:
    """Send orders to one process of save_with_faults.py."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "save_with_faults.py")],
        env=environment(LD_PRELOAD=str(library)),
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def order(what: Order) -> Answer:
        process.stdin.write(json.dumps(asdict(what)) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return Answer(**{**answer, "trace": tuple(tuple(call) for call in answer["trace"])})

    with process:
        yield order
        process.stdin.close()
        assert process.wait(timeout=TIMEOUT) == 0


def before_any(folder: Path) -> None:
    """Prepare nothing: the first save of a run."""


def before_the_next(folder: Path) -> None:
    """Prepare one checkpoint."""
    save(folder, A)


def before_a_repeated(folder: Path) -> None:
    """Prepare one checkpoint, and damaged ones of the step to be saved: the run resumed from before them."""
    save(folder, B)
    (folder / f"step-{B:08d}" / "weights.safetensors").write_bytes(b"damaged")
    (folder / f"best-{B:08d}" / "MANIFEST").unlink()
    (folder / f"best-{B:08d}").rename(folder / "aside")
    save(folder.parent / "other", A)
    for path in (folder.parent / "other").iterdir():
        path.rename(folder / path.name)
    (folder / "aside").rename(folder / f"best-{B:08d}")
    (folder.parent / "other").rmdir()


SCENARIOS = [before_any, before_the_next, before_a_repeated]


def step_of(path: Path) -> int:
    """Return the number in a checkpoint's name."""
    return int(path.name.split("-")[1])


class Disk:
    """The checkpoint folder of a scenario, restored before every fault."""

    def __init__(self, directory: Path, prepare: Callable[[Path], None], do: Do) -> None:
        self.prepared, self.root = directory / "prepared", directory / "root"
        self.folder = self.root / "run" / "checkpoints"
        self.do = do
        (self.prepared / "run").mkdir(parents=True)
        prepare(self.prepared / "run" / "checkpoints")
        self.has_a = prepare is not before_any
        self.is_repeated = prepare is before_a_repeated
        whole = self.save()
        assert (whole.status, whole.raised) == (0, "")
        self.trace = whole.trace
        assert self.newest()[0] == B
        self.renamed = 1 + next(n for n, call in enumerate(self.trace) if renames_to(call, f"step-{B:08d}"))
        """Number of the call that makes B the newest checkpoint."""
        self.moved_away = 1 + next(
            (n for n, call in enumerate(self.trace) if call[0] == "rename" and call[1].endswith(f"/step-{B:08d}")), 10**9
        )
        """Number of the call that moves a damaged B away."""

    def save(self, **cut: object) -> Answer:
        """Save B with a fault on the disk as it was prepared."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.prepared, self.root)
        return self.do(Order("save", str(self.folder), B, **cut))

    def newest(self) -> tuple[int | None, list[str]]:
        """Return the step of the newest usable checkpoint and the warnings; check every bit of it and of its best epoch."""
        checkpoint, best, warnings = read_newest_usable(self.folder)
        if checkpoint is None:
            return None, warnings
        step = checkpoint.state["step"]
        assert checkpoint.path == self.folder / f"step-{step:08d}"
        assert checkpoint.state == state_of(step)
        assert_same(checkpoint, tensors_of(step))
        assert best is not None
        assert best.state == {"best": None}
        assert_same(best, {"weights": tensors_of(-step)["weights"]})
        return step, warnings

    def check(self, *, is_b: bool, is_damaged_there: bool, where: str) -> None:
        """Check that B (or A) is the newest, and that nothing incomplete counts as a checkpoint."""
        step, warnings = self.newest()
        assert step == (B if is_b else A if self.has_a else None), where
        assert len(warnings) == is_damaged_there, f"{where}: {warnings}"
        for path in [*list_checkpoints(self.folder), *list_checkpoints(self.folder, "best")]:
            if not (self.is_repeated and step_of(path) == B):
                assert step_of(read_checkpoint(path).path) in (A, B), where

    def check_next_save(self, where: str) -> None:
        """Check that the next attempt saves and removes all leftovers."""
        assert self.do(Order("start_and_save", str(self.folder), C)).raised == "", where
        step, warnings = self.newest()
        assert (step, warnings) == (C, []), where
        assert sorted(path.name for path in self.folder.iterdir()) == [f"best-{C:08d}", f"step-{C:08d}"], where

    def hidden(self) -> list[str]:
        """Return the temporary directories of a save."""
        return [path.name for path in self.folder.iterdir() if path.name.startswith(".")] if self.folder.exists() else []

    def calls(self, kind: str) -> list[int]:
        """Return the numbers of the calls of this name."""
        return [number for number, call in enumerate(self.trace, start=1) if call[0] == kind]


def renames_to(call: tuple[str, ...], name: str) -> bool:
    return call[0] == "rename" and call[2].endswith(f"/{name}")


def assert_same(checkpoint: Checkpoint, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert checkpoint.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(checkpoint.tensors[group][name], tensor), name


@pytest.fixture(scope="module", params=SCENARIOS, ids=lambda prepare: prepare.__name__)
def disk(request, tmp_path_factory, do) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"), request.param, do)


@pytest.fixture(scope="module")
def next_disk(tmp_path_factory, do) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"), before_the_next, do)


def test_library_counts_every_call(disk):
    """Compare the counts of calls with the files and directories on disk."""
    kinds = [call[0] for call in disk.trace]
    num_files = sum(path.is_file() for path in disk.folder.rglob("*"))
    assert set(kinds) <= CHANGING
    assert kinds.count("open") == kinds.count("close") == num_files == 7
    assert kinds.count("write") >= 7 + 2
    assert kinds.count("mkdir") == 2 + (not disk.has_a)
    assert kinds.count("fsync") >= num_files + 2 * 2
    # A removed directory is renamed, emptied, then removed.
    assert kinds.count("rmdir") == (4 if disk.is_repeated else 2 if disk.has_a else 0)
    assert kinds.count("rename") >= 2 + kinds.count("rmdir")
    assert len(kinds) > 35


@pytest.mark.parametrize("mode", [KILL_BEFORE, KILL_AFTER, KILL_HALFWAY], ids=["before", "after", "halfway"])
def test_kill_at_any_call_leaves_the_previous_or_the_new_checkpoint(disk, mode):
    calls = disk.calls("write") if mode == KILL_HALFWAY else range(1, len(disk.trace) + 1)
    if mode == KILL_AFTER:
        # The state after a call is that before the next one, so only the last calls differ.
        calls = calls[-5:]
    for call in calls:
        where = f"call {call}: {disk.trace[call - 1]}"
        assert disk.save(call=call, until=call, mode=mode).status == -9, where
        num_done = call if mode == KILL_AFTER else call - 1
        is_damaged_there = disk.is_repeated and num_done < disk.moved_away
        disk.check(is_b=num_done >= disk.renamed, is_damaged_there=is_damaged_there, where=where)
        disk.check_next_save(where)
    assert disk.save(call=len(disk.trace) + 1, until=FOREVER, mode=KILL_BEFORE).status == 0, "every call got the fault"


def test_failing_call_leaves_the_previous_or_the_new_checkpoint_alone(disk):
    synced = next(n for n in disk.calls("fsync") if n > disk.renamed)
    for call in range(1, len(disk.trace) + 1):
        where = f"call {call}: {disk.trace[call - 1]}"
        answer = disk.save(call=call, until=call, mode=FAIL, error=errno.EIO)
        is_removing = disk.trace[call - 1][0] in ("unlink", "rmdir")
        is_raised = call <= synced and not is_removing
        assert (answer.raised, answer.error) == (("OSError", errno.EIO) if is_raised else ("", None)), where
        is_b = not is_raised or call > disk.renamed
        disk.check(is_b=is_b, is_damaged_there=disk.is_repeated and not is_b, where=where)
        is_of_folder = disk.trace[call - 1] == ("fsync", str(disk.folder))
        if is_raised and not is_of_folder:
            assert disk.hidden() == [], where
        sweep(disk.folder)
        assert disk.hidden() == [], where
        disk.check_next_save(where)


def test_full_disk_keeps_the_previous_checkpoint(disk):
    synced = next(n for n in disk.calls("fsync") if n > disk.renamed)
    for call in range(1, synced + 1):
        where = f"call {call}: {disk.trace[call - 1]}"
        answer = disk.save(call=call, until=FOREVER, mode=FAIL, error=errno.ENOSPC, only=ADDING)
        assert (answer.raised, answer.error) == ("OSError", errno.ENOSPC), where
        step, _ = disk.newest()
        assert step == (B if call > disk.renamed else A if disk.has_a else None), where
        disk.check_next_save(where)


def test_read_only_disk_keeps_the_previous_checkpoint(next_disk):
    for call in range(1, len(next_disk.trace) + 1):
        where = f"call {call}: {next_disk.trace[call - 1]}"
        answer = next_disk.save(call=call, until=FOREVER, mode=FAIL, error=errno.EROFS)
        synced = next(n for n in next_disk.calls("fsync") if n > next_disk.renamed)
        assert (answer.raised, answer.error) == (("OSError", errno.EROFS) if call <= synced else ("", None)), where
        next_disk.check(is_b=call > next_disk.renamed, is_damaged_there=False, where=where)
        next_disk.check_next_save(where)


def test_short_write_is_continued(next_disk):
    for call in next_disk.calls("write"):
        assert next_disk.save(call=call, until=call, mode=SHORT).raised == ""
        next_disk.check(is_b=True, is_damaged_there=False, where=f"call {call}")
    answer = next_disk.save(call=1, until=FOREVER, mode=SHORT, only="write")
    assert len(answer.trace) > len(next_disk.trace) + 20
    next_disk.check(is_b=True, is_damaged_there=False, where="every write")


def test_file_system_without_directory_fsync_is_accepted(next_disk):
    file = re.compile(r"/(\w+\.safetensors|state\.json|MANIFEST)$")
    directories = [call for call in next_disk.calls("fsync") if not file.search(next_disk.trace[call - 1][1])]
    assert len(directories) == 5, "both directories, the folder after each, and after what is pruned was renamed"
    for call in directories:
        path = next_disk.trace[call - 1][1]
        assert next_disk.save(call=call, until=call, mode=FAIL, error=errno.EINVAL).raised == "", path
        next_disk.check(is_b=True, is_damaged_there=False, where=path)


def test_loss_of_power_undoes_nothing_that_later_changes_depend_on(disk):
    """Check that fsync comes in time: a change without it may be lost, in any order."""
    calls = list(enumerate(disk.trace))
    folder = str(disk.folder)
    is_fsynced = {n: call[1] for n, call in calls if call[0] == "fsync"}

    def assert_fsynced(path: str, after: int, before: int) -> None:
        assert any(after < n < before for n, synced in is_fsynced.items() if synced == path), (path, after, before)

    for name in (f"best-{B:08d}", f"step-{B:08d}"):
        [renamed] = [n for n, call in calls if renames_to(call, name)]
        staging = disk.trace[renamed][1]
        below = [(n, call) for n, call in calls if call[1].startswith(f"{staging}/") and n < renamed]
        changed = {call[1]: n for n, call in below if call[0] in ("open", "write")}
        assert len(changed) == (4 if name.startswith("step") else 3)
        for path, last in changed.items():
            assert_fsynced(path, last, renamed)
        assert_fsynced(staging, max(n for n, call in below if call[0] == "open"), renamed)
        # What it replaces, what names it and what is pruned for it must change later.
        later = [n for n, call in calls if n > renamed and call[0] in ("rename", "unlink", "rmdir", "mkdir")]
        assert_fsynced(folder, renamed, min(later, default=len(calls)))
    hidden = [n for n, call in calls if call[0] == "rename" and re.search(r"/\.old-[^/]*$", call[2])]
    num_emptied = 0
    for number in hidden:
        away = disk.trace[number][2]
        emptied = [n for n, call in calls if call[0] in ("unlink", "rmdir") and call[1].startswith(f"{away}/")]
        if emptied:
            assert_fsynced(folder, number, min(emptied))
            num_emptied += 1
    assert num_emptied == (4 if disk.is_repeated else 2 if disk.has_a else 0)
    if not disk.has_a:
        [made] = [n for n, call in calls if call == ("mkdir", folder)]
        assert_fsynced(str(disk.folder.parent), made, made + 2)


def test_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(next_disk):
    next_disk.save()
    folder = str(next_disk.folder)
    calls = next_disk.do(Order("read", folder, B, reads=True)).trace
    assert [call[0] for call in calls].count("look") == 4, calls
    assert {"list", "look", "read"} == {call[0] for call in calls}
    for number, call in enumerate(calls, start=1):
        for error in (errno.EIO, errno.EACCES, errno.ESTALE):
            answer = next_disk.do(Order("read", folder, B, number, number, FAIL, error, reads=True))
            assert answer.raised == "UnreadableError", call
    assert next_disk.do(Order("read", folder, B, reads=True)).raised == ""


def test_unlistable_folder_is_an_error_and_not_empty(next_disk):
    next_disk.save()
    order = Order("list_folder", str(next_disk.folder), B, 1, FOREVER, FAIL, errno.EIO, reads=True)
    answer = next_disk.do(order)
    assert (answer.raised, answer.error) == ("OSError", errno.EIO)


def test_removing_leftovers_never_raises(next_disk):
    """Try every call, with one failure or with all later ones failing."""
    next_disk.save()
    (next_disk.folder / f".step-{B:08d}.{'0' * 32}").mkdir()
    folder = str(next_disk.folder)
    shutil.copytree(next_disk.root, next_disk.prepared.parent / "tidied", dirs_exist_ok=True)
    num_calls = len(next_disk.do(Order("tidy", folder, B, reads=True)).trace)
    assert num_calls > 10
    for number in range(1, num_calls + 1):
        for until in (number, FOREVER):
            shutil.rmtree(next_disk.root)
            shutil.copytree(next_disk.prepared.parent / "tidied", next_disk.root)
            answer = next_disk.do(Order("tidy", folder, B, number, until, FAIL, errno.EIO, reads=True))
            assert (answer.status, answer.raised) == (0, ""), number
