"""The directory of a sweep: its plan, a file per member, locks of waves. Any number of processes may work in it at once.

    plan.json               what the sweep is made of; another plan is refused
    members/00003.json      result of a member that has ended
    members/00003.rung1     result of a member at a rung of successive halving
    members/00003.safetensors   best weights and validation predictions, of the best settings only
    members/wave-00001.lock lock of the process that trains a wave; the kernel releases it when that process dies
    sweep.json, sweep.csv   all results, when all members have ended
    sweep.html, sweep.md    the report
    status.json             state of the sweep's job; status-1.json and so on of the other tasks of a job array
    best/                   the best member of the selected setting, as a run leaves it

A file is written under a hidden name and renamed. Members can be trained again, so nothing waits for the disk.
"""

import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from agnews_dist.errors import ConfigError, UserError
from agnews_dist.experiments.members import Wave
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.report.result_files import write_json
from agnews_dist.run.status import PLAN
from agnews_dist.run.stored_sweeps import MEMBERS, RESULTS
from agnews_dist.storage import atomic
from agnews_dist.storage.locks import Lock, try_lock


class SweepDirectory:
    """Files of one sweep. Every rank has one; the ranks must share the file system of `path`."""

    def __init__(self, path: Path) -> None:
        """Touch nothing on disk yet."""
        self.path = path
        self._members = path / MEMBERS
        self._results: dict[str, MemberResult] = {}
        self._removed: set[int] = set()
        """Members whose tensors are removed."""

    def is_finished(self, wanted: Collection[str] = ()) -> bool:
        """Return whether all results are there, with rows `wanted` in the comparison of an ensemble."""
        try:
            found = json.loads((self.path / RESULTS).read_bytes())
            return {*wanted} <= {row["name"] for row in found.get("ensemble", [])}
        except FileNotFoundError:
            return False

    def open(self, plan: Mapping[str, Any], *, overwrite: bool) -> None:
        """Create the directory, or continue the sweep of the same plan in it. `overwrite`: replace a finished or other one.

        Raises:
            UserError: the directory is not a sweep's, cannot be written, or holds a sweep with another plan.
        """
        plan = atomic.to_json_value(plan)
        try:
            found = self._read_plan()
            if overwrite and found is not None and (found != plan or self.is_finished()):
                shutil.rmtree(self.path)
                found = None
            if found is None:
                if self.path.is_dir() and any(self.path.iterdir()):
                    raise UserError(f"{self.path}: it exists and is not a sweep's directory. Choose another --run.name.")
                self._members.mkdir(parents=True, exist_ok=True)
                write_json(self.path / PLAN, plan)
            elif found != plan:
                differing = ", ".join(sorted(_list_differences(found, plan)))
                raise ConfigError(
                    f"{self.path}: it has another sweep (in {differing}). Set another --run.name, or pass --run.overwrite."
                )
        except OSError as error:
            raise UserError(
                f"run.dir {self.path.parent}: {self.path} cannot be written ({error.strerror or error}). Set --run.dir to a "
                "writable directory."
            ) from error

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
        suffix = ".json" if rung is None else f".rung{rung}"
        names = sorted(path.name for path in self._members.iterdir() if path.suffix == suffix)
        for name in names:
            if name not in self._results:
                # Another process may replace a file by an equal one, never by another.
                fields: dict[str, Any] = json.loads((self._members / name).read_bytes())
                # A number that is not finite is null in JSON.
                fields |= {key: math.nan for key, value in fields.items() if value is None}
                self._results[name] = MemberResult(**fields)
        return [self._results[name] for name in names]

    def write_result(
        self, result: MemberResult, tensors: Mapping[str, Tensor] | None = None, *, rung: int | None = None
    ) -> None:
        """Write the result of a member, its tensors first. `rung`: it pauses there."""
        stem = f"{result.member:05}"
        if tensors is not None:
            with atomic.new_file(self._members / f"{stem}.safetensors", is_durable=False) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        suffix = ".json" if rung is None else f".rung{rung}"
        with atomic.new_file(self._members / f"{stem}{suffix}", is_durable=False) as temporary:
            temporary.write_text(json.dumps(atomic.to_json_value(asdict(result)), allow_nan=False), encoding="utf-8")

    def read_tensors(self, member: int) -> dict[str, Tensor]:
        """Read the tensors of a member.

        Raises:
            UserError: they are missing or damaged.
        """
        path = self._members / f"{member:05}.safetensors"
        try:
            return load_file(path)
        except Exception as error:
            raise UserError(
                f"{path}: it cannot be read ({error}). Remove {path.with_suffix('.json')}: the same command trains it again."
            ) from error

    def has_ended(self, wave: Wave) -> bool:
        """Return whether every member of a wave has a result."""
        return all((self._members / f"{member.index:05}.json").is_file() for member in wave.members)

    def claim(self, wave: Wave) -> Lock | None:
        """Lock a wave without waiting; None: another process trains it."""
        return try_lock(self._members / f"wave-{wave.number:05}.lock")

    def claim_selection(self) -> Lock | None:
        """Lock the work after the last member; None: another process does it."""
        return try_lock(self.path / "selection.lock")

    def keep_tensors(self, kept: Collection[int], ended: Iterable[int]) -> None:
        """Remove the tensors of members that have `ended`, but for those of `kept`."""
        for member in set(ended) - set(kept) - self._removed:
            with suppress(OSError):
                (self._members / f"{member:05}.safetensors").unlink(missing_ok=True)
                self._removed.add(member)


def _list_differences(found: Mapping[str, Any], plan: Mapping[str, Any]) -> set[str]:
    """Return the names of what differs; of settings, the settings themselves."""
    names = {key for key in {*found, *plan} if key != "settings" and found.get(key) != plan.get(key)}
    then, now = found.get("settings", {}), plan.get("settings", {})
    return names | {key for key in {*then, *now} if then.get(key) != now.get(key)}
