"""Comparison of runs on the same rows: scores next to each other, paired tests, texts whose answer changed."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from agnews_dist.errors import UserError, count_noun
from agnews_dist.evaluation.intervals import MIN_ROWS_PER_CLASS, Interval
from agnews_dist.evaluation.paired import bootstrap_differences, mcnemar_exact
from agnews_dist.report.formatting import format_ratio
from agnews_dist.report.pages import figures
from agnews_dist.report.pages.details import SplitDetails
from agnews_dist.report.pages.parts import (
    Headline,
    Page,
    Section,
    Table,
    format_interval,
    format_percent,
    format_score,
    make_table,
)
from agnews_dist.report.pages.run_sections import average_steps, list_stages
from agnews_dist.report.pages.score_sections import MAX_CLASS_ROWS, NO_TEXT, find_text, name_class
from agnews_dist.report.pages.stored_run import Fields, StoredRun

MAX_CHANGED = 100
"""Texts with another answer that are shown of each pair of runs."""
SIGNIFICANT = 0.05
Analyses = Mapping[str, Fields]
"""Name of a run -> its analysis.json."""


def check_comparable(runs: Sequence[StoredRun], analyses: Analyses) -> str:
    """Check that all runs were scored on the same rows; return the name of the split to compare.

    Raises:
        UserError: a run has no predictions, or other classes or rows than the first.
    """
    for run in runs:
        if run.main_split is None:
            raise UserError(
                f"{run.directory}: it is {run.state} and has no predictions with labels, so there is nothing to compare. Leave "
                "it out, or finish it."
            )
    names = [name for name in ("test", "validation") if all(run.is_labelled(name) for run in runs)]
    first = runs[0]
    if not names:
        raise UserError(
            f"{first.directory} and the others: they have no labelled split in common. Score them on the same split."
        )
    split = names[0]
    for run in runs[1:]:
        fault = _find_difference(first, run, analyses, split)
        if fault:
            raise UserError(
                f"{run.directory}: {fault} those of {first.directory}, so a paired test is impossible. Compare runs that were "
                "scored on the same rows."
            )
    return split


def _find_difference(first: StoredRun, run: StoredRun, analyses: Analyses, split: str) -> str | None:
    if run.class_names != first.class_names:
        return "its classes differ from"
    one, other = first.predictions[split].labels_N, run.predictions[split].labels_N
    if len(one) != len(other):
        return f"its {len(other):,} {split} rows are not the {len(one):,} of"
    if not np.array_equal(one, other):
        row = int(np.flatnonzero(one != other)[0])
        return f"the label of its {split} row {row} differs from"
    hashes = [analyses[each.name].get("rows", {}).get(split) for each in (first, run)]
    return f"its {split} texts differ from" if None not in hashes and hashes[0] != hashes[1] else None


def build_comparison(
    runs: Sequence[StoredRun], details: Mapping[str, Mapping[str, SplitDetails]], analyses: Analyses, split: str
) -> Page:
    """Build the page that compares runs with the first one, on a split that `check_comparable` has returned.

    `details`: name of a run -> split -> its scores.
    """
    with figures.figure_style():
        sections = (
            _score_section(runs, {name: each[split] for name, each in details.items()}, split),
            _test_section(runs, split),
            _curve_section(runs),
            _class_section(runs, {name: each[split] for name, each in details.items()}),
            _settings_section(runs),
            *_changed_sections(runs, analyses, split),
        )
    known = [run.name for run in runs if analyses[run.name].get("rows", {}).get(split)]
    warnings = ["Not every run has a hash of its texts: only labels and their order were compared."] * (len(known) < len(runs))
    best = max(runs, key=lambda run: details[run.name][split].scores.accuracy)
    return Page(
        title=" against ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs",
        subtitle=f"{count_noun(len(runs), 'run')} on the same {len(runs[0].predictions[split].labels_N):,} {split} texts",
        badge="comparison",
        headlines=(
            Headline("highest accuracy", format_score(details[best.name][split].scores.accuracy), best.name),
            *_headline_difference(runs, split),
        ),
        warnings=tuple(warnings),
        sections=tuple(section for section in sections if section.tables or section.figures or section.lead),
    )


def _headline_difference(runs: Sequence[StoredRun], split: str) -> list[Headline]:
    """Return the difference of two runs in large print; of more runs nothing."""
    if len(runs) != 2:
        return []
    one, other = (run.predictions[split] for run in runs)
    p_value = mcnemar_exact(one.labels_N, one.predictions_N, other.predictions_N).p_value
    difference = float((other.predictions_N == one.labels_N).mean() - (one.predictions_N == one.labels_N).mean())
    meaning = "significant" if p_value < find_limit(len(runs)) else "not significant"
    return [Headline("difference in accuracy", f"{difference:+.4f}", f"p = {p_value:.2g}: {meaning} at 95 %")]


def _score_section(runs: Sequence[StoredRun], details: Mapping[str, SplitDetails], split: str) -> Section:
    rows: list[Sequence[str]] = []
    for run in runs:
        each, stages = details[run.name], dict[str, float]()
        if run.result is not None and "seconds" in run.result:
            stages = {name: seconds for name, seconds, *_ in list_stages(run, {})}
        rows.append(
            (
                run.name,
                format_score(each.scores.accuracy),
                format_interval(each.accuracy_interval),
                format_score(each.scores.macro_f1),
                format_interval(each.macro_f1_interval),
                format_percent(each.calibration.error if each.calibration else None),
                f"{run.result['seconds']['total']:,.1f}" if stages and run.result else "-",
            )
        )
    header = ("run", "accuracy", "95 %", "macro F1", "95 %", "calibration error", "seconds")
    drawn = [(run.name, details[run.name].scores.accuracy, details[run.name].accuracy_interval) for run in runs]
    figure = figures.draw_figure(
        "runs",
        "Accuracy",
        f"Accuracy on {split} with 95 % intervals. Intervals that overlap may still differ: see the paired tests.",
        lambda axes: figures.draw_intervals(axes, drawn, x_label="accuracy"),
        height=max(figures.SIZE[1], 0.45 * len(runs) + 1),
    )
    return Section("scores", "Scores", "", (make_table(header, rows),), (figure,))


def _test_section(runs: Sequence[StoredRun], split: str) -> Section:
    first = runs[0]
    one, limit = first.predictions[split], find_limit(len(runs))
    rows: list[Sequence[str]] = []
    for run in runs[1:]:
        other = run.predictions[split]
        test = mcnemar_exact(one.labels_N, one.predictions_N, other.predictions_N)
        differences = bootstrap_differences(one.labels_N, one.predictions_N, other.predictions_N, len(first.class_names))
        accuracy, macro_f1 = differences["accuracy"], differences["macro_f1"]
        rows.append(
            (
                f"{run.name} against {first.name}",
                f"{accuracy.value:+.4f}",
                _format_difference(accuracy.interval),
                f"{macro_f1.value:+.4f}",
                _format_difference(macro_f1.interval),
                f"{test.num_second_only:,}",
                f"{test.num_first_only:,}",
                f"{test.p_value:.2g}",
                "yes" if test.p_value < limit else "no",
            )
        )
    header = (
        "difference",
        "accuracy",
        "95 %",
        "macro F1",
        "95 %",
        "only it is right",
        "only the first is right",
        "p",
        "significant",
    )
    lead = (
        "Both runs answer the same texts, so only texts on which one is right and the other wrong count. p is that of "
        f"McNemar's exact test; below {limit:.2g} counts as significant. Intervals: paired bootstrap, approximate."
    )
    if len(runs) > 2:
        lead += f" Of many tests, one in twenty is below {SIGNIFICANT} by chance, so {SIGNIFICANT} is divided by their number."
    note = ""
    if any("-" in (row[2], row[4]) for row in rows):
        note = f"No interval: fewer than {MIN_ROWS_PER_CLASS} texts per class, or no difference that varies."
    return Section("tests", "Paired tests", lead, (make_table(header, rows, note=note),))


def find_limit(num_runs: int) -> float:
    """Return the p below which a difference from the first run is significant, for all tests together (Bonferroni).

    >>> find_limit(2), find_limit(6)
    (0.05, 0.01)
    """
    return SIGNIFICANT / (num_runs - 1)


def _format_difference(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def _curve_section(runs: Sequence[StoredRun]) -> Section:
    losses = {run.name: average_steps(run.events_of("StepDone"), "loss") for run in runs if run.events_of("StepDone")}
    scores: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for run in runs:
        evaluations = [event for event in run.events_of("EvalDone") if event["split"] == "validation"]
        if evaluations:
            scores[run.name] = [event["step"] for event in evaluations], [event["accuracy"] for event in evaluations]
    drawn: list[figures.FigureFiles] = []
    for key, title, series, label in (
        ("losses", "Training loss", losses, "loss (nats)"),
        ("accuracies", "Validation accuracy", scores, "accuracy"),
    ):
        if series:
            draw = partial(figures.draw_lines, series=series, x_label="step", y_label=label)
            drawn.append(figures.draw_figure(key, title, f"{title} by step.", draw))
    return Section("curves", "Training", "", (), tuple(drawn))


def _class_section(runs: Sequence[StoredRun], details: Mapping[str, SplitDetails]) -> Section:
    first, note = details[runs[0].name], ""
    scores = {
        number: [details[run.name].classes[number].f1 for run in runs]
        for number, each in enumerate(first.classes)
        if each.num_examples
    }
    shown = list(scores)
    if len(shown) > MAX_CLASS_ROWS:
        shown = sorted(shown, key=lambda number: min(scores[number]) - max(scores[number]))[:MAX_CLASS_ROWS]
        note = f"The {MAX_CLASS_ROWS} of {len(scores):,} classes with the largest differences."
    rows = [
        (name_class(runs[0], number), f"{first.classes[number].num_examples:,}", *map(format_score, scores[number]))
        for number in shown
    ]
    table = make_table(("class", "texts", *(run.name for run in runs)), rows, note=note)
    return Section("classes", "F1 of every class", "", (table,))


def _settings_section(runs: Sequence[StoredRun]) -> Section:
    # A setting that differs between runs differs from its default in one of them.
    keys = dict.fromkeys(key for run in runs for key in run.changed)
    rows = [
        (key, *(_show(run.settings.get(key)) for run in runs))
        for key in keys
        if len({_show(run.settings.get(key)) for run in runs}) > 1
    ]
    lead = "" if rows else "All settings are equal but for the names."
    return Section(
        "settings", "Settings that differ", lead, (make_table(("setting", *(run.name for run in runs)), rows),) if rows else ()
    )


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _changed_sections(runs: Sequence[StoredRun], analyses: Analyses, split: str) -> list[Section]:
    """Build a section per run that lists the texts whose answer differs from that of the first run."""
    first, found = runs[0], list[Section]()
    one = first.predictions[split]
    for number, run in enumerate(runs[1:], 1):
        other = run.predictions[split]
        changed_N = np.flatnonzero(one.predictions_N != other.predictions_N)
        better_N = other.predictions_N[changed_N] == one.labels_N[changed_N]
        worse_N = one.predictions_N[changed_N] == one.labels_N[changed_N]
        order_N = changed_N[np.argsort(np.where(worse_N, 0, np.where(better_N, 1, 2)), kind="stable")]
        rows = [
            (
                str(row),
                name_class(first, int(one.labels_N[row])),
                f"{name_class(first, int(one.predictions_N[row]))} ({format_ratio(float(one.confidence_N[row]))})",
                f"{name_class(run, int(other.predictions_N[row]))} ({format_ratio(float(other.confidence_N[row]))})",
                _find_text(analyses, split, row),
            )
            for row in order_N[:MAX_CHANGED].tolist()
        ]
        lead = (
            f"{len(changed_N):,} of {len(one.labels_N):,} texts: {int(better_N.sum()):,} became right, {int(worse_N.sum()):,} "
            f"became wrong. Those that became wrong are first{', and more are not shown' * (len(changed_N) > MAX_CHANGED)}."
        )
        header = ("row", "label", first.name, run.name, "text")
        table: tuple[Table, ...] = (make_table(header, rows, is_wide_text=True),) if rows else ()
        found.append(Section(f"changed-{number}", f"Other answers of {run.name}", lead, table))
    return found


def _find_text(analyses: Analyses, split: str, row: int) -> str:
    """Return the text of a row from the first analysis that has kept it."""
    texts = (find_text(analysis, split, row) for analysis in analyses.values())
    return next((text for text in texts if text is not None), NO_TEXT)
