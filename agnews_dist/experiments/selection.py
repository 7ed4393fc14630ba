"""The end of a sweep: the selected setting is scored on test, once, over its seeds; its best member is exported."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from torch import Tensor

from agnews_dist.config.fields import replace_values
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError, count_noun
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split, evaluate_together
from agnews_dist.events import Progress, RunDone, begin_phase
from agnews_dist.experiments import ensemble
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, load_member, train_in_lock_step
from agnews_dist.experiments.members import Member, group_by_features
from agnews_dist.experiments.space import SEED, format_values
from agnews_dist.experiments.standings import Standing
from agnews_dist.experiments.sweep_results import (
    SCORES,
    SplitsOf,
    compare_ensemble,
    make_command,
    spread,
    summarise_seeds,
    try_to_write_page,
    write_run,
    write_table,
)
from agnews_dist.experiments.sweep_runner import POLL_SECONDS, SweepRunner
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.report.result_files import versions, write_json
from agnews_dist.run.results import peak_memory_bytes
from agnews_dist.run.stored_sweeps import RESULTS
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.locks import Lock

T = TypeVar("T")
BEST, DISTILLED = "best", "distilled"
"""Directories of the best member of the selected setting, and of the distilled one."""


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
        # With drawn weights every seed has a frozen part of its own.
        for part in group_by_features(finish.members):
            _run_on_main(world, partial(finish.score, runner.open_group(part[0]), part))
        return _run_on_main(world, partial(finish.write, runner.open_group(finish.best)))
    finally:
        if lock is not None:
            lock.close()


def _wait_for_selection(runner: SweepRunner, wanted: frozenset[str]) -> Lock | None:
    """Return the lock of the selection; None: another process has finished it."""
    runner.monitors.emit(begin_phase("select the best settings"))
    while not runner.directory.is_finished(wanted):
        lock = runner.directory.claim_selection()
        if lock is not None:
            return lock
        time.sleep(POLL_SECONDS)
    return None


def _check_results(runner: SweepRunner) -> None:
    """Check that the results belong to the members, and that one setting can be selected.

    Raises:
        UserError: every setting diverged, or a result is another member's.
    """
    path, selected = runner.directory.path, runner.standings()[0]
    for result in runner.directory.read_results():
        member = runner.members[result.member]
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in member.values.items()}
        if (dict(result.values), result.seed) != (values, member.seed):
            raise UserError(f"{path}: member {result.member} has other settings than its result. Set another --run.name.")
    if selected.state == "diverged":
        reason = selected.results[0].reason
        raise UserError(f"{path}: every setting diverged ({reason}). Lower optim.lr or max_grad_norm.")


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
        self._classifiers: dict[int, tuple[Classifier, dict[str, Tensor]]] = {}
        self._scores: dict[int, dict[str, SplitScores]] = {}

    @property
    def best(self) -> Member:
        """The member with the best validation score."""
        return self.members[self._best]

    def score(self, group: FeatureGroup, members: Sequence[Member]) -> None:
        """Score all splits with members that share their features, which are read or computed once."""
        loaded = [load_member(group, member, self._read_or_train(group, member)) for member in members]
        scores = self._score_together(group, [classifier for classifier, _ in loaded])
        for member, each, of_member in zip(members, loaded, scores, strict=True):
            self._classifiers[member.index], self._scores[member.index] = each, of_member

    def _read_or_train(self, group: FeatureGroup, member: Member) -> dict[str, Tensor]:
        """Read a member's weights. Those that were not kept are made again by the same training."""
        tensors = self._runner.directory.read_tensors(member.index)
        if tensors is not None:
            return tensors
        training = MemberTraining(member, group, build_shared_loader(group, member.config), self._runner.monitors)
        train_in_lock_step([training], after_step=lambda: self._runner.show_steps([training]))
        return training.tensors()

    def write(self, group: FeatureGroup) -> RunDone:
        """Export the best member, whose group it is, write all files, and return the last event."""
        runner, directory, best = self._runner, self._runner.directory, self._best
        singles = [self._scores[member.index] for member in self.members]
        num_steps = self._selected.results[best].num_steps
        self._emit(begin_phase("export the model"))
        self._write_run(BEST, group, self.best, *self._classifiers[self.best.index], singles[best], num_steps=num_steps)
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
        begin = time.perf_counter()
        together = ensemble.combine([self._classifiers[member.index][0] for member in self.members])
        others = dict[str, SplitsOf]()
        others["ensemble"] = {
            name: evaluate_split(together, group.tables[name], group.engine, features=group.features(name))
            for name in _scored_splits(group)
        }
        seconds = {"ensemble": time.perf_counter() - begin}
        temperature = None
        if "distilled" in self._wanted:
            others["distilled"], temperature = self._distil(group, together)
            seconds["distilled"] = time.perf_counter() - begin - seconds["ensemble"]
        rows = compare_ensemble(singles, self._best, others)
        trained = [result.seconds for result in self._selected.results]
        for row in rows:
            # The members' own time, and what comes on top of it.
            own = {"best single": trained[self._best], "mean single": sum(trained) / len(trained)}
            row["seconds"] = round(own.get(row["name"], sum(trained) + seconds.get("ensemble", 0.0)), 3)
            if row["name"] == "distilled":
                row |= {"seconds": round(row["seconds"] + seconds["distilled"], 3), "temperature": temperature}
        return rows

    def _distil(self, group: FeatureGroup, together: Classifier) -> tuple[SplitsOf, float]:
        """Train one more member on the ensemble's probabilities; write it as a run; return its scores and temperature."""
        runner = self._runner
        self._emit(begin_phase("distil the ensemble"))
        seed = max(member.seed for member in self.members) + 1
        config = replace_values(self.members[0].config, {SEED: seed})
        member = Member(len(runner.members), self._selected.setting, self._selected.values, config)
        targets_NC = ensemble.compute_targets(together, group.tables["train"], group.engine, group.features("train"))
        training = MemberTraining(member, group, build_shared_loader(group, config), runner.monitors)
        training.trainer.use_soft_targets(targets_NC)
        train_in_lock_step([training], after_step=lambda: runner.show_steps([training]))
        if training.result("finished").state == "diverged":
            raise UserError(f"--distil: the distilled member diverged ({training.result('finished').reason}). Leave it out.")
        temperature = ensemble.choose_temperature(training.trainer.best.scores)
        tensors = ensemble.fold_temperature(training.tensors(), temperature)
        classifier, weights = load_member(group, member, tensors)
        [scores] = self._score_together(group, [classifier])
        self._write_run(DISTILLED, group, member, classifier, weights, scores, num_steps=training.step)
        return scores, temperature

    def _write_run(
        self,
        name: str,
        group: FeatureGroup,
        member: Member,
        classifier: Classifier,
        weights: Mapping[str, Tensor],
        scores: SplitsOf,
        *,
        num_steps: int,
    ) -> None:
        runner, path = self._runner, self._runner.directory.path / name
        inputs, timer = replace(group.inputs, classifier=classifier), runner.monitors.timer
        write_run(path, member.config, inputs, runner.engine, weights, scores, num_steps=num_steps, timer=timer)


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
