"""Figures of a sweep: parallel coordinates, main effects, the scores of single seeds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agnews_dist.errors import shorten
from agnews_dist.report.pages.figures import COLOURS, MARKERS
from agnews_dist.report.pages.sweep_values import Axis, Effect, Row, format_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIFTHS = ("blue", "sky", "faint", "orange", "red")
"""Colours of the best fifth of the settings to the worst."""
FIFTH_NAMES = ("best fifth", "2nd", "3rd", "4th", "worst")
MAX_LINES = 200
"""Settings in a figure. Of more, an even choice by rank."""

BAND = 0.06
"""Height of the band in which the lines through one value lie."""


def choose_drawn(rows: Sequence[Row]) -> list[Row]:
    """Choose the settings to draw, the best first: all with a score, or an even choice of them by rank."""
    scored = [row for row in rows if row.is_scored]
    step = max(1.0, (len(scored) - 1) / (MAX_LINES - 1))
    return [scored[round(place * step)] for place in range(min(len(scored), MAX_LINES))]


def name_axes(axes: Sequence[Axis]) -> list[str]:
    """Name settings without their sections, if that is clear."""
    short = [axis.key.rpartition(".")[2] for axis in axes]
    return [name if short.count(name) == 1 else axis.key for name, axis in zip(short, axes, strict=True)]


def draw_parallel(plot: "Axes", axes: Sequence[Axis], rows: Sequence[Row], metric: str) -> None:
    """Draw a line per setting through its values to its score. The best end on top and are drawn last.

    `rows`: sorted, the best first, all with a score.
    """
    best, worst = rows[0].mean, rows[-1].mean
    used = set[int]()
    for position in range(len(rows) - 1, -1, -1):
        row, fifth = rows[position], position * len(FIFTHS) // len(rows)
        end = (row.mean - worst) / (best - worst) if best != worst else 0.5
        # Settings with the same value lie next to each other, by rank.
        shift = BAND * (0.5 - position / max(1, len(rows) - 1))
        heights = [*(axis.place(row.values[axis.key]) + (0 if axis.is_binned else shift) for axis in axes), end]
        width, colour = 2.4 if position == 0 else 1.0, COLOURS[FIFTHS[fifth]]
        plot.plot(
            range(len(heights)), heights, color=colour, linewidth=width, label=FIFTH_NAMES[fifth] if fifth not in used else ""
        )
        used.add(fifth)
    ends = [(0.0, f"{worst:.3f}"), (1.0, f"{best:.3f}")] if best != worst else [(0.5, f"{best:.3f}")]
    for place, ticks in enumerate([*(axis.ticks(0.09) for axis in axes), ends]):
        plot.axvline(place, color=COLOURS["faint"], linewidth=1)
        for height, text in ticks:
            box = {"facecolor": COLOURS["paper"], "alpha": 0.8, "edgecolor": "none", "pad": 0.6}
            is_last = place == len(axes)
            plot.annotate(
                shorten(text, 12),
                (place, height),
                xytext=(4 if is_last else -3, 0),
                textcoords="offset points",
                ha="left" if is_last else "right",
                va="center",
                fontsize=8,
                bbox=box,
            )
    names = [*name_axes(axes), metric]
    for place, name in enumerate(names):
        # Long names next to each other take two lines.
        shift = -6 - 11 * (place % 2)
        plot.annotate(name, (place, -0.06), xytext=(0, shift), textcoords="offset points", ha="center", va="top", fontsize=8)
    plot.set_xticks([])
    plot.set_yticks([])
    plot.set_xlim(-0.35, len(axes) + 0.3)
    plot.set_ylim(-0.06, 1.06)
    plot.grid(visible=False)
    for spine in plot.spines.values():
        spine.set_visible(False)
    handles, labels = plot.get_legend_handles_labels()
    plot.legend(
        handles[::-1], labels[::-1], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=5, columnspacing=1, handlelength=1
    )


def draw_effects(plot: "Axes", axis: Axis, effects: Sequence[Effect], rows: Sequence[Row], metric: str) -> None:
    """Draw the settings' scores by the value of one setting, and the mean of each value with its standard deviation."""
    plot.plot(
        [axis.place(row.values[axis.key]) for row in rows],
        [row.compared for row in rows],
        linestyle="none",
        marker="o",
        markersize=3,
        color=COLOURS["faint"],
        label="one setting",
    )
    known = [effect for effect in effects if effect.means]
    plot.errorbar(
        [axis.group_place(effect.group) for effect in known],
        [effect.mean for effect in known],
        yerr=[effect.deviation if effect.deviation == effect.deviation else 0.0 for effect in known],
        color=COLOURS["blue"],
        linestyle="none" if axis.kind == "steps" else "-",
        marker=MARKERS[1],
        capsize=3,
        elinewidth=1,
        label="mean and deviation",
    )
    ticks = axis.ticks(0.14)
    limit = max(5, 44 // len(ticks))
    plot.set_xticks([place for place, _ in ticks], [shorten(text, limit) for _, text in ticks])
    plot.set_xlim(-0.08, 1.08)
    plot.set_xlabel(axis.key + (" (logarithmic)" if axis.kind == "logarithmic" else ""))
    plot.set_ylabel(metric)
    plot.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)


def draw_seeds(plot: "Axes", rows: Sequence[Row], metric: str) -> None:
    """Draw the score of every seed, from top to bottom by rank, with the means and their intervals."""
    for place, row in enumerate(rows):
        y, colour = len(rows) - 1 - place, COLOURS["blue" if place == 0 else "faint"]
        if row.interval is not None:
            plot.plot([*row.interval], [y, y], color=colour, linewidth=1.2)
        plot.plot([row.mean], [y], color=colour, marker="|", markersize=13, markeredgewidth=2)
        plot.plot(row.scores, [y] * len(row.scores), linestyle="none", color=COLOURS["orange"], marker="o", markersize=4)
    names = [f"{row.rank}: {shorten(format_short(row.values), 22)}" if row.values else "all seeds" for row in reversed(rows)]
    plot.set_yticks(range(len(rows)), names)
    plot.set_ylim(-0.6, len(rows) - 0.4)
    plot.grid(visible=False, axis="y")
    plot.locator_params(axis="x", nbins=5)
    plot.set_xlabel(metric)


def format_short(values: Mapping[str, object]) -> str:
    """Format the values of a setting for a label."""
    return ", ".join(map(format_setting, values.values()))
