"""The end of a sweep: the selected setting is scored on test, once, over its seeds; its best member is exported."""

import csv
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from agnews_dist.config.fields import all_settings, format_value, values_of
from agnews_dist.config.schema import Config
from agnews_dist.config.yaml_file import dump
from agnews_dist.distributed import collectives
from agnews_dist.errors import UserError
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_together
from agnews_dist.evaluation.intervals import student_interval, wilson_interval
from agnews_dist.events import RunDone, Scores, begin_phase
from agnews_dist.experiments.member_training import FeatureGroup, load_weights
from agnews_dist.experiments.members import Member
from agnews_dist.experiments.space import SEED, format_values
from agnews_dist.experiments.standings import MemberResult, Standing
from agnews_dist.experiments.sweep_directory import BEST, RESULTS, SweepDirectory
from agnews_dist.experiments.sweep_runner import SweepRunner
from agnews_dist.model.gpt2 import Classifier, copy_untrained
from agnews_dist.report.result_files import Result, Seconds, versions, write_json, write_predictions
from agnews_dist.run.results import export_trained, peak_memory_bytes, select_scored
from agnews_dist.storage import atomic

SCORES = ("accuracy", "macro_f1", "loss")
NOT_COPIED = ("run.dir", "run.name", "run.overwrite")
"""Settings that a command line for copying leaves out."""


def finish_sweep(runner: SweepRunner) -> RunDone | None:
    """Select a setting, score test, write the results. Collective. Return the last event, on rank 0.

    None elsewhere, and on the rank 0 of a job whose sweep another job finishes.

    Raises:
        UserError: every setting diverged, or a file cannot be written.
    """
    directory, world = runner.directory, runner.engine.world
    lock = directory.claim_selection() if world.is_main else None
    is_mine = collectives.all_gather(lock is not None and not directory.is_finished)[0]
    try:
        if not is_mine:
            return None
        standings = runner.standings()
        selected = standings[0]
        members = [runner.members[result.member] for result in selected.results]
        if selected.state == "diverged":
            raise UserError(
                f"{directory.path}: every setting diverged ({selected.results[0].reason}). Lower optim.lr or max_grad_norm."
            )
        group = runner.open_group(members[0])
        outcome = None
        if world.is_main:
            with collectives.without_others():
                outcome = collectives.catch(lambda: _finish(runner, group, members, standings))
        collectives.wait_for_main("scores the test split")
        return collectives.raise_if_any_failed(outcome)
    finally:
        if lock is not None:
            lock.close()


def _finish(runner: SweepRunner, group: FeatureGroup, members: Sequence[Member], standings: Sequence[Standing]) -> RunDone:
    directory, emit, metric = runner.directory, runner.monitors.emit, runner.metric
    selected = standings[0]
    tensors = [directory.read_tensors(member.index) for member in members]
    scores = [{"validation": SplitScores.restore(_predictions(each), {"scores": None, "seconds": 0.0})} for each in tensors]
    classifiers = [_with_weights(group, member, each) for member, each in zip(members, tensors, strict=True)]
    splits = [name for name in ("validation", "test") if name in group.tables]
    for name in splits:
        emit(begin_phase(f"score {name}"))
        found = evaluate_together(
            classifiers, group.tables[name], group.engine, features=group.features.source(name), emit=emit
        )
        for split_scores, of_member in zip(found, scores, strict=True):
            of_member[name] = split_scores
    best = max(range(len(members)), key=lambda i: (selected.results[i].score(metric), -selected.results[i].loss, -i))
    emit(begin_phase("export the model"))
    _write_best(runner, group, members[best], load_weights(tensors[best]), scores[best])
    summaries = {name: _summarise([of[name].scores for of in scores]) for name in splits if scores[0][name].scores}
    command = make_command(members[best].config)
    report = {
        "format": 1,
        "metric": metric,
        "versions": versions(),
        "settings": [
            {
                "setting": each.setting,
                "values": each.values,
                "state": each.state,
                "members": [result.member for result in each.results],
                "validation": {name: _spread([getattr(result, name) for result in each.results]) for name in SCORES},
            }
            for each in standings
        ],
        "members": [asdict(result) for result in directory.read_results()],
        "selected": {
            "setting": selected.setting,
            "values": selected.values,
            "seeds": [member.seed for member in members],
            "best_member": members[best].index,
            **summaries,
        },
        "command": command,
    }
    write_table(directory.path / "sweep.csv", directory.read_results())
    write_json(directory.path / RESULTS, report)
    return RunDone(facts=_facts(runner, selected, summaries, members[best], command), paths=_paths(directory))


def _predictions(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("validation."): value for key, value in tensors.items() if key.startswith("validation.")}


def _with_weights(group: FeatureGroup, member: Member, tensors: Mapping[str, Any]) -> Classifier:
    classifier = copy_untrained(group.inputs.classifier, member.seed)
    classifier.suffix.load_state_dict(load_weights(tensors))
    return classifier


def _write_best(
    runner: SweepRunner, group: FeatureGroup, member: Member, weights: Mapping[str, Any], scores: Mapping[str, SplitScores]
) -> None:
    """Write the files of a run for one member."""
    path, inputs = runner.directory.path / BEST, group.inputs
    path.mkdir(exist_ok=True)
    atomic.write_text(path / "config.yaml", [dump(member.config)])
    for name, split in scores.items():
        write_predictions(path, name, split)
    result = Result(
        splits=select_scored(scores),
        num_steps=runner.directory.read_results()[member.index].num_steps,
        num_ranks=1,
        global_batch_size=member.config.batch.global_batch_size,
        seconds=Seconds(**runner.monitors.timer.totals()),
        peak_memory_bytes=peak_memory_bytes(runner.engine.device),
        versions=versions(),
        fingerprints=inputs.fingerprints,
    )
    write_json(path / "result.json", result.to_dict())
    export_trained(member.config, inputs, weights, scores, path)


def _summarise(scores: Sequence[Scores | None]) -> dict[str, Any]:
    """Summarise the scores of a split over the seeds: mean, standard deviation, 95 % interval of the mean."""
    known = [each for each in scores if each is not None]
    found: dict[str, Any] = {name: _spread([getattr(each, name) for each in known]) for name in SCORES}
    found["num_examples"] = known[0].num_examples
    if len(known) == 1:
        found["accuracy"]["interval"] = list(wilson_interval(known[0].num_correct, known[0].num_examples))
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation and 95 % interval of the mean; the latter two need two values, the last scipy."""
    if not all(map(math.isfinite, values)):
        return {"mean": None, "deviation": None, "interval": None, "values": list(values)}
    has_interval = len(values) > 1 and find_spec("scipy") is not None
    return {
        "mean": fmean(values),
        "deviation": stdev(values) if len(values) > 1 else None,
        "interval": list(student_interval(values)) if has_interval else None,
        "values": list(values),
    }


def write_table(path: Path, results: Sequence[MemberResult]) -> None:
    """Write one line per member, as csv."""
    out = io.StringIO()
    keys = list(dict.fromkeys(key for result in results for key in result.values))
    columns = ("member", "setting", *keys, SEED, "state", *SCORES, "best_step", "num_steps", "seconds", "reason")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for each in results:
        values = [format_value(each.values.get(key)) for key in keys]
        scores = ["" if math.isnan(getattr(each, name)) else repr(getattr(each, name)) for name in SCORES]
        row = [each.member, each.setting, *values, each.seed, each.state, *scores]
        writer.writerow([*row, each.best_step, each.num_steps, each.seconds, each.reason])
    atomic.write_text(path, [out.getvalue()])


def make_command(config: Config) -> str:
    """Make the command line that trains with these settings: all that differ from the defaults."""
    words = ["agnews-dist", "train"]
    for key, value in values_of(config):
        if value != all_settings()[key].default and key not in NOT_COPIED:
            words += [f"--{key}", format_value(value, escape=True)]
    return shlex.join(words)


def _facts(runner: SweepRunner, selected: Standing, summaries: Mapping[str, Any], best: Member, command: str) -> dict[str, str]:
    facts = {"selected": f"{format_values(selected.values)}, by validation {runner.metric} over {len(selected.results)} seeds"}
    for name, summary in summaries.items():
        of = summary["accuracy"]
        deviation = f", standard deviation {of['deviation']:.4f}" if of["deviation"] is not None else ""
        interval = f", 95 % interval {of['interval'][0]:.4f} to {of['interval'][1]:.4f}" if of["interval"] else ""
        facts[name] = f"mean accuracy {of['mean']:.4f}{deviation}{interval}"
    facts["best member"] = f"seed {best.seed}, by validation {runner.metric}"
    facts["time"] = f"{runner.monitors.timer.totals()['total']:.1f} s for {len(runner.members):,} members"
    facts["command"] = command
    return facts


def _paths(directory: SweepDirectory) -> dict[str, str]:
    path = directory.path
    return {"model": str(path / BEST / "model"), "table": str(path / "sweep.csv"), "results": str(path / RESULTS)}
