"""The directory of a sweep: its plan, a file per member, locks of waves. Any number of processes may work in it at once.

    plan.json               what the sweep is made of; another plan is refused
    members/00003.json      result of a member that has ended
    members/00003.rung1     result of a member at a rung of successive halving
    members/00003.safetensors   best weights and validation predictions, of the best settings only
    members/inputs-*.txt    hashes of data, tokenizer and frozen weights
    members/workers.txt     number of ranks of the newest start
    members/wave-00001.lock lock of the process that trains a wave; the kernel releases it when that process dies
    sweep.json, sweep.csv   all results, when all members have ended
    sweep.html, sweep.md    the report
    status.json             state of the sweep's job; status-1.json and so on of the other tasks of a job array
    .status.json.pace       members that had ended at its newest start, and how many trained at once then
    best/                   the best member of the selected setting, as a run leaves it

A sweep that another one is to replace waits as .NAME.replaced until that one begins.
A file is written under a hidden name and renamed. Members can be trained again, so nothing waits for the disk.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agnews_dist.distributed.world import print_line
from agnews_dist.errors import ConfigError, UserError
from agnews_dist.experiments.members import Member, Wave
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.experiments.stored_sweeps import MEMBERS, RESULTS
from agnews_dist.report.result_files import write_json
from agnews_dist.run.status import PLAN
from agnews_dist.storage import atomic
from agnews_dist.storage.holders import StuckHolder
from agnews_dist.storage.locks import POLL_SECONDS, Lock, LockWait, lock_shared, locked_or_bypassed, try_lock

INPUTS = ("tokens", "tokenizer", "frozen_weights", "precision")
"""Inputs of a member besides its settings. They must not change between two starts of a sweep."""


class SweepDirectory:
    """Files of one sweep. Every rank has one; the ranks must share the file system of `path`."""

    def __init__(self, path: Path) -> None:
        """Touch nothing on disk yet."""
        self.path = path
        self._members = path / MEMBERS
        self._results: dict[str, dict[int, MemberResult]] = defaultdict(dict)
        """Suffix of a file -> member -> its result. Results never change, so a file is read once."""
        self._removed: set[int] = set()
        """Members whose tensors are removed."""
        self._in_use: int | None = None
        """Handle of the lock that says that this process works here."""
        self._lock_path = path.with_name(f".{path.name}.sweep")
        self._opening_path = path.with_name(f".{path.name}.opening")
        self._replaced = path.with_name(f".{path.name}.replaced")
        self._wait: tuple[Path, LockWait] | None = None

    def close(self) -> None:
        """Let other processes replace the sweep; if it has not begun, remove it and restore the one that it was to replace."""
        if self._in_use is None:
            return
        os.close(self._in_use)
        self._in_use = None
        with suppress(OSError), self._lock_opening():
            self._remove_unused(has_failed=True)
            if not self.path.exists():
                # A waiting process notices that the file is gone, and creates a new one.
                self._opening_path.unlink()

    def commit(self) -> None:
        """Remove the sweep that this one replaces: it has begun."""
        atomic.discard([self._replaced])

    def _lock_opening(self) -> AbstractContextManager[None]:
        return locked_or_bypassed(self._opening_path, f"sweep {self.path}", print_line)

    def _remove_unused(self, *, has_failed: bool = False) -> None:
        """Remove a sweep that no process works in and that has nothing but its plan; restore the one before it."""
        found = {each.name for each in self.path.glob("[!.]*")}
        if has_failed and self._replaced.exists():
            # An earlier start was stopped before its beginning. Without a failure since then it is continued.
            found -= {each.name for each in self.path.glob("status*.json")}
        if not found <= {PLAN, MEMBERS} or any(self._members.glob("*.json")) or _is_held(self._lock_path):
            return
        if self.path.exists():
            shutil.rmtree(self.path)
        if self._replaced.exists():
            self._replaced.rename(self.path)
        self._lock_path.unlink()

    def is_finished(self, wanted: Collection[str] = ()) -> bool:
        """Return whether all results are there, with rows `wanted` in the comparison of an ensemble."""
        try:
            found = json.loads((self.path / RESULTS).read_bytes())
            return {*wanted} <= {row["name"] for row in found.get("ensemble", [])}
        except (FileNotFoundError, ValueError):
            return False

    def open(self, plan: Mapping[str, Any], *, overwrite: bool, num_workers: int = 1) -> None:
        """Create the directory, or continue the sweep of the same plan in it, and keep it from others that would replace it.

        `overwrite`: replace a finished or other one. `num_workers`: ranks of all jobs that share it, which decides the waves.

        Raises:
            UserError: the directory is not a sweep's, cannot be written, is in use, or holds a sweep with another plan.
        """
        plan = atomic.to_json_value(plan)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock_opening():
                if self._replaced.exists():  # an earlier start was killed before its sweep began
                    self._remove_unused()
                self._create(plan, overwrite=overwrite)
                self._check_workers(num_workers)
                self._in_use = lock_shared(self._lock_path, LockWait(self._lock_path, f"sweep {self.path}", print_line))
        except OSError as error:
            raise UserError(
                f"run.dir {self.path.parent}: {self.path} cannot be written ({error.strerror or error}). Set --run.dir to a "
                "writable directory."
            ) from error

    def _create(self, plan: Mapping[str, Any], *, overwrite: bool) -> None:
        found = self._read_plan()
        if overwrite and found is not None and (found != plan or self.is_finished()):
            if _is_held(self._lock_path):
                raise UserError(f"{self.path}: another process works in it. Wait for its end, or choose another --run.name.")
            if self._replaced.exists() and not any(self._members.glob("*.json")):
                # It was stopped before it began: what is to be replaced or continued is the sweep before it.
                shutil.rmtree(self.path)
                self._replaced.rename(self.path)
                self._create(plan, overwrite=overwrite)
                return
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.path.rename(self._replaced)
            found = None
        if found is None:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"{self.path}: it exists and is not a sweep's directory. Choose another --run.name.")
            self.path.mkdir(exist_ok=True)
            write_json(self.path / PLAN, plan)
        elif found != plan:
            differing = ", ".join(sorted(_list_differences(found, plan)))
            raise ConfigError(
                f"{self.path}: it has another sweep (in {differing}). Set another --run.name, or pass --run.overwrite."
            )
        self._members.mkdir(exist_ok=True)

    def _check_workers(self, num_workers: int) -> None:
        """Check that all processes in the directory have cut the same waves, whose locks keep them apart."""
        path = self._members / "workers.txt"
        if not _is_held(self._lock_path):
            path.write_text(f"{num_workers}\n")
        elif (found := path.read_text().strip()) != str(num_workers):
            raise UserError(
                f"{self.path}: a job of {found} rank(s) works in it, and this one has {num_workers}: members would be trained "
                "twice. Wait for its end, or start as many ranks."
            )

    def check_inputs(self, key: object, fingerprints: Mapping[str, str]) -> None:
        """Check that data, tokenizer, frozen weights and precision are those of the members before; record them at first.

        `key`: settings that the features depend on.

        Raises:
            UserError: they differ.
        """
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        path = self._members / f"inputs-{name}.txt"
        now = {part: fingerprints[part] for part in INPUTS}
        try:
            before: dict[str, str] = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            with atomic.new_file(path, is_durable=False) as temporary:
                temporary.write_text(json.dumps(now, allow_nan=False), encoding="utf-8")
            return
        differing = [part.replace("_", " ") for part in INPUTS if before.get(part) != now[part]]
        if differing:
            raise UserError(
                f"{self.path}: {', '.join(differing)} changed since its first members. Restore them, or set another --run.name."
            )

    def _read_plan(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / PLAN).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{self.path / PLAN}: it is damaged. Remove the directory, or choose another --run.name."
            ) from error

    def read_results(self, rung: int | None = None) -> list[MemberResult]:
        """Read the results of all members that have ended, or that have reached a rung, in the order of their numbers."""
        known = self._results[suffix := ".json" if rung is None else f".rung{rung}"]
        with os.scandir(self._members) as entries:
            stems = [entry.name.removesuffix(suffix) for entry in entries if entry.name.endswith(suffix)]
        for member in (int(stem) for stem in stems if stem.isdigit()):
            if member not in known:
                # Another process may replace a file by an equal one, never by another.
                with suppress(FileNotFoundError):
                    self._read_result(self._members / f"{member:05}{suffix}", known)
        return [known[member] for member in sorted(known)]

    def _read_result(self, path: Path, known: dict[int, MemberResult]) -> None:
        """Read a file, or remove it if it is damaged: the member is trained again."""
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            # A number that is not finite is null in JSON.
            fields |= {key: math.nan for key, value in fields.items() if value is None}
            known[int(path.stem)] = MemberResult(**fields)
        except (ValueError, TypeError, AttributeError):
            path.unlink(missing_ok=True)

    def write_result(
        self, result: MemberResult, tensors: Mapping[str, Tensor] | None = None, *, rung: int | None = None
    ) -> None:
        """Write the result of a member, its tensors first. `rung`: it pauses there.

        Raises:
            UserError: they cannot be written.
        """
        try:
            if tensors is not None:
                with atomic.new_file(self._members / f"{result.member:05}.safetensors", is_durable=False) as temporary:
                    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            suffix = ".json" if rung is None else f".rung{rung}"
            path = self._members / f"{result.member:05}{suffix}"
            with atomic.new_file(path, is_durable=False) as temporary:
                temporary.write_text(json.dumps(atomic.to_json_value(asdict(result)), allow_nan=False), encoding="utf-8")
            self._read_result(path, self._results[suffix])
            self._wait = None
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.path}: member {result.member} cannot be written ({reason}). Free some space, and run it again."
            ) from error

    def read_tensors(self, member: int) -> dict[str, Tensor] | None:
        """Read the tensors of a member; None: they were not kept, or are damaged."""
        try:
            return load_file(self._members / f"{member:05}.safetensors")
        except (OSError, SafetensorError):
            return None

    def find_ended(self, members: Collection[Member]) -> set[int]:
        """Return the numbers of those members that have a result; only files that were not there before are looked for."""
        known = self._results[".json"]
        for member in members:
            if member.index not in known:
                with suppress(FileNotFoundError):
                    self._read_result(self._members / f"{member.index:05}.json", known)
        return {member.index for member in members if member.index in known}

    def has_ended(self, wave: Wave) -> bool:
        """Return whether every member of a wave has a result."""
        return len(self.find_ended(wave.members)) == len(wave.members)

    def claim(self, wave: Wave | None) -> Lock | None:
        """Lock a wave, or (None) the work after the last member; None: another process has it, or the wave has ended."""
        lock = try_lock(self._lock_of(wave))
        if lock is None:
            return None
        if wave is not None and self.has_ended(wave):
            lock.close()
            return None
        lock.sign()
        self._wait = None
        return lock

    def _lock_of(self, wave: Wave | None) -> Path:
        return self.path / "selection.lock" if wave is None else self._members / f"wave-{wave.number:05}.lock"

    def wait_for(self, waves: Iterable[Wave | None]) -> None:
        """Wait a moment for the process that has one of these locks of `claim`. Say which one, if it has lasted seconds.

        Raises:
            UserError: that process is suspended, or shows no sign of life.
        """
        for path in islice(filter(_is_held, map(self._lock_of, waves)), 1):
            if self._wait is None or self._wait[0] != path:
                self._wait = path, LockWait(path, f"sweep {self.path}", print_line)
            try:
                self._wait[1].look()
            except StuckHolder as stuck:
                raise UserError(f"{self.path}: {stuck.strerror}. Let it continue or end it, and start this again.") from stuck
        time.sleep(POLL_SECONDS)

    def keep_tensors(self, kept: Collection[int], ended: Iterable[int]) -> None:
        """Remove the tensors of members that have `ended`, but for those of `kept`."""
        for member in set(ended) - set(kept) - self._removed:
            with suppress(OSError):
                (self._members / f"{member:05}.safetensors").unlink(missing_ok=True)
                self._removed.add(member)


def _is_held(path: Path) -> bool:
    """Return whether another process has a lock on a file."""
    if (lock := try_lock(path)) is not None:
        lock.close()
    return lock is None


def _list_differences(found: Mapping[str, Any], plan: Mapping[str, Any]) -> set[str]:
    """Return the names of what differs; of settings, the settings themselves."""
    names = {key for key in {*found, *plan} if key != "settings" and found.get(key) != plan.get(key)}
    then, now = found.get("settings", {}), plan.get("settings", {})
    return names | {key for key in {*then, *now} if then.get(key) != now.get(key)}
