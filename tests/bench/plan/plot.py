"""One figure of the comparison: critical-path efficiency per sampler, a panel per kind of lengths."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

MARKERS = ("o", "s", "^")
COLOURS = ("#0072b2", "#d55e00", "#009e73")
"""Distinct for colour-blind readers too (Okabe and Ito)."""


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Write a PNG 1,600 pixels wide, readable at half of it."""
    matplotlib.use("Agg")
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    cases = list(dict.fromkeys((row["global_batch"], row["num_ranks"]) for row in rows))
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(8, 4.6), sharey=True, layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        for i, case in enumerate(cases):
            found = {
                row["sampler"]: row["critical_path"]
                for row in rows
                if row["data"] == kind and (row["global_batch"], row["num_ranks"]) == case
            }
            panel.scatter(
                [found[sampler] for sampler in samplers],
                [-place + 0.22 * (1 - i) for place in range(len(samplers))],
                marker=MARKERS[i],
                color=COLOURS[i],
                s=22,
                label=f"{case[0]:,} examples on {case[1]} ranks",
                clip_on=False,
                zorder=3,
            )
        for place, sampler in enumerate(samplers):
            if sampler.startswith("ours"):
                panel.axhspan(-place - 0.5, -place + 0.5, color="#f0f4f8", zorder=0)
        panel.set_title(kind, fontsize=10)
        panel.set_xlim(0, 1)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        panel.set_ylim(-len(samplers) + 0.4, 0.6)
        panel.grid(axis="x", color="#dddddd", zorder=1)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks([-place for place in range(len(samplers))], samplers)
    figure.supxlabel("real tokens / (ranks x tokens of the slowest rank), summed over the steps", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(cases), frameon=False)
    figure.savefig(file, dpi=200)
    pyplot.close(figure)
