"""Successive halving on one rank: members train to a rung and wait there; the settings that are best on validation continue.

A member that continues is the same object, so its result is that of a training without a pause. All waiting members are in
memory. A process that is killed loses them, and they begin again; those that have left do not. A rank holds its share of the
waves of its job and no others: so its memory is known before, also if a task of a job array is alone for long.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agnews_dist.distributed import collectives
from agnews_dist.errors import UserError
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, list_evaluations, train_in_lock_step
from agnews_dist.experiments.members import Key, Member, Wave
from agnews_dist.experiments.standings import MemberResult, choose_survivors, count_rungs, place_rungs
from agnews_dist.experiments.sweep_runner import SweepRunner
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.locks import Lock

Held = tuple[Lock, list[MemberTraining]]
"""A wave whose members wait at a rung in this process, with the lock that keeps it from others."""


class HalvingRunner(SweepRunner):
    """Trains members by successive halving."""

    keeps_groups = True

    def __init__(self, *arguments: Any, factor: int, **options: Any) -> None:
        """Prepare. `factor`: the best 1/factor of the settings continue after a rung."""
        super().__init__(*arguments, **options)
        self._factor = factor
        self._own: Sequence[Wave] = ()
        """Waves that this rank may hold."""

    def _train_groups(self, waves_of: Sequence[tuple[Member, Sequence[Wave]]]) -> None:
        waves = [wave for _, of_group in waves_of for wave in of_group]
        if collectives.all_gather(all(map(self.directory.has_ended, waves)))[0]:
            return
        self._own = self._choose_own(waves)
        groups = {member.feature_key: self.open_group(member) for member, _ in waves_of}
        with collectives.without_others():
            rungs = self._place_rungs(groups)
            competing, held = {member.setting for member in self.members}, dict[int, Held]()
            for rung in range(min(map(len, rungs.values()))):
                self._reach(rung, {member: steps[rung] for member, steps in rungs.items()}, waves, groups, competing, held)
                survivors = choose_survivors(
                    self._results_at(rung, competing), self.num_seeds, self.metric, factor=self._factor
                )
                for result in self.directory.read_results(rung):
                    if result.setting in competing - survivors and result.state == "finished":
                        # Every process writes the same.
                        reason = f"left after rung {rung + 1}, {result.num_steps:,} steps"
                        self.directory.write_result(replace(result, state="halved", reason=reason))
                competing = survivors
                self._drop(held, competing)
                self.show(now=True)
            self._reach(None, None, waves, groups, competing, held)
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
                known[key] = place_rungs(count_rungs(num_settings, self._factor), self._factor, evaluations)
            found[member.index] = known[key]
            if not known[key]:
                raise UserError("--halving: a member is evaluated at its end only. Set more optim.epochs, or evaluate_every.")
        return found

    def _results_at(self, rung: int | None, competing: Collection[int]) -> list[MemberResult]:
        """Return the results of competing members at a rung. One that has ended before has the same at all later rungs."""
        places = [None] if rung is None else [None, rung]
        found = {result.member: result for place in places for result in self.directory.read_results(place)}
        return [result for result in found.values() if result.setting in competing]

    def _reach(
        self,
        rung: int | None,
        steps: Mapping[int, int] | None,
        waves: Sequence[Wave],
        groups: Mapping[Key, FeatureGroup],
        competing: Collection[int],
        held: dict[int, Held],
    ) -> None:
        """Train until all members of the competing settings have a result for a rung; None: until they have ended.

        `steps`: member -> step of the rung.
        """
        while True:
            there = {result.member for result in self._results_at(rung, competing)}
            left = {
                wave.number: wave
                for wave in waves
                if any(member.setting in competing and member.index not in there for member in wave.members)
            }
            if not left:
                return
            has_worked = False
            for wave in (each for each in self._own if each.number in left):
                if wave.number not in held:
                    if (lock := self.directory.claim(wave)) is None:
                        continue
                    held[wave.number] = lock, self._set_up(wave, groups[wave.members[0].feature_key])
                self._advance(held[wave.number][1], rung, steps)
                if rung is None:
                    held.pop(wave.number)[0].close()
                has_worked = True
                self.show()
            if not has_worked:
                self.directory.wait_for(left.values())
                self.show()

    def _set_up(self, wave: Wave, group: FeatureGroup) -> list[MemberTraining]:
        """Set up the members of a wave that have not ended, from their beginning."""
        ended = self.directory.find_ended(wave.members)
        loader = build_shared_loader(group, wave.members[0].config)
        return [MemberTraining(member, group, loader, self.monitors) for member in wave.members if member.index not in ended]

    def _drop(self, held: dict[int, Held], competing: Collection[int]) -> None:
        """Free the members whose settings are out."""
        for number, (lock, trainings) in [*held.items()]:
            for training in [*trainings]:
                if training.member.setting not in competing:
                    training.close()
                    trainings.remove(training)
            if not trainings:
                del held[number]
                lock.close()

    def _advance(self, trainings: Sequence[MemberTraining], rung: int | None, steps: Mapping[int, int] | None) -> None:
        """Train the members of a wave to a rung or to their ends, and write their results there."""
        train_in_lock_step(trainings, steps, after_step=lambda: self.show_steps(trainings))
        if rung is None:
            self._write(trainings)
            return
        for training in trainings:
            result = training.result("finished")
            self.directory.write_result(result, rung=None if result.state == "diverged" else rung)

    def _choose_own(self, waves: Sequence[Wave]) -> list[Wave]:
        """Return the waves of this rank, as if its job were alone. Each task of a job array begins at another one of them."""
        (rank, num_ranks), (position, num_workers) = (self.engine.world.rank, self.engine.world.num_ranks), self._worker
        own = waves[rank * len(waves) // num_ranks : (rank + 1) * len(waves) // num_ranks]
        begin = position // num_ranks * len(own) * num_ranks // num_workers
        return [*own[begin:], *own[:begin]]

    def _choose_limit(self, sharing: Sequence[Member], free: int, member_bytes: int) -> int:
        """Return the members of a group that wait at a rung on this rank.

        Raises:
            UserError: they do not fit in memory.
        """
        key = sharing[0].feature_key
        num_members = max(1, sum(len(wave.members) for wave in self._own if wave.members[0].feature_key == key))
        if num_members * member_bytes > free:
            raise UserError(
                f"--halving: {num_members:,} members wait in memory, {gigabytes(num_members * member_bytes)}, and "
                f"{gigabytes(max(0, free))} are left for them. List fewer values, or start more ranks (of one task)."
            )
        return num_members
