"""The report of a probe: one figure, one table, and the conclusion with its rule."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agnews_dist.evaluation.layer_features import POOLINGS
from agnews_dist.evaluation.layer_probes import SIGNIFICANT, Conclusion, LayerScore
from agnews_dist.report.pages import figures
from agnews_dist.report.pages.parts import Headline, Page, Section, format_interval, format_score, make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ("layer", "pooling", "accuracy", "95 %", "macro F1", "p", "against the best", "C")
POOLING_NAMES = {"last": "last token", "mean": "mean of all tokens"}
RULE = (
    "Each layer is compared with the best one of its pooling by McNemar's exact test on the same texts. It is worse if p is "
    f"below {SIGNIFICANT}. The one-standard-error rule chooses the fewest blocks: the cut is the highest layer whose accuracy "
    "is within one standard error of the best, that of the paired difference."
)
CAVEAT = (
    "This is a guide. A probe reads the frozen model, and blocks that are trained change their features. Compare short "
    "trainings before a long one. More validation texts find smaller differences."
)


def list_cells(scores: Sequence[LayerScore]) -> list[tuple[str, ...]]:
    """List the cells of the table under `HEADER`, pooling by pooling."""
    return [
        (
            score.view.layer_name,
            score.view.pooling,
            format_score(score.accuracy),
            format_interval(score.interval),
            format_score(score.macro_f1),
            "" if score.is_best else f"{score.p_value:.2g}",
            "best" if score.is_best else "not distinguishable" if score.is_close else "worse",
            f"{score.strength:g}",
        )
        for score in sorted(scores, key=lambda score: POOLINGS.index(score.view.pooling))
    ]


def explain(conclusion: Conclusion, num_rows: int) -> str:
    """Explain which layer is the highest with features as good as the best, and how many blocks that suggests to train."""
    cut, best, above = conclusion.cut, conclusion.best, conclusion.num_above
    features, num_blocks = f"Features of the {POOLING_NAMES[cut.view.pooling]}", cut.view.layer + above
    error = f"one standard error, {conclusion.standard_error:.4f} on {num_rows:,} texts"
    found = f"{format_score(cut.accuracy)} against {format_score(best.accuracy)} at layer {best.view.layer_name}"
    if not above:
        what = "are best" if cut.is_best else f"are within {error}, of the best ({found})"
        return f"{features} {what} after the last of {num_blocks} layers. Keep the default, --model.trainable_blocks 1."
    if not cut.view.layer:
        return f"{features} are best in the embeddings, and worse in all layers. The probe suggests nothing."
    what = f"are within {error}, of the best ({found})"
    if cut.is_best:
        what = f"have their best accuracy, {format_score(cut.accuracy)},"
    blocks = "block above it is a candidate" if above == 1 else f"{above} blocks above it are candidates"
    return (
        f"{features} {what} at layer {cut.view.layer} of {num_blocks}, and at no higher one. The {blocks} for training: "
        f"--model.trainable_blocks {above}."
    )


def build_probe_page(
    name: str,
    subtitle: str,
    scores: Sequence[LayerScore],
    conclusions: Sequence[Conclusion],
    *,
    num_rows: int,
    facts: Mapping[str, str],
) -> Page:
    """Build the page. `conclusions`: of each pooling, that of the trained model first. `facts`: label -> value."""
    main = conclusions[0]
    with figures.figure_style():
        figure = figures.draw_figure(
            "layers",
            "Accuracy by layer",
            f"Accuracy of a probe on {num_rows:,} validation texts, with 95 % intervals. The line marks the cut.",
            lambda axes: _draw_layers(axes, scores, main),
        )
    note = "C: inverse strength of the penalty, chosen on training texts held out. norm: after the final norm."
    sections = (
        Section("conclusion", "Conclusion", explain(main, num_rows), notes=(RULE, CAVEAT)),
        Section("layers", "Layers", "", (make_table(HEADER, list_cells(scores), note=note),), (figure,)),
        Section("setup", "How it was measured", "", (make_table(("what", "value"), facts.items()),)),
    )
    return Page(
        title=name,
        subtitle=subtitle,
        badge="probe",
        headlines=(
            *(
                Headline(
                    f"best, {POOLING_NAMES[each.best.view.pooling]}",
                    format_score(each.best.accuracy),
                    f"layer {each.best.view.layer_name}; {format_interval(each.best.interval)}",
                )
                for each in conclusions
            ),
            Headline("blocks above the cut", str(main.num_above), f"the cut is at layer {main.cut.view.layer_name}"),
        ),
        sections=sections,
    )


def _draw_layers(axes: "Axes", scores: Sequence[LayerScore], main: Conclusion) -> None:
    """Draw a line with intervals for each pooling, side by side."""
    names = list(dict.fromkeys(score.view.layer_name for score in scores))
    for number, pooling in enumerate(POOLINGS):
        own = [score for score in scores if score.view.pooling == pooling]
        values = [score.accuracy for score in own]
        low, high = zip(*((each.accuracy - each.interval.low, each.interval.high - each.accuracy) for each in own), strict=True)
        axes.errorbar(
            [place + 0.12 * (number - 0.5) for place in range(len(own))],
            values,
            yerr=[low, high],
            color=figures.COLOURS[figures.SERIES[number]],
            marker=figures.MARKERS[number],
            elinewidth=1,
            label=POOLING_NAMES[pooling],
        )
    axes.axvline(names.index(main.cut.view.layer_name), color=figures.COLOURS["faint"], linestyle=":")
    step = -(-len(names) // 14)
    shown = [place for place in range(len(names)) if place % step == 0 and place < len(names) - step] + [len(names) - 1]
    axes.set_xticks(shown, [names[place].replace(" + ", "\n+ ") for place in shown])
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("accuracy")
    axes.legend()


def format_csv(scores: Sequence[LayerScore]) -> str:
    """Format the scores as csv, with all digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("layer", "pooling", "accuracy", "low", "high", "macro_f1", "p_value", "is_best", "is_close", "strength"))
    for each in scores:
        fields = (each.accuracy, *each.interval, each.macro_f1, each.p_value)
        writer.writerow((each.view.layer_name, each.view.pooling, *fields, each.is_best, each.is_close, each.strength))
    return file.getvalue()
