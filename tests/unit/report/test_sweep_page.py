"""The page of a sweep: its tables and figures for sweeps of every shape, made from the content of sweep.json."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest

from agnews_dist.report.pages.page import render
from agnews_dist.report.pages.parts import Page
from agnews_dist.report.pages.sweep_page import MAX_ROWS, build_sweep_page
from agnews_dist.report.pages.sweep_values import compute_effects, find_axes, read_rows

RATES = [1e-5, 1e-4, 1e-3]
NAN = float("nan")


def summarise(values: Sequence[float]) -> dict[str, Any]:
    if not all(map(math.isfinite, values)):
        return {"mean": None, "deviation": None, "interval": None, "values": [None] * len(values)}
    mean, several = sum(values) / len(values), len(values) > 1
    return {
        "mean": mean,
        "deviation": 0.01 if several else None,
        "interval": [mean - 0.02, mean + 0.02] if several else None,
        "values": list(values),
    }


def make_report(
    settings: Sequence[Mapping[str, Any]],
    score: Callable[[Mapping[str, Any]], float],
    num_seeds: int = 2,
    num_halved: int = 0,
    metric: str = "accuracy",
) -> dict[str, Any]:
    """Return the content of a sweep.json. A score that is NaN is that of members that diverged."""
    members, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    ranked = sorted(enumerate(settings), key=lambda each: -score(each[1]) if score(each[1]) == score(each[1]) else 9)
    for rank, (setting, values) in enumerate(ranked):
        state, reason = "finished", ""
        if score(values) != score(values):
            state, reason = "diverged", "loss NaN at step 3"
        elif rank >= len(settings) - num_halved:
            state, reason = "halved", "left at rung 1"
        scores = [score(values) + 0.001 * seed for seed in range(num_seeds)]
        own = {"accuracy": scores, "macro_f1": scores, "loss": [1 - each for each in scores]}
        numbers = [setting * num_seeds + seed for seed in range(num_seeds)]
        summaries = {name: summarise(of) for name, of in own.items()}
        rows.append({"setting": setting, "values": values, "state": state, "members": numbers, "validation": summaries})
        members += [
            {"member": number, "setting": setting, "values": values, "seed": seed, "state": state, "reason": reason}
            | {"num_steps": 90 if state == "finished" else 30, "seconds": 1.5}
            for seed, number in enumerate(numbers)
        ]
    best = rows[0]
    return {
        "metric": metric,
        "settings": rows,
        "members": sorted(members, key=lambda member: member["member"]),
        "selected": {
            "setting": best["setting"],
            "values": best["values"],
            "seeds": list(range(num_seeds)),
            "best_member": best["members"][0],
            **dict.fromkeys(("validation", "test"), best["validation"]),
        },
        "command": "agnews-dist train --data.source 'a <b>'",
    }


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    keys = [key.replace("_", ".", 1) for key in values]
    return [dict(zip(keys, each, strict=True)) for each in product(*values.values())]


def by_rate(values: Mapping[str, Any]) -> float:
    """Return a score that is best at a rate of 1e-4."""
    return 0.9 - 0.05 * abs(math.log10(values["optim.lr"]) + 4)


def build(report: Mapping[str, Any]) -> Page:
    """Build and render a page all of whose figures could be drawn."""
    page = build_sweep_page(report, name="<lr>", subtitle="gpt2 on news")
    assert [figure.fault for figure in page.figures if figure.fault] == []
    assert "<lr>" not in render(page, "report.html.j2")
    assert "\\<lr>" in render(page, "report.md.j2")
    return page


def texts_of(page: Page, section: str) -> list[list[str]]:
    [table] = next(each for each in page.sections if each.key == section).tables
    return [[cell.text for cell in row] for row in table.rows]


def test_grid_has_all_sections_and_sorted_settings() -> None:
    page = build(make_report(grid(optim_lr=RATES, model_pooling=["last", "mean"]), by_rate))
    assert [section.key for section in page.sections] == ["selected", "settings", "parallel", "effects", "seeds"]
    rows = texts_of(page, "settings")
    assert [row[1] for row in rows] == ["0.0001", "0.0001", "1e-05", "1e-05", "0.001", "0.001"]
    assert rows[0][:4] == ["1", "0.0001", "last", "0.9005"]
    assert page.sections[0].command == "agnews-dist train --data.source 'a <b>'"
    [svg] = [figure.svg for figure in page.figures if figure.key == "parallel"]
    assert {"lr", "pooling", "accuracy", "1e-05", "last"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    # Colours follow light and dark.
    assert not re.findall(r"(?:fill|stroke): #(?!000000|ffffff)\w+", "".join(figure.svg for figure in page.figures))


def test_sweep_of_seeds_has_neither_effects_nor_coordinates() -> None:
    page = build(make_report([{}], lambda _: 0.8, num_seeds=5))
    assert [section.key for section in page.sections] == ["selected", "settings", "seeds"]
    assert page.headlines[0].value == "0.8020"


def test_one_seed_and_one_setting_that_varies_need_no_strip() -> None:
    page = build(make_report(grid(optim_lr=RATES), by_rate, num_seeds=1, metric="loss"))
    assert [section.key for section in page.sections] == ["selected", "settings", "effects"]
    assert [row[1:6] for row in texts_of(page, "effects")][1] == ["0.0001", "1", "0.1000", "-", "0.1000"]


def test_halved_and_diverged_settings_say_so() -> None:
    rates, pooling = [1e-4, 1e-3, 1e30], ["last", "mean"]
    settings = grid(optim_lr=rates, model_pooling=pooling)
    page = build(make_report(settings, lambda each: NAN if each["optim.lr"] > 1 else by_rate(each), num_halved=5))
    assert [row[-3:] for row in texts_of(page, "settings")] == [
        ["finished", "90", ""],
        *[["halved", "30", "left at rung 1"]] * 3,
        *[["diverged", "30", "see below"]] * 2,
    ]
    assert [row[-1] for row in texts_of(page, "effects")] == ["-", "-", "2", "1", "1"]
    diverged = texts_of(page, "diverged")
    assert len(diverged) == 4
    assert diverged[0][2:] == ["optim.lr 1e+30  model.pooling last", "30", "loss NaN at step 3"]
    notes = [note for section in page.sections for note in section.notes]
    assert "2 settings that diverged: not drawn." in notes
    assert any("fewer steps than those" in note for note in notes)


def test_a_thousand_settings_stay_readable() -> None:
    drawn = random.Random(0)
    settings = [
        {
            "optim.lr": float(f"{10 ** drawn.uniform(-5, -2):.3g}"),
            "optim.weight_decay": float(f"{drawn.uniform(0, 0.2):.3g}"),
            **{f"a.choice{i}": drawn.choice(["none", "some", ["a", "b"], None]) for i in range(6)},
        }
        for _ in range(1000)
    ]
    report = make_report(settings, by_rate, num_seeds=1)
    axes = {axis.key: axis for axis in find_axes(read_rows(report))}
    assert [axes[f"optim.{key}"].kind for key in ("lr", "weight_decay")] == ["logarithmic", "linear"]
    effects = compute_effects(axes["optim.lr"], read_rows(report))
    assert sum(len(effect.means) for effect in effects) == 1000
    means = [effect.mean for effect in effects]
    # Best near 1e-4, worse on both sides.
    assert means[:3] == sorted(means[:3])
    assert means[2:] == sorted(means[2:], reverse=True)
    page = build(report)
    assert len(texts_of(page, "settings")) == MAX_ROWS
    notes = next(section.notes for section in page.sections if section.key == "parallel")
    assert notes == ("The 6 of 8 settings with the largest main effects.", "200 of 1,000 lines, an even choice by rank.")
    assert len(render(page, "report.html.j2")) < 1_000_000


@pytest.mark.parametrize("wanted", [("ensemble",), ("ensemble", "distilled")])
def test_ensemble_is_compared_with_its_members(wanted: tuple[str, ...]) -> None:
    report = make_report([{}], lambda _: 0.8)
    scores = {"accuracy": 0.81, "macro_f1": 0.8, "loss": 0.5, "calibration_error": 0.031}
    report["ensemble"] = [
        {"name": name, "validation": scores, "test": scores, "seconds": 12.34}
        | ({"temperature": 1.25} if name == "distilled" else {})
        for name in ("best single", "mean single", *wanted)
    ]
    page = build(report)
    assert texts_of(page, "ensemble")[2] == ["ensemble", "0.8100", "3.1 %", "0.8100", "3.1 %", "12.3"]
    notes = next(section.notes for section in page.sections if section.key == "ensemble")
    assert any("temperature of 1.250" in note for note in notes) == ("distilled" in wanted)


def test_main_effects_of_halving_compare_all_settings_at_the_first_rung() -> None:
    settings = grid(optim_lr=RATES)
    report = make_report(settings, by_rate, num_halved=2)
    for row in report["settings"]:
        # The survivor has learnt more since, as the others would have.
        row["first_rung"] = 0.5 + 0.01 * row["setting"]
    rows = read_rows(report)
    [axis] = find_axes(rows)
    assert [effect.mean for effect in compute_effects(axis, rows)] == pytest.approx([0.50, 0.51, 0.52])
    page = build(report)
    [section] = [each for each in page.sections if each.key == "effects"]
    assert "at the first rung of halving" in section.notes[0]
    plain = read_rows(make_report(settings, by_rate))
    means = {row.values["optim.lr"]: row.mean for row in plain}
    assert [effect.mean for effect in compute_effects(axis, plain)] == pytest.approx([means[rate] for rate in RATES])
