"""Screen of a forecast: content, one screen, any width, plain ASCII without a capable terminal."""

import dataclasses
import io
import re

import numpy as np
import pytest
import rich.console

from agnews_dist.data.batching.forecast import Bin, Forecast, Spread, forecast
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import Efficiency
from agnews_dist.report.plan_view import draw_bar, show_plan

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def plan() -> Forecast:
    lengths = np.random.default_rng(0).integers(10, 200, 1000)
    made = forecast(
        lengths, PlanSettings(global_batch_size=48), num_epochs=3, num_ranks=8, max_tokens_per_rank=16384, quadratic=0.0
    )
    return dataclasses.replace(
        made,
        num_tokens=100_500,
        num_steps_measured=made.num_steps,
        efficiency=Efficiency(0.875, 0.75, 0.625),
        idle_share=0.125,
        examples_per_step=Spread(40, 47.6, 48),
        micro_batches_per_step=Spread(2, 2.0, 2),
        histogram=(Bin(1, 10, 400), Bin(11, 20, 100), Bin(21, 30, 1), Bin(31, 1999, 0)),
    )


def render(plan: Forecast, *, terminal: bool, width: int = 80, encoding: str = "utf-8", **environ: str) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    out = rich.console.Console(file=file, force_terminal=terminal, width=width, _environ={"TERM": "xterm-256color", **environ})
    facts = {"columns": "text from 'a[b]', label from 'c'"}
    show_plan(plan, title="gpt2 on caf\xe9 [red]rows[/red]", data_facts=facts, num_truncated=25, max_length=1999, out=out)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
def test_show_plan_prints_the_figures(plan: Forecast, terminal: bool) -> None:
    text = ANSI.sub("", render(plan, terminal=terminal))
    for expected in (
        "gpt2 on caf\xe9 [red]rows[/red]",
        "columns     text from 'a[b]', label from 'c'",
        "1,000 texts, 100,500 tokens per epoch (mean 100.5, longest 199)",
        "25 texts (2.50%), at 1,999 tokens",
        "48 texts over all ranks, sorted within 256 batches",
        "21 per epoch, 63 in all",
        "47.6 (40-48) texts",
        "micro-batches per step: 2; steps without a text: 12.5%",
    ):
        assert expected in text
    assert re.search(r"efficiency +critical path 0\.750, padding 0\.875, balance 0\.625", text)
    assert "measured" not in text


def test_show_plan_prints_a_token_budget_and_the_measured_steps(plan: Forecast) -> None:
    settings = PlanSettings(global_token_budget=4096, bucket_window="epoch")
    text = render(dataclasses.replace(plan, settings=settings, num_steps_measured=12), terminal=False)
    assert "at most 4,096 tokens over all ranks, sorted within the whole epoch" in text
    assert "on the first 12 steps" in text


def read_bars(text: str) -> dict[str, tuple[int, str]]:
    found = re.findall(r"^ *([\d,]+-[\d,]+) +([\d,]+)(?:  ([^\n]*?))? *$", ANSI.sub("", text), flags=re.MULTILINE)
    return {span: (int(count.replace(",", "")), drawn) for span, count, drawn in found}


@pytest.mark.parametrize("width", [40, 80, 132])
def test_bars_fill_the_width_in_proportion(plan: Forecast, width: int) -> None:
    for terminal, block in ((True, "\u2588"), (False, "#")):
        text = render(plan, terminal=terminal, width=width)
        drawn = read_bars(text)
        assert {span: count for span, (count, _) in drawn.items()} == {"1-10": 400, "11-20": 100, "21-30": 1, "31-1,999": 0}
        longest = drawn["1-10"][1]
        assert set(longest) == {block}
        assert width - 20 < len(longest) <= width - 17
        assert max(map(len, ANSI.sub("", text).split("\n"))) <= width
        assert abs(drawn["11-20"][1].count(block) - len(longest) / 4) <= 1
        assert len(drawn["21-30"][1]) == 1, "a single text shows"
        assert drawn["31-1,999"][1] == ""


def test_show_plan_prints_ascii_to_a_pipe_a_dumb_terminal_and_without_unicode(plan: Forecast) -> None:
    texts = [
        render(plan, terminal=False),
        render(plan, terminal=True, TERM="dumb"),
        render(plan, terminal=True, encoding="latin-1", NO_COLOR="1"),
        render(plan, terminal=True, encoding="ascii"),
    ]
    for text in texts:
        assert ANSI.sub("", text).replace("caf\xe9", "").isascii()
        assert "###" in text
    assert "caf\\xe9" in texts[-1]
    assert "\x1b" not in texts[0] + texts[1]


def test_show_plan_colours_only_terminals_that_allow_it(plan: Forecast) -> None:
    assert "\x1b[36m" in render(plan, terminal=True)
    assert "\x1b[36m" not in render(plan, terminal=True, NO_COLOR="1")
    assert "\u2588\u2588\u2588" in render(plan, terminal=True, NO_COLOR="1")


def test_show_plan_fits_one_screen() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(3.9, 0.4, 20_000), 1, 1000).astype(np.int64)
    made = forecast(
        lengths, PlanSettings(), num_epochs=3, num_ranks=8, max_tokens_per_rank=16384, quadratic=0.0, max_length=1000
    )
    lines = render(made, terminal=True).rstrip("\n").split("\n")
    assert 16 < len(lines) <= 24


@pytest.mark.parametrize("width", [1, 10, 24, 40])
@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
def test_show_plan_accepts_narrow_terminals_and_no_texts(plan: Forecast, width: int, terminal: bool) -> None:
    assert render(plan, terminal=terminal, width=width)
    nothing = forecast(np.empty(0, np.int64), PlanSettings(), num_epochs=1, num_ranks=1, max_tokens_per_rank=1, quadratic=0.0)
    assert render(nothing, terminal=terminal, width=width)


def test_draw_bar_in_eighths_or_whole_signs() -> None:
    assert draw_bar(2.5, in_blocks=True) == "\u2588\u2588\u258c"
    assert draw_bar(3.0, in_blocks=True) == "\u2588" * 3
    assert draw_bar(0.01, in_blocks=True) == "\u258f"
    assert [len(draw_bar(eighths / 8, in_blocks=True)) for eighths in range(1, 17)] == [1] * 8 + [2] * 8
    assert draw_bar(2.6, in_blocks=False) == "###"
    assert draw_bar(0.0, in_blocks=True) == draw_bar(0.0, in_blocks=False) == ""
