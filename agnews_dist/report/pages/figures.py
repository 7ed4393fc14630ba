"""Figures of the report: SVG for the page, whose colours follow light and dark, and PNG for Markdown.

Text in SVG stays text. Series have the colours of Okabe and Ito, which colour-blind readers distinguish, and different markers.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agnews_dist.report.formatting import escape_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.5, 2.8)
"""Inches. A phone shows such a figure in its natural size."""
COLOURS = {
    "paper": "#ffffff",
    "ink": "#21252b",
    "faint": "#8a9099",
    "line": "#d9dce1",
    "blue": "#0072b2",
    "orange": "#e69f01",
    "green": "#009e73",
    "red": "#d55e01",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
}
"""Name -> colour. In SVG each becomes a variable of the page, with this name."""
SERIES = ("blue", "orange", "green", "red", "purple", "sky")
MARKERS = ("o", "s", "^", "D", "v", "P")
Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class FigureFiles:
    """One figure in both formats."""

    key: str
    """Name of its file, without suffix."""
    title: str
    caption: str
    svg: str = ""
    png: bytes = b""
    fault: str = ""
    """Reason why it could not be drawn."""


@contextmanager
def figure_style() -> Generator[None]:
    """Draw figures in this context in the report's style, without changing that of the process."""
    import matplotlib as mpl
    from matplotlib import rc_context

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "agnews_dist",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", *mpl.rcParams["font.sans-serif"]],
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLOURS["line"],
        "grid.linewidth": 0.7,
        "axes.edgecolor": COLOURS["faint"],
        "legend.frameon": False,
        "legend.fontsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), COLOURS["ink"]),
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "savefig.transparent": True,
        "axes.formatter.useoffset": False,
    }
    log = logging.getLogger("matplotlib")
    level = log.level
    # It reports the building of its font cache, and every class name of which a font lacks a letter (the page has it).
    log.setLevel(logging.CRITICAL)
    try:
        with rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def draw_figure(key: str, title: str, caption: str, draw: Draw, *, height: float = SIZE[1]) -> FigureFiles:
    """Draw a figure in both formats, within `figure_style()`. Without fonts it has a fault, and the page its tables."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        draw(figure.subplots())
        return FigureFiles(key, title, caption, _to_svg(figure, key), _to_png(figure))
    except (OSError, ValueError, RuntimeError) as error:
        return FigureFiles(key, title, caption, fault=" ".join(str(error).split()) or type(error).__name__)


def _to_svg(figure: "Figure", key: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return adapt_svg(buffer.getvalue(), key)


def adapt_svg(text: str, key: str) -> str:
    """Turn a file of matplotlib into an element of a page: it scales, its colours are variables, its ids its own."""
    text = escape_text(text[text.index("<svg") :], "utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # Text without a colour of its own is black.
    text = re.sub(r'<text style="(?![^"]*fill:)', '<text style="fill: var(--ink); ', text)
    return re.sub(r"font: ([^;\"]*?) 'DejaVu Sans'[^;\"]*", r"font: \1 system-ui, sans-serif", text)


def _to_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=False, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def draw_lines(
    axes: "Axes", series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str
) -> None:
    """Draw named lines (x, y); a short one gets markers."""
    for number, (name, (x, y)) in enumerate(series.items()):
        colour, marker = COLOURS[SERIES[number % len(SERIES)]], MARKERS[number % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker if len(x) <= 30 else None, label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(series) > 1:
        axes.legend()


def draw_band(axes: "Axes", x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
    """Fill the space between two lines."""
    axes.fill_between(x, low, high, color=COLOURS["blue"], alpha=0.15, linewidth=0)


def draw_intervals(axes: "Axes", rows: Sequence[tuple[str, float, tuple[float, float]]], *, x_label: str) -> None:
    """Draw (name, value, (low, high)) from top to bottom, the first one in the main colour."""
    for place, (_, value, (low, high)) in enumerate(rows):
        y, colour = len(rows) - 1 - place, COLOURS["blue" if place == 0 else "faint"]
        axes.plot([low, high], [y, y], color=colour, solid_capstyle="butt")
        axes.plot([value], [y], color=colour, marker=MARKERS[0] if place == 0 else MARKERS[1], markersize=6)
        axes.annotate(f"{value:.3f}", (value, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name.replace(" + ", "\n+ ") for name, *_ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel(x_label)


def draw_bars(axes: "Axes", rows: Sequence[tuple[str, float, float | None]], *, x_label: str) -> None:
    """Draw (name, value, limit) as bars from top to bottom; a limit is a mark on its bar."""
    for place, (_, value, limit) in enumerate(rows):
        y = len(rows) - 1 - place
        axes.barh(y, value, color=COLOURS["sky"], height=0.6)
        axes.annotate(f"{value:,.1f}", (value, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        if limit is not None:
            axes.plot([limit, limit], [y - 0.4, y + 0.4], color=COLOURS["red"])
    axes.set_yticks(range(len(rows)), [name.replace(" + ", "\n+ ") for name, *_ in reversed(rows)])
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    axes.set_xlabel(x_label)
