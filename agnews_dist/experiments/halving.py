"""Successive halving on one rank: members train to a rung and wait there; the settings that are best on validation continue.

A member that continues is the same object, so its result is that of a training without a pause. All waiting members are in
memory. A process that is killed loses them, and they begin again; those that have left do not.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from agnews_dist.distributed import collectives
from agnews_dist.errors import UserError
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, list_evaluations, train_in_lock_step
from agnews_dist.experiments.members import Key, Member, Wave
from agnews_dist.experiments.standings import MemberResult, choose_survivors, count_rungs, place_rungs
from agnews_dist.experiments.sweep_runner import POLL_SECONDS, SweepRunner
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.locks import Lock


@dataclass
class _HeldWave:
    """A wave whose members wait at a rung in this process, with the lock that keeps it from others."""

    lock: Lock
    trainings: list[MemberTraining]


class HalvingRunner(SweepRunner):
    """Trains members by successive halving."""

    keeps_groups = True
    factor = 2
    """The best 1/factor of the settings continue after a rung."""

    def _train_groups(self, waves_of: Sequence[tuple[Member, Sequence[Wave]]]) -> None:
        groups = {member.feature_key: self.open_group(member) for member, _ in waves_of}
        waves = [wave for _, of_group in waves_of for wave in of_group]
        with collectives.without_others():
            rungs = self._place_rungs(groups)
            competing, held = {member.setting for member in self.members}, dict[int, _HeldWave]()
            for rung in range(min(map(len, rungs.values()))):
                self._reach(rung, {member: steps[rung] for member, steps in rungs.items()}, waves, groups, competing, held)
                survivors = choose_survivors(self._results_at(rung, competing), self.num_seeds, self.metric, factor=self.factor)
                for result in self.directory.read_results(rung):
                    if result.setting in competing - survivors and result.state == "finished":
                        # Every process writes the same.
                        reason = f"left after rung {rung + 1}, {result.num_steps:,} steps"
                        self.directory.write_result(replace(result, state="halved", reason=reason))
                competing = survivors
                self.show(now=True)
            self._reach(None, {}, waves, groups, competing, held)
            self.prune(now=True)
        self.show(now=True)

    def _place_rungs(self, groups: Mapping[Key, FeatureGroup]) -> dict[int, list[int]]:
        """Return the steps of each member's rungs.

        Raises:
            UserError: a member is evaluated at its end only, where nothing can be saved.
        """
        num_settings = len({member.setting for member in self.members})
        known, found = dict[Key, list[int]](), dict[int, list[int]]()
        for member in self.members:
            key = (member.feature_key, member.plan_key)
            if key not in known:
                optim = member.config.optim
                loader = build_shared_loader(groups[member.feature_key], member.config)
                evaluations = list_evaluations(loader, optim.epochs, optim.max_steps, optim.evaluate_every)
                known[key] = place_rungs(count_rungs(num_settings, self.factor), self.factor, evaluations)
            found[member.index] = known[key]
            if not known[key]:
                raise UserError("--halving: a member is evaluated at its end only. Set more optim.epochs, or evaluate_every.")
        return found

    def _results_at(self, rung: int | None, competing: Collection[int]) -> list[MemberResult]:
        """Return the results of competing members at a rung. One that has ended before has the same at all later rungs."""
        found = {result.member: result for result in self.directory.read_results()}
        if rung is not None:
            found |= {result.member: result for result in self.directory.read_results(rung)}
        return [result for result in found.values() if result.setting in competing]

    def _reach(
        self,
        rung: int | None,
        steps: Mapping[int, int],
        waves: Sequence[Wave],
        groups: Mapping[Key, FeatureGroup],
        competing: Collection[int],
        held: dict[int, _HeldWave],
    ) -> None:
        """Train until all members of the competing settings have a result for a rung; None: until they have ended.

        `steps`: member -> step of the rung.
        """
        while True:
            there = {result.member for result in self._results_at(rung, competing)}
            left = [
                wave
                for wave in self._rotate(waves)
                if any(member.setting in competing and member.index not in there for member in wave.members)
            ]
            if not left:
                return
            has_worked = False
            for wave in left:
                if wave.number not in held:
                    claimed = self._claim(wave)
                    if claimed is None:
                        continue
                    held[wave.number] = self._hold(wave, claimed[1], groups[wave.members[0].feature_key])
                self._advance(held[wave.number], rung, steps, competing)
                has_worked = True
                self.show()
            if not has_worked:
                time.sleep(POLL_SECONDS)
                self.show()

    def _hold(self, wave: Wave, lock: Lock, group: FeatureGroup) -> _HeldWave:
        """Set up the members of a wave that have not ended, from their beginning."""
        ended = self.directory.find_ended(wave.members)
        loader = build_shared_loader(group, wave.members[0].config)
        members = [member for member in wave.members if member.index not in ended]
        return _HeldWave(lock, [MemberTraining(member, group, loader, self.monitors) for member in members])

    def _advance(self, held: _HeldWave, rung: int | None, steps: Mapping[int, int], competing: Collection[int]) -> None:
        """Train the competing members of a wave to a rung or to their ends, and write their results there."""
        held.trainings = [training for training in held.trainings if training.member.setting in competing]
        until = steps if rung is not None else None
        train_in_lock_step(held.trainings, until, after_step=lambda: self.show_steps(held.trainings))
        if rung is None:
            self._write(held.trainings)
            held.trainings.clear()
            held.lock.close()
            return
        for training in held.trainings:
            result = training.result("finished")
            self.directory.write_result(result, rung=None if result.state == "diverged" else rung)

    def _choose_limit(self, sharing: Sequence[Member], free: int, member_bytes: int) -> int:
        """Return the members of a group that wait at a rung on this rank.

        Raises:
            UserError: they do not fit in memory.
        """
        num_members = -(-len(sharing) // self._worker[1])
        if num_members * member_bytes > free:
            raise UserError(
                f"--halving: {num_members:,} members wait in memory, {gigabytes(num_members * member_bytes)}, and "
                f"{gigabytes(max(0, free))} are left for them. List fewer values, or start more ranks on more machines."
            )
        return num_members
