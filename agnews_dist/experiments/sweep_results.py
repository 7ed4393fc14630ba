"""Files of a sweep for people and scripts: tables, scores over seeds, the files of one member, a command line."""

import csv
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from agnews_dist.config.fields import all_settings, format_value, values_of
from agnews_dist.config.schema import Config
from agnews_dist.config.yaml_file import dump
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.evaluation.intervals import student_interval, wilson_interval
from agnews_dist.events import SCORES, Emit, Scores, Warned, begin_phase
from agnews_dist.experiments.ensemble import calibration_error
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.member_training import load_member
from agnews_dist.experiments.members import Member
from agnews_dist.experiments.space import SEED
from agnews_dist.experiments.standings import MemberResult
from agnews_dist.report.result_files import Result, Seconds, versions, write_json, write_predictions
from agnews_dist.run.fingerprints import config_fingerprint
from agnews_dist.run.model_setup import count_trained
from agnews_dist.run.reporting import check_packages
from agnews_dist.run.results import export_trained, peak_memory_bytes, select_scored
from agnews_dist.storage import atomic

NOT_COPIED = ("run.dir", "run.name", "run.overwrite")
"""Settings that a command line for copying leaves out."""
SplitsOf = Mapping[str, SplitScores]
"""Split -> its scores."""


def write_run(
    directory: Path,
    group: FeatureGroup,
    member: Member,
    tensors: Mapping[str, Tensor],
    scores: SplitsOf,
    outcome: MemberResult,
    note: str = "",
) -> None:
    """Write the files of a run for one member: settings, predictions, result.json, model. `tensors`: its weights.

    Its seconds of training include the evaluations meanwhile; those of evaluation are of `scores`. `note`: a fact about the
    training that the settings do not say.

    Raises:
        UserError: a file cannot be written, or the model cannot be exported.
    """
    config, (classifier, weights) = member.config, load_member(group, member, tensors)
    fingerprints = {**group.inputs.fingerprints, "config": config_fingerprint(config)}
    parameters = count_trained(config, classifier)
    inputs = replace(group.inputs, classifier=classifier, fingerprints=fingerprints, parameters=parameters)
    directory.mkdir(exist_ok=True)
    atomic.write_text(directory / "config.yaml", [f"# {note}\n" * bool(note), dump(config)])
    for name, split in scores.items():
        write_predictions(directory, name, split)
    seconds = round(sum(split.seconds for split in scores.values()), 3)
    total = round(outcome.seconds + seconds, 3)
    result = Result(
        splits=select_scored(scores),
        num_steps=outcome.num_steps,
        num_ranks=1,
        global_batch_size=config.batch.global_batch_size if config.batch.global_token_budget is None else None,
        global_token_budget=config.batch.global_token_budget,
        seconds=Seconds(total=total, setup=0.0, tokenize=0.0, prefix=0.0, train=outcome.seconds, eval=seconds),
        peak_memory_bytes=peak_memory_bytes(group.engine.device),
        versions=versions(),
        fingerprints=fingerprints,
        note=note or None,
    )
    write_json(directory / "result.json", result.to_dict())
    export_trained(config, inputs, weights, scores, directory, note)


def summarise_seeds(scores: Sequence[Scores]) -> dict[str, Any]:
    """Summarise the scores of a split over the seeds, as `spread` does."""
    num_rows = scores[0].num_examples
    found: dict[str, Any] = {name: spread([getattr(each, name) for each in scores], name, num_rows) for name in SCORES}
    return found | {"num_examples": num_rows}


def spread(values: Sequence[float], name: str, num_rows: int) -> dict[str, Any]:
    """Return mean, standard deviation and 95 % interval: Student's over different values, or Wilson's over the rows.

    One value, or equal ones, do not vary with the seed: of an accuracy then the rows are the sample. Student's needs scipy.
    """
    if not all(map(math.isfinite, values)):
        return {"mean": None, "deviation": None, "interval": None, "values": list(values)}
    interval, over = None, "rows" if len({*values}) == 1 else "seeds"
    if over == "rows" and name == "accuracy":
        interval = list(wilson_interval(round(values[0] * num_rows), num_rows))
    elif over == "seeds" and find_spec("scipy") is not None:
        low, high = student_interval(values)
        interval = [max(0.0, low), high if name == "loss" else min(1.0, high)]
    return {
        "mean": fmean(values),
        "deviation": stdev(values) if len(values) > 1 else None,
        "interval": interval,
        "interval_over": over,
        "values": list(values),
    }


def compare_ensemble(singles: Sequence[SplitsOf], best: int, others: Mapping[str, SplitsOf]) -> list[dict[str, Any]]:
    """Compare the best single member, the mean one, and `others` (an ensemble, a distilled member) on every split."""
    rows: list[dict[str, Any]] = []
    for name, members in {
        "best single": [singles[best]],
        "mean single": singles,
        **{key: [of] for key, of in others.items()},
    }.items():
        row: dict[str, Any] = {"name": name}
        for split in singles[0]:
            of_split = [member[split] for member in members]
            known = [each.scores for each in of_split if each.scores is not None]
            if known:
                row[split] = {key: fmean(getattr(each, key) for each in known) for key in SCORES}
                row[split]["calibration_error"] = fmean(map(calibration_error, of_split))
        rows.append(row)
    return rows


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


def try_to_write_page(directory: Path, report: Mapping[str, Any], *, config: Config, emit: Emit) -> Path | None:
    """Write sweep.html, sweep.md and figures, or warn why there are none: the sweep is complete without them."""
    if not config.report.write:
        return None
    emit(begin_phase("write the report"))
    try:
        check_packages()
        from agnews_dist.report.pages.page import write_page
        from agnews_dist.report.pages.sweep_page import build_sweep_page

        subtitle = f"{config.model.name} on {config.data.source}"
        page = build_sweep_page(atomic.to_json_value(report), name=directory.name, subtitle=subtitle)
        return write_page(page, directory, "sweep")
    except Exception as error:
        emit(Warned(message=f"no sweep.html: {str(error) or type(error).__name__}"))
        return None


def make_command(config: Config) -> str:
    """Make the command line that trains with these settings: all that differ from the defaults."""
    words = ["agnews-dist", "train"]
    for key, value in values_of(config):
        if value != all_settings()[key].default and key not in NOT_COPIED:
            words += [f"--{key}", format_value(value, escape=True)]
    return shlex.join(words)
