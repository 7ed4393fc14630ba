"""A save that is killed, or fails, at any of its calls to the kernel leaves the checkpoint before it, or itself, whole.

Every call that changes something on the disk is counted by a library below the process (cut.c), and each is cut in each way.
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
from save_once import (
    FAIL,
    FOR_EVER,
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
from support.processes import REPOSITORY, environment

from agnews_dist.run.resume import read_newest_usable
from agnews_dist.training.checkpoint import Checkpoint, checkpoints, read_checkpoint, step_of, sweep

HERE = Path(__file__).parent
A, B, C = 7, 14, 21
"""The steps of the checkpoint before, of the one that is cut, and of one saved afterwards."""
CHANGING = {"open", "mkdir", "write", "fsync", "close", "rename", "unlink", "rmdir"}
ADDING = "open mkdir write fsync rename"
"""What a full disk may refuse."""

Do = Callable[[Order], Answer]


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    """cut.c, compiled; where there is no compiler this fails, it does not skip."""
    library = tmp_path_factory.mktemp("cut") / "cut.so"
    command = [
        "cc",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(HERE / "cut.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def do(shim) -> Iterator[Do]:
    """Has a warmed process, or its child, do something, and tells what came of it."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "save_once.py")],
        env=environment(LD_PRELOAD=str(shim)),
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
        said = json.loads(process.stdout.readline())
        return Answer(**{**said, "trace": tuple(tuple(call) for call in said["trace"])})

    with process:
        yield order
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def before_any(folder: Path) -> None:
    """The first save of a run."""


def before_the_next(folder: Path) -> None:
    """There is one checkpoint."""
    save(folder, A)


def before_a_repeated(folder: Path) -> None:
    """There are one, and damaged ones of the number that is saved: a run that goes on from before them."""
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


class Disk:
    """The folder of a scenario, put back before every cut."""

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
        """What a save does that nobody cuts."""
        self.renamed = 1 + next(n for n, call in enumerate(self.trace) if renames_to(call, f"step-{B:08d}"))
        """The number of the call that makes B the newest."""
        self.moved_away = 1 + next(
            (n for n, call in enumerate(self.trace) if call[0] == "rename" and call[1].endswith(f"/step-{B:08d}")),
            10**9,
        )
        """The number of the call before which a damaged B is still there."""

    def save(self, **cut: object) -> Answer:
        """B, cut in this way, on the disk as it was prepared."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.prepared, self.root)
        return self.do(Order("save", str(self.folder), B, **cut))

    def newest(self) -> tuple[int | None, list[str]]:
        """(step of the newest usable, its warnings), after a look at every bit of it and of its best epoch."""
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
        """B is the newest, or A; and no half of anything is taken for a checkpoint."""
        step, warnings = self.newest()
        assert step == (B if is_b else A if self.has_a else None), where
        assert len(warnings) == is_damaged_there, f"{where}: {warnings}"
        for path in [*checkpoints(self.folder), *checkpoints(self.folder, "best")]:
            if not (self.is_repeated and step_of(path) == B):
                assert step_of(read_checkpoint(path).path) in (A, B), where

    def check_going_on(self, where: str) -> None:
        """The next attempt saves, and leaves nothing of what was."""
        assert self.do(Order("start_and_save", str(self.folder), C)).raised == "", where
        step, warnings = self.newest()
        assert (step, warnings) == (C, []), where
        assert sorted(path.name for path in self.folder.iterdir()) == [f"best-{C:08d}", f"step-{C:08d}"], where

    def hidden(self) -> list[str]:
        """What a save has under way."""
        return (
            [path.name for path in self.folder.iterdir() if path.name.startswith(".")] if self.folder.exists() else []
        )

    def calls(self, kind: str) -> list[int]:
        """The numbers of the calls of this name."""
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


def test_the_library_sees_every_call(disk):
    """As often as files were made, and with each of these and each directory fsynced."""
    kinds = [call[0] for call in disk.trace]
    num_files = sum(path.is_file() for path in disk.folder.rglob("*"))
    assert set(kinds) <= CHANGING
    assert kinds.count("open") == kinds.count("close") == num_files == 7
    assert kinds.count("write") >= 7 + 2
    assert kinds.count("mkdir") == 2 + (not disk.has_a)
    assert kinds.count("fsync") >= num_files + 2 * 2
    # Each directory that goes is renamed, emptied, removed.
    assert kinds.count("rmdir") == (4 if disk.is_repeated else 2 if disk.has_a else 0)
    assert kinds.count("rename") >= 2 + kinds.count("rmdir")
    assert len(kinds) > 35


@pytest.mark.parametrize("mode", [KILL_BEFORE, KILL_AFTER, KILL_HALFWAY], ids=["before", "after", "halfway"])
def test_a_kill_at_any_call_leaves_the_one_before_or_the_new_one(disk, mode):
    calls = disk.calls("write") if mode == KILL_HALFWAY else range(1, len(disk.trace) + 1)
    if mode == KILL_AFTER:
        # But for the last one, what is on the disk is what it is before the next.
        calls = calls[-5:]
    for call in calls:
        where = f"call {call}: {disk.trace[call - 1]}"
        assert disk.save(call=call, until=call, mode=mode).status == -9, where
        num_done = call if mode == KILL_AFTER else call - 1
        is_damaged_there = disk.is_repeated and num_done < disk.moved_away
        disk.check(is_b=num_done >= disk.renamed, is_damaged_there=is_damaged_there, where=where)
        disk.check_going_on(where)
    assert disk.save(call=len(disk.trace) + 1, until=FOR_EVER, mode=KILL_BEFORE).status == 0, "all calls were cut"


def test_a_call_that_fails_leaves_the_one_before_or_the_new_one_and_nothing_else(disk):
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
        disk.check_going_on(where)


def test_a_disk_that_is_full_from_some_call_on_is_left_as_it_was(disk):
    synced = next(n for n in disk.calls("fsync") if n > disk.renamed)
    for call in range(1, synced + 1):
        where = f"call {call}: {disk.trace[call - 1]}"
        answer = disk.save(call=call, until=FOR_EVER, mode=FAIL, error=errno.ENOSPC, only=ADDING)
        assert (answer.raised, answer.error) == ("OSError", errno.ENOSPC), where
        step, _ = disk.newest()
        assert step == (B if call > disk.renamed else A if disk.has_a else None), where
        disk.check_going_on(where)


def test_a_disk_that_is_read_only_from_some_call_on_is_no_worse_than_a_kill(next_disk):
    for call in range(1, len(next_disk.trace) + 1):
        where = f"call {call}: {next_disk.trace[call - 1]}"
        answer = next_disk.save(call=call, until=FOR_EVER, mode=FAIL, error=errno.EROFS)
        synced = next(n for n in next_disk.calls("fsync") if n > next_disk.renamed)
        assert (answer.raised, answer.error) == (("OSError", errno.EROFS) if call <= synced else ("", None)), where
        next_disk.check(is_b=call > next_disk.renamed, is_damaged_there=False, where=where)
        next_disk.check_going_on(where)


def test_a_write_that_takes_only_half_is_finished(next_disk):
    for call in next_disk.calls("write"):
        assert next_disk.save(call=call, until=call, mode=SHORT).raised == ""
        next_disk.check(is_b=True, is_damaged_there=False, where=f"call {call}")
    answer = next_disk.save(call=1, until=FOR_EVER, mode=SHORT, only="write")
    assert len(answer.trace) > len(next_disk.trace) + 20
    next_disk.check(is_b=True, is_damaged_there=False, where="every write")


def test_a_file_system_that_cannot_fsync_directories_will_do(next_disk):
    file = re.compile(r"/(\w+\.safetensors|state\.json|MANIFEST)$")
    directories = [call for call in next_disk.calls("fsync") if not file.search(next_disk.trace[call - 1][1])]
    assert len(directories) == 5, "each of the two, the folder after each, and after the renaming of what is pruned"
    for call in directories:
        path = next_disk.trace[call - 1][1]
        assert next_disk.save(call=call, until=call, mode=FAIL, error=errno.EINVAL).raised == "", path
        next_disk.check(is_b=True, is_damaged_there=False, where=path)


def test_nothing_depends_on_what_a_loss_of_power_may_undo(disk):
    """Without an fsync after it, anything may be lost, in any order."""
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
        # What it replaces, what refers to it, and what is pruned for it: all of that comes after.
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


def test_what_cannot_be_read_is_damaged(next_disk):
    next_disk.save()
    folder = str(next_disk.folder)
    calls = next_disk.do(Order("read", folder, B, reads=True)).trace
    assert [call[0] for call in calls].count("look") == 4, calls
    assert {"list", "look", "read"} == {call[0] for call in calls}
    for number, call in enumerate(calls, start=1):
        for error in (errno.EIO, errno.EACCES, errno.ESTALE):
            answer = next_disk.do(Order("read", folder, B, number, number, FAIL, error, reads=True))
            assert answer.raised == "DamagedError", call
    assert next_disk.do(Order("read", folder, B, reads=True)).raised == ""


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(next_disk):
    next_disk.save()
    order = Order("list_them", str(next_disk.folder), B, 1, FOR_EVER, FAIL, errno.EIO, reads=True)
    answer = next_disk.do(order)
    assert (answer.raised, answer.error) == ("OSError", errno.EIO)


def test_what_only_removes_never_fails(next_disk):
    """At any call, with any error, once or for ever."""
    next_disk.save()
    (next_disk.folder / f".step-{B:08d}.{'0' * 32}").mkdir()
    folder = str(next_disk.folder)
    shutil.copytree(next_disk.root, next_disk.prepared.parent / "tidied", dirs_exist_ok=True)
    num_calls = len(next_disk.do(Order("tidy", folder, B, reads=True)).trace)
    assert num_calls > 10
    for number in range(1, num_calls + 1):
        for until in (number, FOR_EVER):
            shutil.rmtree(next_disk.root)
            shutil.copytree(next_disk.prepared.parent / "tidied", next_disk.root)
            answer = next_disk.do(Order("tidy", folder, B, number, until, FAIL, errno.EIO, reads=True))
            assert (answer.status, answer.raised) == (0, ""), number
