"""Sections about scores: with intervals next to baselines, classes, calibration, lengths, mistakes, label errors."""

from collections.abc import Mapping, Sequence

import numpy as np

from agnews_dist.errors import count_noun, shorten
from agnews_dist.evaluation.calibration import is_at_bound
from agnews_dist.evaluation.intervals import MIN_ROWS_PER_CLASS, Interval, wilson_interval
from agnews_dist.evaluation.metrics import MAX_LISTED_CLASSES
from agnews_dist.report.formatting import format_ratio
from agnews_dist.report.pages import figures
from agnews_dist.report.pages.details import NUM_PAIR_ROWS, Calibration, SplitDetails
from agnews_dist.report.pages.parts import (
    Cell,
    Headline,
    Section,
    Table,
    format_interval,
    format_percent,
    format_score,
    make_table,
)
from agnews_dist.report.pages.stored_run import Fields, StoredRun

MAX_CLASS_ROWS = 50
"""Classes that a table lists; of more, those with the lowest F1."""
MAX_NAME = 40
NO_TEXT = "(text not at hand)"


def name_class(run: StoredRun, label: int) -> str:
    """Return the name of a class, cut to a length that a table can show."""
    return shorten(run.class_names[label], MAX_NAME) if 0 <= label < len(run.class_names) else str(label)


def headlines(run: StoredRun, details: Mapping[str, SplitDetails], analysis: Fields) -> tuple[Headline, ...]:
    """Return the scores of the main split in large print."""
    if run.main_split is None:
        return ()
    each = details[run.main_split]
    found = [
        _headline_score(f"{each.split} accuracy", each.scores.accuracy, each.accuracy_interval),
        _headline_score(f"{each.split} macro F1", each.scores.macro_f1, each.macro_f1_interval),
        *_headline_baseline(run.main_split, analysis),
    ]
    if each.calibration is not None:
        found.append(Headline("calibration error", format_percent(each.calibration.error), "confidence against accuracy"))
    return tuple(found)


def _headline_score(label: str, score: float, interval: Interval | None) -> Headline:
    return Headline(label, format_score(score), "no interval" if interval is None else f"95 %: {format_interval(interval)}")


def _headline_baseline(split: str, analysis: Fields) -> list[Headline]:
    """Return the best baseline in large print, if there is one."""
    found = [
        (each["splits"][split]["accuracy"], each["name"]) for each in analysis.get("baselines", []) if split in each["splits"]
    ]
    return [Headline("best baseline", format_score(max(found)[0]), max(found)[1])] if found else []


def score_section(run: StoredRun, details: Mapping[str, SplitDetails], analysis: Fields) -> Section:
    """Build the table of scores with intervals, and the baselines on the same rows."""
    losses = {name: each["loss"] for name, each in (run.result or {}).get("splits", {}).items()}
    rows = [
        (
            each.split,
            f"{each.scores.num_examples:,}",
            format_score(each.scores.accuracy),
            format_interval(each.accuracy_interval),
            format_score(each.scores.macro_f1),
            format_interval(each.macro_f1_interval),
            "-" if losses.get(each.split) is None else format_score(losses[each.split]),
        )
        for each in details.values()
    ]
    tables = [make_table(("split", "texts", "accuracy", "95 %", "macro F1", "95 %", "loss (nats)"), rows)]
    baselines: Sequence[Fields] = analysis.get("baselines", [])
    drawn: tuple[figures.FigureFiles, ...] = ()
    if run.main_split is not None and baselines:
        main = details[run.main_split]
        tables.append(_baseline_table(main, baselines))
        drawn = (_draw_baselines(main, baselines),)
    return Section(
        "scores",
        "Scores",
        _introduce_scores(run),
        tuple(tables),
        drawn,
        (*_explain_gaps(details), *(f"{each['name']}: {each['skipped']}" for each in baselines if each["skipped"])),
    )


def _introduce_scores(run: StoredRun) -> str:
    lead = (
        "Intervals are approximate. They hold the true value with about 95 % confidence, given this many texts (accuracy: "
        "Wilson; macro F1: bootstrap over the texts). Baselines are cheap methods on the same rows: what remains above them is "
        "what the training is for."
    )
    if run.main_split == "validation":
        return (
            f"{lead} The run has no labelled test split. The weights were chosen on validation, so its scores are optimistic."
        )
    if run.is_labelled("validation"):
        return f"{lead} The weights were chosen on validation, so its scores are optimistic."
    return lead


def _explain_gaps(details: Mapping[str, SplitDetails]) -> list[str]:
    """Explain why splits have no interval of macro F1."""
    return [
        f"Macro F1 of {each.split} has no interval: it has fewer than {MIN_ROWS_PER_CLASS} texts per class, or all texts have "
        "the same outcome."
        for each in details.values()
        if each.macro_f1_interval is None
    ]


def _baseline_table(main: SplitDetails, baselines: Sequence[Fields]) -> Table:
    rows = [
        (
            "this run",
            format_score(main.scores.accuracy),
            format_interval(main.accuracy_interval),
            format_score(main.scores.macro_f1),
            "",
            "",
        )
    ]
    for each in baselines:
        if (scores := each["splits"].get(main.split)) is not None:
            interval = wilson_interval(scores["num_correct"], scores["num_examples"])
            numbers = (format_score(scores["accuracy"]), format_interval(interval), format_score(scores["macro_f1"]))
            rows.append((each["name"], *numbers, f"{each['num_train_rows']:,}", f"{each['seconds']:,.1f}"))
    header = ("method", "accuracy", "95 %", "macro F1", "training rows", "seconds")
    return make_table(header, rows, title=f"Baselines on {main.split}")


def _draw_baselines(main: SplitDetails, baselines: Sequence[Fields]) -> figures.FigureFiles:
    rows = [("this run", main.scores.accuracy, main.accuracy_interval)]
    for each in baselines:
        if (scores := each["splits"].get(main.split)) is not None:
            rows.append((each["name"], scores["accuracy"], wilson_interval(scores["num_correct"], scores["num_examples"])))
    caption = f"Accuracy on {main.split} with 95 % intervals."
    return figures.draw_figure(
        "baselines", "This run and baselines", caption, lambda axes: figures.draw_intervals(axes, rows, x_label="accuracy")
    )


def class_section(run: StoredRun, main: SplitDetails) -> Section:
    """Build the confusion matrix and the scores of every class."""
    classes, note = list(main.classes), ""
    if len(classes) > MAX_CLASS_ROWS:
        classes = sorted(classes, key=lambda each: (each.f1 != each.f1, each.f1))[:MAX_CLASS_ROWS]
        note = f"The {MAX_CLASS_ROWS} of {len(main.classes):,} classes with the lowest F1."
    rows = [
        (
            shorten(each.name, MAX_NAME),
            f"{each.num_examples:,}",
            format_score(each.precision),
            format_score(each.recall),
            format_score(each.f1),
        )
        for each in classes
    ]
    tables = [make_table(("class", "texts", "precision", "recall", "F1"), rows, note=note)]
    if (confusion := main.scores.confusion) is not None and len(confusion) <= MAX_LISTED_CLASSES:
        names = [shorten(name, 20) for name in run.class_names]
        totals = [max(1, sum(row)) for row in confusion]
        cells = [
            (name, *(Cell(f"{count:,}", count / total) for count in row))
            for name, row, total in zip(names, confusion, totals, strict=True)
        ]
        note = "Rows: true class. Columns: predicted class. The shade is the share of the row."
        tables.append(make_table(("", *names), cells, title="Confusion matrix", note=note))
    return Section("classes", "Classes", f"Scores of every class on {main.split}.", tuple(tables))


def calibration_section(main: SplitDetails) -> Section | None:
    """Build the calibration curve, its error, and the temperature; None: no probability is finite."""
    each = main.calibration
    if each is None:
        return None
    rows = [
        (f"{b.low:.2f} to {b.high:.2f}", f"{b.num_examples:,}", format_score(b.confidence), format_score(b.accuracy))
        for b in each.bins
    ]

    def draw(axes: "figures.Axes") -> None:
        axes.plot([0, 1], [0, 1], color=figures.COLOURS["faint"], linestyle="--", label="perfect")
        x, y = [b.confidence for b in each.bins], [b.accuracy for b in each.bins]
        intervals = [wilson_interval(round(b.accuracy * b.num_examples), b.num_examples) for b in each.bins]
        axes.vlines(x, [i.low for i in intervals], [i.high for i in intervals], color=figures.COLOURS["blue"], alpha=0.4)
        axes.plot(x, y, color=figures.COLOURS["blue"], marker="o", label="this run")
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.legend()

    figure = figures.draw_figure(
        "calibration", "Calibration", f"Accuracy by confidence on {main.split}, with 95 % intervals.", draw
    )
    lead = f"Expected calibration error on {main.split}: {format_percent(each.error)}. {_describe_temperature(each)}"
    if each.num_left_out:
        lead += f" {count_noun(each.num_left_out, 'text')} without a finite probability left out."
    table = make_table(("confidence", "texts", "mean confidence", "accuracy"), rows)
    return Section("calibration", "Calibration", lead, (table,), (figure,))


def _describe_temperature(each: Calibration) -> str:
    """Describe the temperature and what it changes, or why there is none."""
    if each.temperature is None:
        return f"No temperature was fitted: {each.no_temperature}."
    fitted = f"The temperature that fits validation best is {each.temperature:.3f}"
    if is_at_bound(each.temperature):
        return f"{fitted}, which is at its bound: the best one lies beyond, and this one is not used."
    if each.error_with_temperature is None:
        return f"{fitted}. What it changes takes other texts than those of validation."
    return (
        f"{fitted}. Dividing the logits by it changes the error to {format_percent(each.error_with_temperature)}; no "
        "prediction changes."
    )


def length_section(main: SplitDetails, analysis: Fields) -> Section | None:
    """Build the accuracy by length of the text; None: the lengths are not known."""
    bins: Sequence[Fields] = analysis.get("by_length", {}).get(main.split, [])
    if not bins:
        return None
    names = [f"{each['low']} to {each['high']}" if each["low"] < each["high"] else str(each["low"]) for each in bins]
    accuracies = [each["num_correct"] / each["num_examples"] for each in bins]
    intervals = [wilson_interval(each["num_correct"], each["num_examples"]) for each in bins]
    rows = [
        (name, f"{each['num_examples']:,}", format_score(accuracy), format_interval(interval))
        for name, each, accuracy, interval in zip(names, bins, accuracies, intervals, strict=True)
    ]

    def draw(axes: "figures.Axes") -> None:
        x = np.arange(len(bins))
        axes.vlines(x, [i.low for i in intervals], [i.high for i in intervals], color=figures.COLOURS["blue"], alpha=0.5)
        axes.plot(x, accuracies, color=figures.COLOURS["blue"], marker="o", linestyle="none")
        axes.set_xticks(x, [name.replace(" to ", "-") for name in names], rotation=30, ha="right")
        axes.set_xlabel("tokens of the text")
        axes.set_ylabel("accuracy")

    figure = figures.draw_figure(
        "length", "Accuracy by length", f"Accuracy on {main.split} by length, with 95 % intervals.", draw
    )
    table = make_table(("tokens", "texts", "accuracy", "95 %"), rows)
    return Section("length", "Accuracy by length", "Bins hold about equal numbers of texts.", (table,), (figure,))


def mistake_section(run: StoredRun, main: SplitDetails, analysis: Fields) -> Section:
    """Build the most confused pairs of classes, and the most confident mistakes."""
    stored = run.predictions[main.split]
    pairs: list[Sequence[str]] = []
    for pair in main.pairs:
        names = (name_class(run, pair.label), name_class(run, pair.prediction))
        first = (*names, f"{pair.num_examples:,}", format_percent(pair.share))
        for number, row in enumerate(pair.rows):
            probabilities = (stored.confidence_N[row], stored.probability_of(row, pair.label))
            numbers = (format_ratio(value) for value in probabilities)
            pairs.append((*(("", "", "", "") if number else first), *numbers, show_text(analysis, main.split, row)))
    mistakes = [
        (
            str(row),
            name_class(run, int(stored.labels_N[row])),
            name_class(run, int(stored.predictions_N[row])),
            format_ratio(stored.confidence_N[row]),
            format_ratio(stored.probability_of(row, int(stored.labels_N[row]))),
            show_text(analysis, main.split, row),
        )
        for row in main.mistakes
    ]
    tables = [
        make_table(
            ("true", "predicted", "texts", "share of true", "confidence", "of the label", "most confident"),
            pairs,
            title="Most confused pairs",
            note=f"Of each pair, the {NUM_PAIR_ROWS} texts with the most confident predictions.",
            is_wide_text=True,
        ),
        make_table(
            ("row", "label", "predicted", "confidence", "of the label", "text"),
            mistakes,
            title="Most confident mistakes",
            is_wide_text=True,
        ),
    ]
    num_wrong = main.scores.num_examples - main.scores.num_correct
    lead = f"{count_noun(num_wrong, 'text')} of {main.scores.num_examples:,} got another class than their label."
    return Section("mistakes", "Mistakes", lead, tuple(tables) if num_wrong else ())


def label_section(run: StoredRun, analysis: Fields) -> Section | None:
    """Build the probable label errors of every split; None: none were searched."""
    found: Mapping[str, Sequence[Fields]] = analysis.get("label_issues", {})
    tables: list[Table] = []
    for split, issues in found.items():
        rows = [
            (
                str(issue["row"]),
                name_class(run, issue["label"]),
                name_class(run, issue["suggested"]),
                f"{issue['label_probability']:.3f}",
                show_text(analysis, split, issue["row"]),
                "; ".join(
                    f"row {near['row']} ({near['similarity']:.0%} alike): {name_class(run, near['label'])}"
                    for near in issue["near"]
                ),
            )
            for issue in issues
        ]
        if rows:
            header = ("row", "label", "suggested", "of the label", "text", "near-duplicates")
            tables.append(make_table(header, rows, title=f"In {split}", is_wide_text=True))
    if not found:
        return None
    lead = (
        "Rows whose label looks wrong to a model that has not seen it, the most probable errors first. Of scored splits the "
        "model of this run judges, of train a simple one that was fitted on the other folds. Read before you change any. "
        "label_errors.csv lists more of them."
    )
    return Section("labels", "Probable label errors", lead, tuple(tables))


def find_text(analysis: Fields, split: str, row: int) -> str | None:
    """Return the text of a row; None: it was not kept."""
    kept = analysis.get("texts", {}).get(split, {}).get(str(row))
    return kept["text"] if kept else None


def show_text(analysis: Fields, split: str, row: int) -> str:
    """Return the text of a row, or that it was not kept."""
    text = find_text(analysis, split, row)
    return NO_TEXT if text is None else text
