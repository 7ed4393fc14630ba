"""A sweep: many trainings on one set of features, the selection on validation, and one look at test for the selected setting.

Every rank trains members by itself, so ranks exchange nothing but files. The processes of a job array share a sweep's directory
in the same way. A member leaves its result there when it ends; a sweep that is started again trains the others.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from agnews_dist.config.fields import replace_values, values_of
from agnews_dist.config.schema import Config
from agnews_dist.data.hub_files import Request
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.slurm import find_array_task, identify_array
from agnews_dist.distributed.world import World, print_line
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import AlreadyFinished, ConfigError, Stopped, UserError, count_noun
from agnews_dist.events import Warned
from agnews_dist.experiments.halving import HalvingRunner
from agnews_dist.experiments.members import Member, build_members, group_by_features, list_ignored
from agnews_dist.experiments.search import OptunaSearch, SearchKind, Settings
from agnews_dist.experiments.selection import finish_sweep
from agnews_dist.experiments.space import SEED, Dimension, Space, make_space
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.experiments.sweep_runner import MAX_WAVE, SweepRunner
from agnews_dist.experiments.sweep_status import SweepStatus, is_own_sweep
from agnews_dist.report.console import Console, Sinks
from agnews_dist.run.directory import new_names
from agnews_dist.run.engine_setup import start_training_engine
from agnews_dist.run.fingerprints import weight_settings
from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
from agnews_dist.run.model_setup import read_model_files
from agnews_dist.run.status import runs_of_job
from agnews_dist.training.loop import Monitors
from agnews_dist.training.timing import StageTimer


@dataclass(frozen=True)
class SweepJob:
    """Everything that a sweep is made of, the same on every rank."""

    config: Config
    """Settings that all members share; of varied ones, the first values."""
    dimensions: Sequence[Dimension]
    num_samples: int | None = None
    """Random combinations; None: all."""
    search: SearchKind = "random"
    """Source of the `num_samples` combinations."""
    sample_seed: int = 0
    per_round: int = 1
    """Combinations that Optuna proposes before it knows the results of the former ones. `run_sweep` sets it."""
    wanted: frozenset[str] = frozenset()
    """`ensemble`, `distilled` or both: scored besides the members of the selected setting."""
    halving: int | None = None
    """Factor of successive halving: the best 1/factor of the settings survive a rung; None: all are trained to the end."""

    def values_of(self, key: str) -> set[Any]:
        """Return the values that members may have for a setting."""
        listed = [value for dimension in self.dimensions if dimension.key == key for value in dimension.values]
        return {*(listed or [dict(values_of(self.config))[key]])}

    def list_settings(self, space: Space) -> list[Settings]:
        """Return the combinations of settings in their order, as far as they do not depend on results."""
        if self.search == "optuna":
            return []
        if self.num_samples is None:
            return list(space.grid())
        return list(space.sample(self.num_samples, self.sample_seed))

    def describe(self, space: Space) -> dict[str, Any]:
        """Return what decides the members and their results, as JSON holds it."""
        varied = {SEED, *(dimension.key for dimension in self.dimensions)}
        settings = {key: value for key, value in weight_settings(self.config).items() if key not in varied}
        return {
            "format": 1,
            "settings": settings,
            "varied settings": {each.key: each.describe() for each in space.dimensions},
            "seeds": list(space.seeds),
            "samples": None if self.num_samples is None else [self.search, self.num_samples, self.sample_seed],
            # Other rounds would give other proposals.
            **({"proposals per round": self.per_round} if self.search == "optuna" else {}),
            "halving": self.halving,
        }


def check_job(job: SweepJob, num_tasks: int = 1) -> tuple[Space, list[Member]]:
    """Check a sweep as far as is possible without data and model; return its space and members. `num_tasks`: of a job array.

    Raises:
        ConfigError: nothing varies, too much varies, or settings contradict each other.
    """
    space = make_space(job.dimensions, seed=job.config.run.seed, num_samples=job.num_samples)
    settings = job.list_settings(space)
    backend = job.config.engine.backend
    if backend != "ddp":
        raise ConfigError(f"engine.backend {backend}: each member of a sweep trains on one rank, unsharded. Leave it out.")
    if job.search == "optuna" and (job.num_samples is None or job.halving is not None):
        raise ConfigError(
            "--search optuna: it proposes combinations one after another. Set --samples N, and leave out --halving."
        )
    if job.halving is not None and len(settings) < 2:
        raise ConfigError("--halving: one combination of settings has no rival. Vary another setting than run.seed.")
    if job.wanted and len(space.seeds) < 2:
        raise ConfigError("--ensemble: one seed has no mean with others. List several, for example --run.seed 0..4.")
    if job.wanted and "random" in job.values_of("model.init"):
        raise ConfigError("--ensemble with model.init random: seeds have other frozen parts. Set model.init pretrained.")
    members = build_members(job.config, settings, space.seeds)
    if "lbfgs" in job.values_of("optim.solver"):
        for option, is_given in (("--halving", job.halving is not None), ("--distil", "distilled" in job.wanted)):
            if is_given:
                raise ConfigError(f"{option} with optim.solver lbfgs: it is for steps of AdamW. Leave one of them out.")
    if num_tasks > 1 and job.config.run.name is None:
        raise ConfigError("run.name: the tasks of a job array need one name for all. Set --run.name.")
    return space, members


def run_sweep(
    world: World, job: SweepJob, *, preemption: PreemptionHandler, console: Console | None = None, start: float | None = None
) -> Path:
    """Train all members, select a setting, score test, and export the best member. Collective. Return the directory.

    Raises:
        UserError: anything that the user can fix.
        Stopped: the sweep was asked to stop; the same command continues it.
    """
    task, num_tasks = find_array_task(os.environ)
    space, members = check_job(job, num_tasks)
    worker = (task * world.num_ranks + world.rank, num_tasks * world.num_ranks)
    # As many as keep all workers busy.
    job = replace(job, per_round=-(-worker[1] // len(space.seeds)))
    config, timer = job.config, StageTimer(start or time.perf_counter())
    engine = start_training_engine(config, world, preemption)
    sinks = Sinks()
    with ExitStack() as stack:
        stack.enter_context(sinks)
        if console is not None:
            sinks.add(console)
        directory = _open_directory(job, space, world, num_workers=worker[1])
        # After the status is written.
        stack.callback(directory.close)
        num_members = len(members) or (job.num_samples or 0) * len(space.seeds)
        status = stack.enter_context(SweepStatus(directory, MAX_WAVE)) if world.is_main else None
        preemption.before_exit = _make_last_words(directory, num_members, status)
        if ignored := list_ignored(config):
            sinks(Warned(message=f"{', '.join(ignored)}: without effect in a sweep."))
        fetch_inputs(partial(list_hub_requests, job, space, members), world, sinks)
        collectives.raise_if_any_failed(collectives.catch_on_main(partial(_check_models, members), "reads all models' files"))
        monitors = Monitors(sinks, timer, preemption)
        sizes = (num_members, len(space.seeds))
        kind = SweepRunner if job.halving is None else partial(HalvingRunner, factor=job.halving)
        runner = kind(config, *sizes, engine, directory, monitors, worker=worker)
        runner.status, runner.returns_to_groups = status, job.search == "optuna"
        stack.callback(runner.close)
        runner.pace = collectives.all_gather(status.pace if status is not None else MAX_WAVE)[0]
        if runner.pace < MAX_WAVE and job.halving is None:
            pace = count_noun(runner.pace, "member")
            sinks(Warned(message=f"an earlier start was stopped before a member had ended: now {pace} at a time."))
        runner.facts = _describe(job, space, members, directory, engine)
        try:
            if job.search == "optuna":
                _train_proposals(job, space, runner)
            else:
                runner.train(members)
            done = finish_sweep(runner, job.wanted)
        except Stopped:
            raise Stopped(_count_ended(directory, num_members)) from None
        if done is not None:
            sinks(done)
    return directory.path


def _train_proposals(job: SweepJob, space: Space, runner: SweepRunner) -> None:
    """Train the combinations that Optuna proposes. Collective."""
    assert job.num_samples is not None
    check = partial(replace_values, job.config)
    search = OptunaSearch(space, num_samples=job.num_samples, per_round=job.per_round, seed=job.sample_seed, check=check)
    num_settings = 0
    for settings in search.rounds():
        runner.train(build_members(job.config, settings, space.seeds, first=num_settings))
        num_settings += len(settings)
        scores = {standing.setting: standing.mean(runner.metric) for standing in runner.standings()}
        search.tell([scores[setting] for setting in range(num_settings)])
    if search.refused:
        message = f"optuna: {count_noun(len(search.refused), 'proposal')} left out for contradicting settings"
        runner.monitors.emit(Warned(message=f"{message}. The first: {search.refused[0]}"))


def list_hub_requests(job: SweepJob, space: Space, members: Sequence[Member]) -> list[Request]:
    """Return the requests for all that members read from the hub; with Optuna for all models that it may propose."""
    listed = tuple(each for each in space.dimensions if each.key in ("model.name", "model.revision", "model.init"))
    configs = [group[0].config for group in group_by_features(members)]
    configs = configs or [replace_values(job.config, values) for values in Space(listed, space.seeds).grid()]
    # Of the same files with and without weights, the last one counts.
    configs.sort(key=lambda config: config.model.init == "pretrained")
    return list({request.repository: request for config in configs for request in list_requests(config)}.values())


def _check_models(members: Sequence[Member]) -> None:
    """Check what the models' small files show: a fault of the last group is known before the first one trains."""
    groups = group_by_features(members)
    for config in (group[0].config for group in groups if len(groups) > 1):
        read_model_files(config.model, config.data)


def _open_directory(job: SweepJob, space: Space, world: World, *, num_workers: int) -> SweepDirectory:
    """Open the directory of a sweep. Collective; a job array needs `run.name`."""
    run = job.config.run

    def open_on_main() -> SweepDirectory:
        runs, plan = Path(run.dir), job.describe(space)
        names = new_names(f"sweep-{Path(job.config.model.name).name}", datetime.now())
        directory = None if run.name else _open_unfinished(runs, plan, num_workers)
        if directory is None:
            directory = SweepDirectory(runs / (run.name or next(name for name in names if not (runs / name).exists())))
            overwrite = run.overwrite and not is_own_sweep(directory.path)
            directory.open(plan, overwrite=overwrite, num_workers=num_workers)
        if directory.is_finished(job.wanted):
            SweepStatus(directory, MAX_WAVE).end("finished", "all members have ended")
            directory.close()
            raise AlreadyFinished(
                f"{directory.path} is finished: nothing is left to do. Read its sweep.json, or pass --run.overwrite."
            )
        return directory

    outcome = collectives.catch(open_on_main) if world.is_main else None
    collectives.wait_for_main("opens the directory of the sweep")
    directory = collectives.raise_if_any_failed(outcome)
    path = collectives.all_gather(directory.path if directory is not None else None)[0]
    assert path is not None
    return directory or SweepDirectory(path)


def _open_unfinished(runs: Path, plan: Mapping[str, Any], num_workers: int) -> SweepDirectory | None:
    """Open the sweep that an earlier start of this job began without a `run.name`."""
    for name in runs_of_job(runs, identify_array(os.environ), sweeps=True):
        directory = SweepDirectory(runs / name)
        with suppress(UserError):  # another sweep of the job
            directory.open(plan, overwrite=False, num_workers=num_workers)
            return directory
    return None


def _count_ended(directory: SweepDirectory, num_members: int) -> str:
    num_ended = len(directory.read_results())
    return (
        f"sweep {directory.path}: stopped after {num_ended:,} of {count_noun(num_members, 'member')}. The same command with "
        f"--run.name {directory.path.name} continues it."
    )


def _make_last_words(directory: SweepDirectory, num_members: int, status: SweepStatus | None) -> Callable[[str, str], None]:
    """Return what the thread that ends a stopped process calls."""

    def print_last_words(state: str, reason: str) -> None:
        if status is not None:
            status.end_early("preempted" if state == "preempted" else "failed", reason)
        if state == "preempted":
            print_line(f"{reason}: {_count_ended(directory, num_members)}")

    return print_last_words


def _describe(
    job: SweepJob, space: Space, members: Sequence[Member], directory: SweepDirectory, engine: Engine
) -> dict[str, str]:
    """Return the facts of the header."""
    num_settings = len({member.setting for member in members}) or job.num_samples or 0
    groups, num_seeds = group_by_features(members), len(space.seeds)
    order = "all" if job.num_samples is None else f"{job.search}, --sample_seed {job.sample_seed}"
    combinations = f"{count_noun(num_settings, 'combination')} ({order})"
    facts = {
        "sweep": str(directory.path),
        "model": job.config.model.name,
        "data": job.config.data.source,
        "members": f"{num_settings * num_seeds:,}: {combinations} x {count_noun(num_seeds, 'seed')}",
    }
    facts |= {each.key: ", ".join(map(str, each.describe()[:8])) for each in space.dimensions}
    if len(groups) > 1:
        facts["groups"] = f"{len(groups):,}, each of members with the same model, texts and cut: they share features"
    if job.halving is not None:
        facts["halving"] = (
            f"the best 1/{job.halving} of the combinations survive a rung, by validation {job.config.optim.best_metric}"
        )
    facts["ranks"] = f"{engine.world.num_ranks}; each trains members by itself"
    facts["device"] = f"{engine.description}, {engine.precision}"
    return facts
