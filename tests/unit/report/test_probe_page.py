"""The conclusion of a probe, and its page with many layers."""

import csv
import io
import re

import pytest

from agnews_dist.evaluation.intervals import wilson_interval
from agnews_dist.evaluation.layer_features import list_views
from agnews_dist.evaluation.layer_probes import Conclusion, LayerScore, choose_cut
from agnews_dist.report.pages.page import render
from agnews_dist.report.pages.probe_page import build_probe_page, explain, format_csv


def make_scores(num_blocks: int, best: int, highest: int) -> list[LayerScore]:
    """Return scores of 200 rows whose best layer is `best`; those above it up to `highest` are within one standard error."""
    scores: list[LayerScore] = []
    for view in list_views(num_blocks):
        is_best = view.layer == best and not view.is_normed
        right = 160 if is_best else 158 if best < view.layer + view.is_normed <= highest else 120
        different = 0 if is_best else 25 if right == 158 else 60
        scores.append(
            LayerScore(view, 0.1, right, right / 200, wilson_interval(right, 200), 0.7, 0.5, different, is_best=is_best)
        )
    return scores


def conclude(num_blocks: int, best: int, highest: int) -> Conclusion:
    return choose_cut(make_scores(num_blocks, best, highest), "last", num_blocks=num_blocks, num_rows=200)


@pytest.mark.parametrize(
    ("best", "highest", "expected"),
    [
        (12, 12, "are best after the last of 12 layers. Keep the default, --model.trainable_blocks 1."),
        (
            9,
            13,
            "are within one standard error, 0.0250 on 200 texts, of the best (0.7900 against 0.8000 at layer 9) after the last",
        ),
        (
            11,
            11,
            "have their best accuracy, 0.8000, at layer 11 of 12, and at no higher one. The block above it is a candidate",
        ),
        (7, 9, "0.0250 on 200 texts, of the best (0.7900 against 0.8000 at layer 7) at layer 9 of 12, and at no higher one."),
        (7, 9, "The 3 blocks above it are candidates for training: --model.trainable_blocks 3."),
        (0, 0, "are best in the embeddings, and worse in all layers. The probe suggests nothing."),
    ],
)
def test_the_conclusion_says_how_many_blocks_and_how_sure(best: int, highest: int, expected: str) -> None:
    assert expected in explain(conclude(12, best, highest), 200)


def test_page_of_a_deep_model_has_every_layer_and_legible_ticks() -> None:
    scores = make_scores(48, 30, 35)
    page = build_probe_page("deep", "gpt2-xl on <news>", scores, [conclude(48, 30, 35)] * 2, num_rows=200, facts={"a": "b"})
    [figure] = page.figures
    assert figure.fault == ""
    ticks = re.findall(r"<text[^>]*>(\d+)</text>", figure.svg)
    assert 8 < len(ticks) < 20
    assert "&lt;news&gt;" in render(page, "report.html.j2")
    rows = list(csv.DictReader(io.StringIO(format_csv(scores))))
    assert len(rows) == len(page.sections[1].tables[0].rows) == 2 * (48 + 2)
    assert [row["layer"] for row in rows if row["is_best"] == "True"] == ["30", "30"]
