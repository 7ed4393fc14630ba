"""The waves of a sweep on one rank: features of a group opened by all ranks, waves claimed one by one, pauses at rungs."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from agnews_dist.config.fields import replace_values
from agnews_dist.config.schema import Config
from agnews_dist.distributed import collectives
from agnews_dist.engine.device import free_device_bytes
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.memory import Estimate, estimate_members, format_estimate
from agnews_dist.errors import count_noun
from agnews_dist.events import Metric, Progress, RunStarted, SweepRow, SweepUpdated
from agnews_dist.experiments.feature_group import FeatureGroup, open_feature_group
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, train_in_lock_step
from agnews_dist.experiments.members import Key, Member, Wave, cut_waves, group_by_features
from agnews_dist.experiments.space import format_values
from agnews_dist.experiments.standings import Standing, rank_settings
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.experiments.sweep_status import SweepStatus
from agnews_dist.run.memory_setup import describe_steps
from agnews_dist.run.results import peak_memory_bytes
from agnews_dist.run.setup import TrainingInputs
from agnews_dist.storage.capacity import free_host_bytes, gigabytes, return_freed_memory
from agnews_dist.training.class_weights import check_class_weights
from agnews_dist.training.loop import Monitors

MAX_WAVE = 8
"""Members that train in lock step. A kill loses the members of the waves in progress."""
MEMORY_SHARE = 0.6
"""Largest share of the free memory for members in training."""
NUM_KEPT = 3
"""Settings whose members' weights are kept on disk."""
SHOW_SECONDS = 0.5
"""Least time between two looks at the results of all ranks, for the table."""
REST = 20
"""Time between two looks at all results, in times of what one takes: in a large sweep it grows with the members."""


class SweepRunner:
    """Trains members on this rank. Every rank has one and calls its methods at the same points."""

    keeps_groups = False
    """True if the features of several groups are open at the same time."""

    def __init__(
        self,
        config: Config,
        num_members: int,
        num_seeds: int,
        engine: Engine,
        directory: SweepDirectory,
        monitors: Monitors,
        *,
        worker: tuple[int, int],
    ) -> None:
        """Prepare. `worker`: this rank's position among all ranks of all jobs of the sweep, and their number."""
        self.engine, self.directory, self.monitors = engine, directory, monitors
        self.members: list[Member] = []
        """All members so far, in the order of their numbers."""
        self.status: SweepStatus | None = None
        """Status to write once features are there; on rank 0."""
        self.returns_to_groups = False
        """True if later calls of `train` need the groups again, as Optuna's do: they stay open while they fit."""
        self.facts: dict[str, str] = {}
        """Header, which waits for the memory of the first group."""
        self.stated_bytes = 0
        """Expected peak memory of a rank."""
        self._limits: dict[Key, int] = {}
        """Members of a group that fit in the memory of this rank at once."""
        self.pace = MAX_WAVE
        """Most members that train at once: few, if an earlier start was stopped before one had ended."""
        self._waiting_bytes = 0
        """Memory of members that wait meanwhile."""
        self._worker = worker
        self.metric: Metric = config.optim.best_metric
        self.num_members, self.num_seeds = num_members, num_seeds
        self._groups: dict[Key, FeatureGroup] = {}
        self._stack = ExitStack()
        self._next_look, self._next_prune, self._num_shown = 0.0, 0.0, -1

    def close(self) -> None:
        """Release the features of all groups."""
        self._groups.clear()
        self._stack.close()

    def train(self, members: Sequence[Member]) -> None:
        """Train more members, those that have no result yet. Collective.

        Raises:
            UserError: they do not fit in memory, or a file cannot be read or written.
        """
        self.members += members
        waves_of, first = list[tuple[Member, list[Wave]]](), 0
        for group in group_by_features(members):
            waves = cut_waves(group, limit=MAX_WAVE, num_workers=self._worker[1], first=first)
            waves_of.append((group[0], waves))
            first += len(waves)
        self.show()
        self._train_groups(waves_of)

    def _train_groups(self, waves_of: Sequence[tuple[Member, Sequence[Wave]]]) -> None:
        """Train the waves of each group of features, one group after the other."""
        for member, waves in waves_of:
            # Another process may train the last one now: all ranks must decide alike.
            if not collectives.all_gather(all(map(self.directory.has_ended, waves)))[0]:
                opened = self.open_group(member)
                with collectives.without_others():
                    self._train_waves(opened, waves)

    def _train_waves(self, group: FeatureGroup, waves: Sequence[Wave]) -> None:
        """Train the waves of a group that no other process trains, until all have ended."""
        position, num_workers = self._worker
        begin = position * len(waves) // num_workers
        # From this worker's own first one on, so that workers rarely ask for the same.
        left = [*waves[begin:], *waves[:begin]]
        while left:
            has_worked, passed, left = False, left, []
            for wave in passed:
                if self.directory.has_ended(wave):
                    continue
                if (lock := self.directory.claim(wave)) is None:
                    left.append(wave)
                    continue
                try:
                    self._train_wave(group, wave)
                finally:
                    lock.close()
                has_worked = True
                self.show()
            if left and not has_worked:
                self.directory.wait_for(left)
                self.show()
        self.prune(now=True)
        self.show(now=True)

    def _train_wave(self, group: FeatureGroup, wave: Wave) -> None:
        """Train the members of a wave that have no result, as many at once as fit in memory."""
        ended = self.directory.find_ended(wave.members)
        left = [member for member in wave.members if member.index not in ended]
        loader = build_shared_loader(group, wave.members[0].config)
        limit = self._limits[wave.members[0].feature_key]
        for begin in range(0, len(left), limit):
            self._train_together(
                [MemberTraining(member, group, loader, self.monitors) for member in left[begin : begin + limit]]
            )
            return_freed_memory()
        self.prune()

    def _train_together(self, trainings: Sequence[MemberTraining]) -> None:
        train_in_lock_step(trainings, after_step=lambda: self.show_steps(trainings))
        self._write(trainings)

    def _write(self, trainings: Sequence[MemberTraining]) -> None:
        for training in trainings:
            result = training.result("finished")
            self.directory.write_result(result, training.tensors() if result.state == "finished" else None)

    def _state_memory(self, group: FeatureGroup, sharing: Sequence[Member]) -> None:
        """Choose how many members train at once, and show the memory expected: in the header, of later groups in a line."""
        alone = partial(describe_steps, world=group.engine.world, use_cuda=group.memory.device == "cuda")
        configs = {replace(group.memory, **alone(member.config)): member.config for member in sharing}
        setups = [group.measure_steps(sizes, config) for sizes, config in configs.items()]

        def estimate(num_members: int) -> Estimate:
            return max((estimate_members(group.shape, each, num_members) for each in setups), key=lambda of: of.device_bytes)

        one, two = estimate(1), estimate(2)
        member_bytes = two.device_bytes - one.device_bytes + two.host_bytes - one.host_bytes
        # Model, tokens and libraries are in memory already.
        free = MEMORY_SHARE * self._free_bytes() - group.memory.cache_bytes - one.device["activations"] - self._waiting_bytes
        limit = self._limits[sharing[0].feature_key] = self._choose_limit(sharing, int(free), member_bytes)
        found = estimate(limit)
        # Reading the model may have taken more than the training will.
        loaded = peak_memory_bytes(self.engine.device) if self.facts else 0
        self.stated_bytes = max(self.stated_bytes, found.device_bytes + self._waiting_bytes, loaded)
        self._waiting_bytes += self.keeps_groups * limit * member_bytes
        text = f"{format_estimate(found)}; {count_noun(limit, 'member')} at a time"
        text += f"; {gigabytes(loaded)} to load the model" * (loaded > found.device_bytes)
        self.monitors.emit(RunStarted(facts=self.facts | {"memory": text, "features": group.kept}, parameters={}))
        self.facts = {}

    def _choose_limit(self, sharing: Sequence[Member], free: int, member_bytes: int) -> int:
        """Return the members of the largest wave, or as many as fit."""
        waves = cut_waves(sharing, limit=MAX_WAVE, num_workers=self._worker[1])
        return max(1, min(free // member_bytes, self.pace, max(len(wave.members) for wave in waves)))

    def _free_bytes(self) -> int:
        world = self.engine.world
        return min(free_device_bytes(self.engine.device, world.ranks_per_node), free_host_bytes() // world.ranks_per_node)

    def _has_room(self) -> bool:
        """Return whether the ranks have room for another group as large as the largest so far. Collective."""
        return all(collectives.all_gather(MEMORY_SHARE * self._free_bytes() > self.stated_bytes))

    def standings(self) -> list[Standing]:
        """Rank the settings by what has ended so far."""
        return rank_settings(self.directory.read_results(), self.num_seeds, self.metric)

    def prune(self, *, now: bool = False) -> None:
        """Remove the weights of all settings but the few best so far. Those that are missed are trained again at the end.

        `now`: also if that takes a large part of the time.
        """
        begin = time.monotonic()
        if not now and begin < self._next_prune:
            return
        standings = self.standings()
        kept = [result.member for standing in standings[:NUM_KEPT] for result in standing.results]
        self.directory.keep_tensors(kept, [result.member for standing in standings for result in standing.results])
        self._next_prune = time.monotonic() + REST * (time.monotonic() - begin)

    def show(self, *, now: bool = False) -> None:
        """Show the table of the settings, on rank 0, if more members have ended. `now`: look without a pause."""
        clock = time.monotonic()
        if not self.engine.world.is_main or (not now and clock < self._next_look):
            return
        standings = self.standings()
        self._next_look = time.monotonic() + max(SHOW_SECONDS, REST * (time.monotonic() - clock))
        num_done = sum(len(each.results) for each in standings)
        if num_done == self._num_shown:
            return
        self._num_shown = num_done
        rows = tuple(
            SweepRow(
                settings=format_values(each.values),
                state=each.state,
                mean=each.mean(self.metric),
                deviation=each.deviation(self.metric),
                loss=each.mean_loss,
            )
            for each in standings
        )
        self.monitors.emit(SweepUpdated(metric=self.metric, rows=rows, num_done=num_done, num_members=self.num_members))

    def show_steps(self, trainings: Sequence[MemberTraining]) -> None:
        """Show the steps of the members that train on rank 0 now."""
        if trainings:
            done, total = sum(each.step for each in trainings), sum(each.trainer.num_steps for each in trainings)
            first, more = trainings[0].member.index, len(trainings) - 1
            task = f"train member {first}" + (f" and {more} more" if more else "")
            self.monitors.emit(Progress(task=task, done=done, total=total, unit="steps"))
        self.show()

    def limit(self, member: Member) -> int:
        """Return how many members of an open group may be in memory at once."""
        return min(self._limits[member.feature_key], MAX_WAVE)

    def open_group(self, member: Member, *, is_scored_only: bool = False) -> FeatureGroup:
        """Load model and tokens, and compute or open the features, that `member` shares with others. Collective.

        `is_scored_only`: features of train are not computed for it.
        """
        key = member.feature_key
        if key in self._groups:
            return self._groups[key]
        if not self.keeps_groups and not (self.returns_to_groups and self._has_room()):
            self.close()
        sharing = [other for other in self.members if other.feature_key == key]

        def check(inputs: TrainingInputs) -> None:
            for other in sharing:
                check_class_weights(other.config.optim.class_weights, inputs.class_names)

        group = self._groups[key] = open_feature_group(
            # Every member sets its own rate.
            replace_values(member.config, {"model.dropout": None}),
            self.engine,
            self.monitors,
            self._stack,
            # Optuna's later rounds read them too; how many members have this group is not known.
            num_trainings=0 if is_scored_only else self.num_members if self.returns_to_groups else len(sharing),
            check=check,
            announce=partial(self._state_memory, sharing=sharing),
        )
        precision = {"precision": self.engine.precision, **group.inputs.fingerprints}
        is_main = self.engine.world.is_main
        outcome = collectives.catch(partial(self.directory.check_inputs, key, precision)) if is_main else None
        collectives.raise_if_any_failed(outcome)
        if self.status is not None:
            self.status.begin()
        return group
