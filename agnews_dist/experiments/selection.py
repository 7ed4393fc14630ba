"""The end of a sweep: the selected setting is scored on test, once, over its seeds; its best member is exported."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from agnews_dist.config.fields import replace_values
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError, count_noun
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_together, score_logits
from agnews_dist.events import SCORES, Progress, RunDone, begin_phase
from agnews_dist.experiments import ensemble
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, load_member, train_in_lock_step
from agnews_dist.experiments.members import Member, group_by_features
from agnews_dist.experiments.space import SEED, format_values
from agnews_dist.experiments.standings import Standing
from agnews_dist.experiments.stored_sweeps import RESULTS
from agnews_dist.experiments.sweep_results import (
    SplitsOf,
    compare_ensemble,
    make_command,
    spread,
    summarise_seeds,
    try_to_write_page,
    write_run,
    write_table,
)
from agnews_dist.experiments.sweep_runner import SweepRunner
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.report.result_files import versions, write_json
from agnews_dist.run.results import peak_memory_bytes
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.locks import Lock

T = TypeVar("T")
BEST, DISTILLED = "best", "distilled"
"""Directories of the best member of the selected setting, and of the distilled one."""
NUM_SCORED = 3
"""Members that are scored in the memory of one in training, which has moments and best weights besides its weights."""


def finish_sweep(runner: SweepRunner, wanted: frozenset[str]) -> RunDone | None:
    """Select a setting, score test, write the results. Collective. Return the last event, on rank 0.

    None elsewhere, and on the rank 0 of a job whose sweep another job finishes. `wanted`: `ensemble`, `distilled` or both.

    Raises:
        UserError: every setting diverged, or a file cannot be written.
    """
    directory, world = runner.directory, runner.engine.world
    lock = _wait_for_selection(runner, wanted) if world.is_main else None
    # Another process may select for a long time.
    collectives.wait_for_main("waits for another process that selects")
    try:
        if not collectives.all_gather(lock is not None)[0]:
            return RunDone(paths=_list_paths(directory.path)) if world.is_main else None
        _check_results(runner)
        finish = _Finish(runner, wanted)
        # With drawn weights every seed has a frozen part of its own. That of the best member is the last, to export it.
        for part in sorted(group_by_features(finish.members), key=lambda part: finish.best in part):
            trains = collectives.all_gather(world.is_main and finish.needs_training(part))[0]
            _run_on_main(world, partial(finish.score, runner.open_group(part[0], is_scored_only=not trains), part))
        return _run_on_main(world, partial(finish.write, runner.open_group(finish.best)))
    finally:
        if lock is not None:
            lock.close()


def _wait_for_selection(runner: SweepRunner, wanted: frozenset[str]) -> Lock | None:
    """Return the lock of the selection; None: another process has finished it."""
    runner.monitors.emit(begin_phase("select the best settings"))
    while not runner.directory.is_finished(wanted):
        lock = runner.directory.claim(None)
        if lock is not None:
            return lock
        runner.directory.wait_for([None])
    return None


def _check_results(runner: SweepRunner) -> None:
    """Check that the results belong to the members, and that one setting can be selected.

    Raises:
        UserError: every setting diverged, or a result is another member's.
    """
    path, standings = runner.directory.path, runner.standings()
    for result in runner.directory.read_results():
        member = runner.members[result.member]
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in member.values.items()}
        if (dict(result.values), result.seed) != (values, member.seed):
            raise UserError(f"{path}: member {result.member} has other settings than its result. Set another --run.name.")
    if standings[0].state != "finished":
        # Those that halving has ended never got to the end.
        reason = next((of.reason for each in standings for of in each.results if of.state == "diverged"), "")
        raise UserError(f"{path}: every setting that was not dropped diverged ({reason}). Lower optim.lr or max_grad_norm.")


def _list_paths(path: Path) -> dict[str, str]:
    """Return the files of a finished sweep that a person opens."""
    models = {name: path / name / "model" for name in (BEST, DISTILLED)}
    files = {"report": path / "sweep.html", "model": models[BEST], "distilled model": models[DISTILLED]}
    files |= {"table": path / "sweep.csv", "results": path / RESULTS}
    return {name: str(file) for name, file in files.items() if file.exists()}


def _run_on_main(world: World, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 while the others wait; its errors are raised on all. Collective."""
    outcome = None
    if world.is_main:
        with collectives.without_others():
            outcome = collectives.catch(work)
    collectives.wait_for_main("scores the selected members")
    return collectives.raise_if_any_failed(outcome)


class _Finish:
    """The last work of a sweep, on rank 0 alone: `score` for each group of features, then `write`."""

    def __init__(self, runner: SweepRunner, wanted: frozenset[str]) -> None:
        self._runner, self._wanted, self._emit = runner, wanted, runner.monitors.emit
        self._standings = runner.standings()
        self._selected = self._standings[0]
        results, metric = self._selected.results, runner.metric
        self.members = [runner.members[result.member] for result in results]
        """Members of the selected setting."""
        self._best = max(range(len(results)), key=lambda i: (results[i].score(metric), -results[i].loss, -i))
        self._trains_again = False
        self._best_tensors: dict[str, Tensor] = {}
        self._scores: dict[int, dict[str, SplitScores]] = {}
        self._means: dict[str, ensemble.MeanProbabilities] = {}
        """Split -> probabilities of the ensemble."""

    @property
    def best(self) -> Member:
        """The member with the best validation score."""
        return self.members[self._best]

    def needs_training(self, members: Sequence[Member]) -> bool:
        """Return whether the features of train are needed: for a distilled member, or for weights that were not kept."""
        read = self._runner.directory.read_tensors
        self._trains_again = any(read(member.index) is None for member in members)
        return self._trains_again or "distilled" in self._wanted

    def score(self, group: FeatureGroup, members: Sequence[Member]) -> None:
        """Score all splits with members that share their features, as many at once as the memory for training holds."""
        limit = self._runner.limit(members[0]) * (1 if self._trains_again else NUM_SCORED)
        for begin in range(0, len(members), limit):
            self._score_part(group, members[begin : begin + limit])

    def _score_part(self, group: FeatureGroup, members: Sequence[Member]) -> None:
        classifiers = [self._load(group, member) for member in members]
        for member, scores in zip(members, self._score_together(group, classifiers), strict=True):
            self._scores[member.index] = scores
        for name in [*_scored_splits(group), *["train"] * ("distilled" in self._wanted)] if self._wanted else ():
            table = group.tables[name]
            if name not in self._means:
                self._means[name] = ensemble.MeanProbabilities(len(table), len(group.inputs.class_names))
            self._means[name].add(classifiers, table, group.engine, group.features(name))

    def _load(self, group: FeatureGroup, member: Member) -> Classifier:
        """Read a member's weights. Those that were not kept are made again by the same training."""
        tensors = self._runner.directory.read_tensors(member.index)
        if tensors is None:
            tensors = self._train(member, group).tensors()
        if member is self.best:
            self._best_tensors = tensors
        return load_member(group, member, tensors)[0]

    def _train(self, member: Member, group: FeatureGroup, targets_NC: Tensor | None = None) -> MemberTraining:
        training = MemberTraining(member, group, build_shared_loader(group, member.config), self._runner.monitors)
        if targets_NC is not None:
            training.trainer.use_soft_targets(targets_NC)
        train_in_lock_step([training], after_step=lambda: self._runner.show_steps([training]))
        if (result := training.result("finished")).state == "diverged":
            raise UserError(f"member with seed {member.seed}: another training diverged ({result.reason}). Lower optim.lr.")
        return training

    def write(self, group: FeatureGroup) -> RunDone:
        """Export the best member, whose group it is, write all files, and return the last event."""
        runner, directory, best = self._runner, self._runner.directory, self._best
        singles = [self._scores[member.index] for member in self.members]
        self._emit(begin_phase("export the model"))
        write_run(directory.path / BEST, group, self.best, self._best_tensors, singles[best], self._selected.results[best])
        scored = {name: [of[name].scores for of in singles] for name in singles[best]}
        summaries = {
            name: summarise_seeds([each for each in of if each is not None]) for name, of in scored.items() if of[0] is not None
        }
        num_rows = len(group.tables["validation"])
        rung = {result.member: getattr(result, runner.metric) for result in directory.read_results(0)}
        report: dict[str, Any] = {
            "format": 1,
            "metric": runner.metric,
            "versions": versions(),
            "settings": [_describe_standing(each, num_rows, rung) for each in self._standings],
            "members": [asdict(result) for result in directory.read_results()],
            "selected": {
                "setting": self._selected.setting,
                "values": self._selected.values,
                "seeds": [member.seed for member in self.members],
                "best_member": self.best.index,
                **summaries,
            },
            "command": make_command(self.best.config),
            "memory": {"expected_bytes": runner.stated_bytes, "peak_bytes": peak_memory_bytes(runner.engine.device)},
        }
        if self._wanted:
            report["ensemble"] = self._combine(group, singles)
        write_table(directory.path / "sweep.csv", directory.read_results())
        write_json(directory.path / RESULTS, report)
        try_to_write_page(directory.path, report, config=self.best.config, emit=self._emit)
        facts = _facts(runner, self._selected, summaries, self.best, report)
        return RunDone(facts=facts, paths=_list_paths(directory.path))

    def _score_together(self, group: FeatureGroup, classifiers: Sequence[Classifier]) -> list[dict[str, SplitScores]]:
        """Score all splits; the features of each are read or computed once."""
        scores = [dict[str, SplitScores]() for _ in classifiers]
        for name in _scored_splits(group):
            self._emit(begin_phase(f"score {name}"))
            source = group.features(name)
            found = evaluate_together(classifiers, group.tables[name], group.engine, features=source, emit=self._emit)
            num_rows = len(group.tables[name])
            self._emit(Progress(task=f"score {name}", done=num_rows, total=num_rows, unit="rows"))
            for split, of_member in zip(found, scores, strict=True):
                of_member[name] = split
        return scores

    def _combine(self, group: FeatureGroup, singles: Sequence[SplitsOf]) -> list[dict[str, Any]]:
        """Score the ensemble, and distil it; return the rows of the comparison."""
        means = {name: self._means[name] for name in _scored_splits(group)}
        seconds, temperature = {"ensemble": sum(each.seconds for each in means.values())}, None
        others: dict[str, SplitsOf] = {
            "ensemble": {
                name: score_logits(each.log_NC, group.tables[name].labels_N, seconds=each.seconds)
                for name, each in means.items()
            }
        }
        if "distilled" in self._wanted:
            begin = time.perf_counter() - self._means["train"].seconds
            others["distilled"], temperature = self._distil(group)
            seconds["distilled"] = time.perf_counter() - begin
        rows = compare_ensemble(singles, self._best, others)
        trained = [result.seconds for result in self._selected.results]
        for row in rows:
            # The members' own time, and what comes on top of it.
            own = {"best single": trained[self._best], "mean single": sum(trained) / len(trained)}
            row["seconds"] = round(own.get(row["name"], sum(trained) + seconds.get("ensemble", 0.0)), 3)
            if row["name"] == "distilled":
                row |= {"seconds": round(row["seconds"] + seconds["distilled"], 3), "temperature": temperature}
        return rows

    def _distil(self, group: FeatureGroup) -> tuple[SplitsOf, float]:
        """Train one more member on the ensemble's probabilities; write it as a run; return its scores and temperature."""
        self._emit(begin_phase("distil the ensemble"))
        seeds = [member.seed for member in self.members]
        config = replace_values(self.members[0].config, {SEED: max(seeds) + 1})
        member = Member(len(self._runner.members), self._selected.setting, self._selected.values, config)
        training = self._train(member, group, torch.from_numpy(np.exp(self._means.pop("train").log_NC)))
        temperature = ensemble.choose_temperature(training.trainer.best.scores)
        tensors = ensemble.fold_temperature(training.tensors(), temperature)
        [scores] = self._score_together(group, [load_member(group, member, tensors)[0]])
        note = (
            "In place of the labels it learnt the mean probabilities of trainings with these settings and the seeds "
            f"{', '.join(map(str, seeds))}. Then out_head was divided by the temperature {temperature:.6g}."
        )
        path = self._runner.directory.path / DISTILLED
        write_run(path, group, member, tensors, scores, training.result("finished"), note)
        return scores, temperature


def _scored_splits(group: FeatureGroup) -> list[str]:
    return [name for name in ("validation", "test") if name in group.tables]


def _describe_standing(standing: Standing, num_rows: int, rung: Mapping[int, float]) -> dict[str, Any]:
    """Describe a setting. `rung`: member -> score at the first rung of halving, where all had the same share of training."""
    members, results = [result.member for result in standing.results], standing.results
    early = [rung[member] for member in members if member in rung]
    return {
        "setting": standing.setting,
        "values": standing.values,
        "state": standing.state,
        "members": members,
        "validation": {name: spread([getattr(result, name) for result in results], name, num_rows) for name in SCORES},
        **({"first_rung": fmean(early)} if early else {}),
    }


def _facts(
    runner: SweepRunner, selected: Standing, summaries: Mapping[str, Any], best: Member, report: Mapping[str, Any]
) -> dict[str, str]:
    """Return the facts of the last panel."""
    num_seeds = count_noun(len(selected.results), "seed")
    facts = {"selected": f"{format_values(selected.values)}, by validation {runner.metric} over {num_seeds}"}
    for name, summary in summaries.items():
        of = summary["accuracy"]
        deviation = f", standard deviation {of['deviation']:.4f}" if of["deviation"] is not None else ""
        low, high = of["interval"] or (0.0, 0.0)
        interval = f", 95 % interval over {of['interval_over']} {low:.4f} to {high:.4f}" if of["interval"] else ""
        facts[name] = f"mean accuracy {of['mean']:.4f}{deviation}{interval}"
    for row in report.get("ensemble", []):
        shown = (f"{split} {row[split]['accuracy']:.4f} (ECE {row[split]['calibration_error']:.4f})" for split in summaries)
        facts[row["name"]] = ", ".join(shown)
    facts["best member"] = f"seed {best.seed}, by validation {runner.metric}"
    facts["time"] = f"{runner.monitors.timer.totals()['total']:.1f} s for {count_noun(len(runner.members), 'member')}"
    expected, peak = report["memory"].values()
    facts["memory"] = f"{gigabytes(peak)} at most on rank 0; {gigabytes(expected)} were expected"
    facts["command"] = report["command"]
    return facts
