"""The conclusion of a probe, and its page with many layers."""

import csv
import io
import re

import pytest

from agnews_dist.evaluation.intervals import wilson_interval
from agnews_dist.evaluation.layer_features import list_views
from agnews_dist.evaluation.layer_probes import Conclusion, LayerScore, find_end_of_rise
from agnews_dist.report.pages.page import render
from agnews_dist.report.pages.probe_page import build_probe_page, explain, format_csv


def make_scores(num_blocks: int, best: int, lowest: int) -> list[LayerScore]:
    """Return scores of 200 rows whose best layer is `best`; those below `lowest` are worse."""
    scores: list[LayerScore] = []
    for view in list_views(num_blocks):
        is_best = view.layer == best and not view.is_normed
        right, p = 140 + 20 * is_best, 1.0 if is_best else 0.2 if view.layer >= lowest else 0.001
        scores.append(LayerScore(view, 0.1, right, right / 200, wilson_interval(right, 200), 0.7, p, 25, is_best=is_best))
    return scores


def conclude(num_blocks: int, best: int, lowest: int) -> Conclusion:
    return find_end_of_rise(make_scores(num_blocks, best, lowest), "last", num_blocks=num_blocks, num_rows=200)


@pytest.mark.parametrize(
    ("best", "lowest", "expected"),
    [
        (12, 12, "improve up to the last of 12 layers. Keep the default, --model.trainable_blocks 1."),
        (11, 11, "from layer 11 of 12 on (0.8000 is the best accuracy). The block above it is a candidate"),
        (12, 9, "from layer 9 of 12 on (0.7000 against 0.8000 at layer 12, p = 0.2). The 3 blocks above it are candidates"),
        (12, 9, "training: --model.trainable_blocks 3. On 200 texts, a difference below 0.049 between these two is not"),
        (12, 0, "are not measurably better in any layer than in the embeddings. The probe suggests nothing."),
    ],
)
def test_the_conclusion_says_how_many_blocks_and_how_sure(best: int, lowest: int, expected: str) -> None:
    assert expected in explain(conclude(12, best, lowest), 200)


def test_page_of_a_deep_model_has_every_layer_and_legible_ticks() -> None:
    scores = make_scores(48, 30, 25)
    page = build_probe_page("deep", "gpt2-xl on <news>", scores, [conclude(48, 30, 25)] * 2, num_rows=200, facts={"a": "b"})
    [figure] = page.figures
    assert figure.fault == ""
    ticks = re.findall(r"<text[^>]*>(\d+)</text>", figure.svg)
    assert 8 < len(ticks) < 20
    assert "&lt;news&gt;" in render(page, "report.html.j2")
    rows = list(csv.DictReader(io.StringIO(format_csv(scores))))
    assert len(rows) == len(page.sections[1].tables[0].rows) == 2 * (48 + 2)
    assert [row["layer"] for row in rows if row["is_best"] == "True"] == ["30", "30"]
