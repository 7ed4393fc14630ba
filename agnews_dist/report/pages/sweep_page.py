"""The report of a finished sweep: the selected setting, all settings, main effects, seeds, ensemble, members that diverged."""

from collections.abc import Mapping, Sequence
from typing import Any

from agnews_dist.errors import count_noun
from agnews_dist.evaluation.intervals import Interval
from agnews_dist.events import SCORES
from agnews_dist.report.formatting import format_duration
from agnews_dist.report.pages import figures
from agnews_dist.report.pages.parts import (
    Cell,
    Headline,
    Page,
    Section,
    format_interval,
    format_percent,
    format_score,
    make_table,
)
from agnews_dist.report.pages.sweep_figures import MAX_LINES, choose_drawn, draw_effects, draw_parallel, draw_seeds
from agnews_dist.report.pages.sweep_values import Axis, Row, compute_effects, effect_size, find_axes, format_setting, read_rows

MAX_ROWS = 50
"""Settings in the table; all are in sweep.csv."""
MAX_AXES = 6
"""Settings in the parallel coordinates: the names of more would overlap."""
MAX_STRIPS = 8
"""Settings whose seeds are drawn."""
INTERVALS = (
    "The 95 % interval is that of the mean over the seeds (Student's t). Where all seeds have the same score, that of an "
    "accuracy is Wilson's, over the texts."
)
HALVED = (
    "Settings that halving has ended are shown with the score at which they ended. They have fewer steps than those "
    "that finished."
)

FIRST_RUNG = (
    "Scores are those at the first rung of halving, where all settings have had the same share of training. Later scores of "
    "those that survived would not be comparable with those of the others."
)


def build_sweep_page(report: Mapping[str, Any], *, name: str = "sweep", subtitle: str = "") -> Page:
    """Build the page. `report`: the content of sweep.json. `name`: of the sweep; `subtitle`: model and data."""
    rows, metric = read_rows(report), str(report["metric"])
    axes = find_axes(rows)
    with figures.figure_style():
        sections = (
            _selected_section(report, rows[0]),
            _settings_section(rows, metric),
            _parallel_section(rows, axes, metric),
            _effects_section(rows, axes, metric),
            _seeds_section(rows, metric),
            _ensemble_section(report),
            _diverged_section(report),
        )
    return Page(
        title=name,
        subtitle=subtitle,
        badge="sweep",
        headlines=_headlines(report, rows),
        sections=tuple(section for section in sections if section is not None),
    )


def _interval(summary: Mapping[str, Any]) -> Interval | None:
    return Interval(*summary["interval"]) if summary["interval"] else None


def _score(value: float | None) -> str:
    return "-" if value is None else format_score(value)


def _describe(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{key} {format_setting(value)}" for key, value in values.items()) or "the only one"


def _headlines(report: Mapping[str, Any], rows: Sequence[Row]) -> tuple[Headline, ...]:
    selected, found = report["selected"], list[Headline]()
    seeds = count_noun(len(selected["seeds"]), "seed")
    for split in ("test", "validation"):
        if split in selected:
            score = selected[split]["accuracy"]
            interval = f"95 %: {format_interval(_interval(score))}" if score["interval"] else f"mean over {seeds}"
            found.append(Headline(f"{split} accuracy", _score(score["mean"]), interval))
            if split == "test" and score["deviation"] is not None:
                found.append(Headline("standard deviation", f"{score['deviation']:.4f}", f"on test, over {seeds}"))
    for row in report.get("ensemble", []):
        if row["name"] in ("ensemble", "distilled") and "test" in row:
            found.append(Headline(row["name"], _score(row["test"]["accuracy"]), "test accuracy"))
    states = {state: sum(row.state == state for row in rows) for state in ("finished", "halved", "diverged")}
    detail = ", ".join(f"{count:,} {state}" for state, count in states.items() if count)
    seconds = sum(member["seconds"] for member in report["members"])
    return (
        *found,
        Headline("settings", f"{len(rows):,}", detail),
        Headline("members", f"{len(report['members']):,}", f"{format_duration(seconds)} of training"),
    )


def _selected_section(report: Mapping[str, Any], best: Row) -> Section:
    """Show the selected setting with its scores on every split, and the command of its best member."""
    selected, metric = report["selected"], SCORES[report["metric"]]
    cells: list[Sequence[str]] = []
    for split in ("validation", "test"):
        for key, title in SCORES.items():
            if split in selected:
                of = selected[split][key]
                deviation, values = _score(of["deviation"]), "  ".join(map(_score, of["values"][:10]))
                cells.append((split, title, _score(of["mean"]), deviation, format_interval(_interval(of)), values))
    seeds = selected["seeds"]
    listed = ", ".join(map(str, seeds[:10])) + (", ..." if len(seeds) > 10 else "")
    note = f"Over seeds {listed}. {INTERVALS}"
    best_seed = next(member["seed"] for member in report["members"] if member["member"] == selected["best_member"])
    return Section(
        "selected",
        "Selected setting",
        f"{_describe(best.values)}: the best mean {metric} on validation. Test was scored once, for this setting alone. The "
        f"command trains its best member, seed {best_seed}.",
        (make_table(("split", "score", "mean", "deviation", "95 %", "each seed"), cells, note=note),),
        command=report["command"],
    )


def _settings_section(rows: Sequence[Row], metric: str) -> Section:
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    has_reasons = any(row.reason for row in rows)
    header = ("rank", *keys, f"validation {SCORES[metric]}", "deviation", "95 %", "seeds", "state", "steps")
    header += ("ended",) * has_reasons
    cells: list[Sequence[str | Cell]] = []
    for row in rows[:MAX_ROWS]:
        own = [format_setting(row.values[key]) for key in keys]
        scores = (format_score(row.mean), _score(row.deviation), format_interval(row.interval))
        reason = "see below" if row.state == "diverged" else row.reason
        ending = (str(row.num_members), row.state, f"{row.num_steps:,}", *([reason] if has_reasons else []))
        cells.append((str(row.rank), *own, *scores, *ending))
    note = f"Sorted by the mean over the seeds, the best first. {INTERVALS} sweep.csv has every member."
    if len(rows) > MAX_ROWS:
        note += f" {len(rows) - MAX_ROWS:,} more settings are there too."
    notes = (HALVED,) if any(row.state == "halved" for row in rows) else ()
    return Section("settings", "Settings", "", (make_table(header, cells, note=note),), notes=notes)


def _parallel_section(rows: Sequence[Row], axes: Sequence[Axis], metric: str) -> Section | None:
    """Draw all settings in parallel coordinates. With one setting that varies, the main effects show the same."""
    drawn = choose_drawn(rows)
    if len(axes) < 2 or len(drawn) < 2:
        return None
    by_size = sorted(axes, key=lambda axis: effect_size(compute_effects(axis, rows)), reverse=True)[:MAX_AXES]
    shown = [axis for axis in axes if axis in by_size]
    notes = list[str]()
    if len(shown) < len(axes):
        notes.append(f"The {len(shown)} of {len(axes)} settings with the largest main effects.")
    num_scored = sum(row.is_scored for row in rows)
    if len(drawn) < num_scored:
        notes.append(f"{MAX_LINES} of {num_scored:,} lines, an even choice by rank.")
    if num_scored < len(rows):
        notes.append(f"{count_noun(len(rows) - num_scored, 'setting')} that diverged: not drawn.")
    figure = figures.draw_figure(
        "parallel",
        "Parallel coordinates",
        f"A line for each combination of settings, through its values to its mean validation {SCORES[metric]}. The best "
        "one is thick. Colours: fifths by rank, the best is blue and the worst red.",
        lambda plot: draw_parallel(plot, shown, drawn, SCORES[metric]),
        height=3.6,
    )
    return Section("parallel", "All settings at once", "", (), (figure,), tuple(notes))


def _effects_section(rows: Sequence[Row], axes: Sequence[Axis], metric: str) -> Section | None:
    drawn = choose_drawn(rows)
    if not axes or not drawn:
        return None
    found, cells = list[figures.FigureFiles](), list[Sequence[str]]()
    for number, axis in enumerate(axes):
        effects = compute_effects(axis, rows)

        def draw(plot: Any, axis: Axis = axis) -> None:
            draw_effects(plot, axis, compute_effects(axis, rows), drawn, SCORES[metric])

        title = f"Validation {SCORES[metric]} by {axis.key}."
        found.append(figures.draw_figure(f"effect-{number}", axis.key, title, draw))
        for effect in effects:
            best = (min if metric == "loss" else max)(effect.means, default=float("nan"))
            count = str(len(effect.means) + effect.num_diverged)
            scores = (format_score(effect.mean), format_score(effect.deviation), format_score(best))
            cells.append((axis.key, effect.name, count, *scores, str(effect.num_diverged or "-")))
    header = ("setting", "value", "settings", "mean", "deviation", "best", "diverged")
    lead = (
        "Mean score by the value of each setting, over all values of the others. The deviation is that between settings. A "
        "value with a small deviation is good whatever the others are."
    )
    notes = [FIRST_RUNG] if any(row.first_rung is not None for row in rows) else []
    if len(drawn) < (num_scored := sum(row.is_scored for row in rows)):
        notes.append(f"{MAX_LINES} of {num_scored:,} dots, an even choice by rank. Means are those of all settings.")
    return Section("effects", "Main effects", lead, (make_table(header, cells),), tuple(found), tuple(notes))


def _seeds_section(rows: Sequence[Row], metric: str) -> Section | None:
    best = [row for row in rows if row.is_scored and len(row.scores) > 1][:MAX_STRIPS]
    if not best:
        return None
    what = f"the {len(best)} best settings" if len(best) > 1 else "the best setting"
    figure = figures.draw_figure(
        "seeds",
        "Seeds",
        f"Validation {SCORES[metric]} of every seed of {what}. A bar: the mean; a line: its 95 % interval.",
        lambda plot: draw_seeds(plot, best, SCORES[metric]),
        height=0.9 + 0.3 * len(best),
    )
    lead = "Settings whose intervals overlap widely may be equally good. More seeds narrow them."
    return Section("seeds", "Seeds", lead if len(best) > 1 else "", (), (figure,))


def _ensemble_section(report: Mapping[str, Any]) -> Section | None:
    compared = report.get("ensemble")
    if not compared:
        return None
    splits = [split for split in ("validation", "test") if split in compared[0]]
    header = ("classifier", *(f"{split} {what}" for split in splits for what in ("accuracy", "ECE")), "seconds")
    cells = [
        (
            row["name"],
            *(
                text
                for split in splits
                for text in (_score(row[split]["accuracy"]), format_percent(row[split]["calibration_error"]))
            ),
            f"{row['seconds']:,.1f}",
        )
        for row in compared
    ]
    notes = ["ECE: expected calibration error. Seconds: training and evaluation, for an ensemble of all its members."]
    temperature = next((row["temperature"] for row in compared if row.get("temperature") is not None), None)
    if temperature is not None:
        notes.append(f"The distilled classifier has a temperature of {temperature:.3f}, folded into out_head.")
    lead = "The members of the selected setting alone, the mean of their probabilities, and one classifier distilled from it."
    table = make_table(header, cells)
    return Section("ensemble", "Ensemble", lead if temperature is not None else "", (table,), notes=tuple(notes))


def _diverged_section(report: Mapping[str, Any]) -> Section | None:
    diverged = [member for member in report["members"] if member["state"] == "diverged"]
    if not diverged:
        return None
    cells = [
        (str(each["member"]), str(each["seed"]), _describe(each["values"]), f"{each['num_steps']:,}", each["reason"])
        for each in diverged[:MAX_ROWS]
    ]
    note = f"{len(diverged) - MAX_ROWS:,} more are in sweep.csv." if len(diverged) > MAX_ROWS else ""
    table = make_table(("member", "seed", "settings", "steps", "reason"), cells, note=note, is_wide_text=True)
    return Section("diverged", "Members that diverged", "", (table,))
