"""The console as a reader sees it: content, how many lines, nothing that data could break, a terminal left in order."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich.console
from support.processes import in_a_terminal

from agnews_dist.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    NonFinite,
    OverfitChecked,
    Profiled,
    Progress,
    Resumed,
    RunDone,
    RunStarted,
    StepDone,
    Warned,
)
from agnews_dist.report.console import Console
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.progress import StepProgress, TaskProgress
from agnews_dist.report.terminal import TerminalDisplay

ROOT = Path(__file__).resolve().parents[3]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STARTED = RunStarted(
    facts={"ranks": "2 (gloo)", "data": "[red]local[/red] rows"},
    parameters={"embeddings": (0, 39_383_808), "block 11": (7_087_872, 0), "out_head": (3_076, 0)},
    num_steps=100,
)
# World: 4 examples, 3 found, 5 predicted: recall 0.750, precision 0.600. Swapped rows and columns would exchange the two.
EVALUATED = EvalDone(
    split="validation",
    epoch=2,
    num_examples=7,
    num_correct=4,
    accuracy=4 / 7,
    macro_f1=0.5333,
    loss=0.4321,
    confusion=((3, 1, 0), (2, 1, 0), (0, 0, 0)),
    class_names=("World", "[b]Sports", "Business"),
    seconds=75.0,
)
DONE = RunDone(facts={"best epoch": "2 of 3"}, paths={"model": "runs/x/model"})
OTHERS: list[Event] = [
    Profiled(path="runs/x/trace.json", top_operators="Name    CPU\naten::addmm   40%"),
    OverfitChecked(num_examples=8, num_steps=50, first_loss=1.4, last_loss=0.0123, accuracy=1.0),
    NonFinite(step=7, epoch=1, ids=tuple(range(100, 122))),
    Resumed(path="runs/x/checkpoints/step-00000040", step=40, attempt=3),
]
SAVED = CheckpointSaved(
    path="runs/x/checkpoints/step-00000040", step=40, num_bytes=85_432_100, stall=0.0123, seconds=2.5
)


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(number: int, **changes: float) -> StepDone:
    event = StepDone(
        step=number, epoch=1, loss=0.5, lr=1e-3, grad_norm=2.0, num_examples=32, num_tokens=1000, seconds=0.25
    )
    return dataclasses.replace(event, **changes)


def shown(*events: Event, terminal: bool, width: int = 80, every_step: bool = False, clock: Clock | None = None) -> str:
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=terminal, width=width, _environ={"TERM": "xterm-256color"})
    with Console(inner, every_step=every_step, clock=clock or Clock()) as console:
        assert type(console._sink) is (TerminalDisplay if terminal else PlainLines)
        for event in events:
            console(event)
    return out.getvalue() if not terminal else ANSI.sub("", out.getvalue())


@pytest.fixture(params=[False, True], ids=["plain", "terminal"])
def terminal(request: pytest.FixtureRequest) -> Iterator[bool]:
    return request.param


def test_header_shows_facts_parts_and_totals(terminal: bool) -> None:
    text = shown(STARTED, terminal=terminal)
    for expected in ("ranks", "2 (gloo)", "[red]local[/red] rows", "embeddings", "block 11", "7,087,872", "3,076"):
        assert expected in text
    # The totals, added by hand.
    assert "7,090,948" in text
    assert "39,383,808" in text


def test_evaluation_shows_scores_and_each_class(terminal: bool) -> None:
    text = shown(EVALUATED, terminal=terminal)
    for expected in ("epoch 2 validation", "accuracy 0.5714", "macro F1 0.5333", "loss 0.4321", "1:15", "[b]Sports"):
        assert expected in text
    if terminal:
        assert re.search(r"class +examples +precision +recall +F1", text)
        assert re.search(r"World +4 +0.600 +0.750 +0.667", text)
        assert re.search(r"Business +0 +- +- +-", text)
    else:
        assert "precision/recall: World 0.600/0.750, [b]Sports 0.500/0.333, Business -/-" in text
        assert "(4 of 7)" in text
    assert "epoch" not in shown(dataclasses.replace(EVALUATED, split="test", epoch=0), terminal=terminal)


def test_the_other_events_are_shown(terminal: bool) -> None:
    text = shown(*OTHERS, DONE, terminal=terminal, width=300)
    for expected in (
        "profile written to runs/x/trace.json",
        "aten::addmm   40%",
        "8 examples, 50 steps: loss 1.4000 -> 0.0123, accuracy 1.000",
        "step 7 made no update: a loss or gradient was not finite, from examples 100, 101,",
        "119 and 2 more",
        "goes on from step 40, attempt 3: runs/x/checkpoints/step-00000040",
        "best epoch",
        "2 of 3",
        "model",
        "runs/x/model",
    ):
        assert expected in text


def test_checkpoints_leave_few_lines() -> None:
    line = "step 40 saved: 85.4 MB in 2.5 s, training stood still for 12 ms"
    clock = Clock()
    out = io.StringIO()
    lines = PlainLines(out, seconds_between_lines=10, clock=clock)
    for _ in range(6):
        lines(SAVED)
        clock.now += 4
    assert out.getvalue().count(line) == 2
    assert shown(SAVED, SAVED, terminal=False, every_step=True).count(line) == 2
    quick = dataclasses.replace(SAVED, seconds=0.5)
    assert line in shown(SAVED, terminal=True)
    assert shown(quick, terminal=True) == ""
    assert "0.5 s" in shown(quick, terminal=True, every_step=True)


def test_text_from_data_is_printed_as_it_is(terminal: bool) -> None:
    text = shown(Warned(message="[red]row[/red] [/] :smile: \x1b[31m\x07 \udc80"), terminal=terminal)
    assert "warning: [red]row[/red] [/] :smile: \\x1b[31m\\x07 \\udc80" in text


def test_warnings_are_yellow_unless_colours_are_off() -> None:
    def raw(environ: dict[str, str]) -> str:
        out = io.StringIO()
        Console(rich.console.Console(file=out, force_terminal=True, _environ={"TERM": "xterm-256color", **environ}))(
            Warned(message="careful")
        )
        return out.getvalue()

    assert "\x1b[33mwarning: careful" in raw({})
    assert "\x1b[3" not in raw({"NO_COLOR": "1"})


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_dumb_terminal_gets_plain_lines(environ: dict[str, str]) -> None:
    out = io.StringIO()
    with Console(rich.console.Console(file=out, force_terminal=True, _environ=environ)) as console:
        console(step(1))
        console(STARTED)
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().isascii()


def test_plain_output_is_dated_lines_without_control_codes() -> None:
    text = shown(STARTED, step(1), EVALUATED, *OTHERS, DONE, terminal=False, width=20)
    lines = text.splitlines()
    assert len(lines) > 10
    assert "\x1b" not in text
    assert text.isascii()
    # A time, or the indent under one: nothing was wrapped to the 20 columns.
    assert all(re.match(r"\d\d:\d\d:\d\d |         ", line) for line in lines)
    assert len([line for line in lines if "epoch 2 validation" in line and "Business" in line]) == 1


def test_an_encoding_without_the_character_is_no_error() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with Console(rich.console.Console(file=file, force_terminal=True)) as console:
        console(Warned(message="caf\xe9 \U0001f600"))
        console(STARTED)
    # Frames and bars cannot be drawn in such an encoding: plain lines.
    assert re.match(rb"\d\d:\d\d:\d\d warning", raw.getvalue())
    assert b"\x1b" not in raw.getvalue()
    assert b"warning: caf\\xe9 \\U0001f600" in raw.getvalue()


def test_plain_steps_are_first_last_and_one_per_interval() -> None:
    clock = Clock()
    out = io.StringIO()
    sink = PlainLines(out, seconds_between_lines=12.5, clock=clock)
    sink(dataclasses.replace(STARTED, parameters={}, num_steps=1000))
    header = len(out.getvalue().splitlines())
    for number in range(1, 1001):
        clock.now += 0.125
        sink(step(number))
    steps = [int(found) for found in re.findall(r"step +(\d+)/1000", out.getvalue())]
    assert steps == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901, 1000]
    assert len(out.getvalue().splitlines()) == header + 11


@pytest.mark.parametrize("width", [80, 200])
def test_every_step_prints_every_step_with_its_own_loss(terminal: bool, width: int) -> None:
    events = [step(number, loss=number / 100) for number in range(1, 101)]
    text = shown(STARTED, *events, terminal=terminal, width=width, every_step=True)
    found = re.findall(r"step +(\d+)/100  epoch 1  loss (\d\.\d+)", text)
    assert found == [(str(number), f"{number / 100:.4f}") for number in range(1, 101)]


def test_a_step_line_has_the_figures_of_the_window() -> None:
    clock = Clock()
    events: list[Event] = []
    out = io.StringIO()
    sink = PlainLines(out, seconds_between_lines=0.0, clock=clock)
    sink(STARTED)
    # The window is 20 steps: of 40, the later 20 have loss 0.3 and 4,000 tokens per 0.5 s.
    for number in range(1, 41):
        clock.now += 2.0
        late = number > 20
        events.append(step(number, loss=0.3 if late else 9.0, num_tokens=4000 if late else 1, seconds=0.5))
        sink(events[-1])
    last = out.getvalue().splitlines()[-1]
    assert "step  40/100  epoch 1  mean loss 0.3000  lr 1.00e-03  grad norm 2  8,000 tokens/s" in last
    # 60 steps to go at 2 s each by the clock, although each says 0.5 s: evaluation between steps is part of the wait.
    assert last.endswith("ETA 2:00")


def test_time_left_is_unknown_until_the_second_step_and_without_a_total() -> None:
    clock = Clock()
    for num_steps, expected in ((10, [None, 8.0, 7.0]), (0, [None, None, None])):
        pace = StepProgress(num_steps, clock)
        found: list[float | None] = []
        for number in range(1, 4):
            clock.now += 1.0
            pace.add(step(number))
            found.append(pace.eta)
        assert found == expected


def test_plain_progress_takes_about_ten_lines_for_any_length() -> None:
    for seconds in (5, 60, 3600, 36_000):
        clock = Clock()
        out = io.StringIO()
        sink = PlainLines(out, clock=clock)
        for done in range(1001):
            sink(Progress(task="tokenising", done=done * 120, total=120_000))
            clock.now += seconds / 1000
        lines = out.getvalue().splitlines()
        assert 1 <= len(lines) <= 13
        assert "tokenising: 120,000 done in " in lines[-1]
        assert len(lines) == 1 or re.search(r"tokenising: [\d,]+/120,000 \(\d+%\) after", lines[0])


def test_plain_progress_of_unknown_total_counts_and_a_new_round_starts_anew() -> None:
    clock = Clock()
    out = io.StringIO()
    sink = PlainLines(out, clock=clock)
    for done in range(100):
        clock.now += 1
        sink(Progress(task="reading", done=done, total=0))
    assert re.findall(r"reading: (\d+) after ([\d.:]+)", out.getvalue()) == [
        ("10", "10.0"), ("20", "20.0"), ("40", "40.0"), ("80", "1:20"),
    ]  # fmt: skip
    for _ in range(2):
        sink(Progress(task="scoring", done=0, total=5))
        clock.now += 3
        sink(Progress(task="scoring", done=5, total=5))
    assert out.getvalue().count("scoring: 5 done in 3.0 s") == 2


def test_terminal_progress_has_a_bar_and_only_long_work_leaves_a_line() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with Console(inner, clock=clock) as console:
        for done in (0, 50, 100):
            console(Progress(task="tokenising", done=done, total=100))
            clock.now += 10
        text = ANSI.sub("", out.getvalue())
        assert re.search(r"tokenising 50/100 +[^\w]+ +50% +ETA 10.0 s", text)
        assert "tokenising: 100 done in 20.0 s" in text
        for done in (0, 100):
            console(Progress(task="short", done=done, total=100))
        assert "short: 100 done" not in ANSI.sub("", out.getvalue())


def prefix(done: int, total: int = 6_200_000, unit: str = "tokens") -> Progress:
    return Progress(task="frozen prefix", done=done, total=total, unit=unit)


@pytest.mark.parametrize("unit", ["tokens", ""])
def test_plain_progress_in_a_unit_has_rate_and_time_left(unit: str) -> None:
    clock = Clock()
    out = io.StringIO()
    sink = PlainLines(out, seconds_between_lines=30.0, clock=clock)
    for done in range(0, 6_200_001, 40_000):
        sink(prefix(done, unit=unit))
        clock.now += 1.0
    lines = [line[9:] for line in out.getvalue().splitlines()]
    if unit:
        assert lines == [
            "frozen prefix: 1,200,000/6,200,000 tokens (19%) after 30.0 s, 40,000 tokens/s, ETA 2:05",
            "frozen prefix: 2,400,000/6,200,000 tokens (39%) after 1:00, 40,000 tokens/s, ETA 1:35",
            "frozen prefix: 4,800,000/6,200,000 tokens (77%) after 2:00, 40,000 tokens/s, ETA 35.0 s",
            "frozen prefix: 6,200,000 tokens done in 2:35, 40,000 tokens/s",
        ]
    else:
        assert lines == [
            "frozen prefix: 1,200,000/6,200,000 (19%) after 30.0 s",
            "frozen prefix: 2,400,000/6,200,000 (39%) after 1:00",
            "frozen prefix: 4,800,000/6,200,000 (77%) after 2:00",
            "frozen prefix: 6,200,000 done in 2:35",
        ]


def test_terminal_progress_in_a_unit_has_rate_and_time_left() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with Console(inner, clock=clock) as console:
        console(prefix(0))
        assert not re.search(r"ETA|/s", out.getvalue())
        clock.now += 30.0
        console(prefix(1_200_000))
        text = ANSI.sub("", out.getvalue())
        assert re.search(r"frozen prefix +[^\w]+ +19% +ETA 2:05 *\s+1,200,000/6,200,000 tokens  40,000 tokens/s", text)
        clock.now += 125.0
        console(prefix(6_200_000))
        assert "frozen prefix: 6,200,000 tokens done in 2:35, 40,000 tokens/s" in ANSI.sub("", out.getvalue())
        console(Progress(task="rows", done=1, total=0, unit="rows"))
        clock.now += 2.0
        console(Progress(task="rows", done=4_001, total=0, unit="rows"))
        assert re.search(r"rows *\s+4,001 rows  2,000 rows/s", ANSI.sub("", out.getvalue()))


def test_the_rate_counts_from_what_the_first_report_found_done() -> None:
    clock = Clock()
    pace = TaskProgress(prefix(5_000_000), clock)
    pace.add(prefix(5_000_000))
    clock.now += 10.0
    pace.add(prefix(5_400_000))
    assert (pace.rate, pace.eta) == (40_000.0, 20.0)
    clock.now += 20.0
    pace.add(prefix(6_200_000))
    assert pace.line() == "frozen prefix: 6,200,000 tokens done in 30.0 s, 40,000 tokens/s"


def test_reports_of_one_instant_are_no_rate() -> None:
    clock = Clock()
    pace = TaskProgress(prefix(0), clock)
    for done in (0, 1_000_000, 5_000_000):
        pace.add(prefix(done))
        assert (pace.rate, pace.eta) == (None, None)
        clock.now += 0.01
    # Seconds pass before the next work is done: nothing is known yet, and what came at once promises nothing.
    clock.now += 9.99
    assert (pace.rate, pace.eta) == (None, None)
    pace.add(prefix(5_400_000))
    assert pace.rate == pytest.approx(40_000, rel=0.01)
    assert pace.eta == pytest.approx(20, rel=0.01)
    clock.now += 20.0
    # The last reports too may come at one instant.
    for done in (6_000_000, 6_200_000):
        pace.add(prefix(done))
    assert pace.rate == pytest.approx(40_000, rel=0.01)


def test_a_rate_takes_a_tenth_of_a_second() -> None:
    clock = Clock()
    pace = TaskProgress(prefix(0), clock)
    found: list[float | None] = []
    # Binary fractions. At 1/16 s the rate's start is still moved; what comes 1/16 s later is too near to it.
    for done in (0, 10, 20, 30, 40):
        pace.add(prefix(done))
        found.append(pace.rate)
        clock.now += 1 / 16
    assert found == [None, None, None, 160.0, 160.0]


def test_work_that_was_all_done_already_has_no_rate(terminal: bool) -> None:
    text = shown(prefix(6_200_000), prefix(0), prefix(6_200_000), terminal=terminal)
    assert "frozen prefix" in text
    assert not re.search(r"/s|ETA", text)
    if not terminal:
        assert text.count("frozen prefix: 6,200,000 tokens done in 0.0 s\n") == 2


def test_terminal_redraws_at_most_ten_times_per_second() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with Console(inner, clock=clock) as console:
        console(dataclasses.replace(STARTED, num_steps=2000))
        for number in range(1, 1001):
            clock.now += 0.001
            console(step(number))
        drawn = re.findall(r"step +(\d+)/2000", ANSI.sub("", out.getvalue()))
    assert 9 <= len(drawn) <= 12


@pytest.mark.parametrize("width", [1, 10, 24, 40])
def test_narrow_terminals_are_no_error(terminal: bool, width: int) -> None:
    progress = [Progress(task="t", done=1, total=3), prefix(0), prefix(1)]
    assert shown(STARTED, *progress, step(1), step(2), EVALUATED, *OTHERS, DONE, terminal=terminal, width=width)


def test_every_kind_of_event_is_handled_also_with_nothing_in_it(terminal: bool) -> None:
    bare: list[Event] = [RunStarted(facts={}, parameters={}), RunDone(), step(1, loss=float("nan"), seconds=0.0)]
    text = shown(*bare, terminal=terminal)
    assert "nan" in text


def test_a_long_path_stays_one_line(terminal: bool) -> None:
    path = "/data/" + "directory/" * 12 + "model"
    assert path in shown(RunDone(facts={}, paths={"model": path}), terminal=terminal)


def test_pipes_are_plain_even_where_colours_are_forced() -> None:
    code = (
        "from agnews_dist.report.console import Console\nfrom agnews_dist.events import Warned, Progress\n"
        "with Console() as console:\n    console(Warned(message='careful'))\n"
        "    console(Progress(task='t', done=1, total=2))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=60)
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: careful\n", done.stdout)


IN_A_TERMINAL = """
import sys
from agnews_dist.report.console import Console
from agnews_dist.events import Progress, RunStarted, StepDone
try:
    with Console() as console:
        console(RunStarted(facts={}, parameters={}, num_steps=5))
        for n in (1, 2, 3):
            console(StepDone(step=n, epoch=1, loss=1, lr=1, grad_norm=1, num_examples=1, num_tokens=1, seconds=1))
        print("printed meanwhile")
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__
print("after")
"""


WORKS_IN_A_TERMINAL = """
import time
from agnews_dist.report.console import Console
from agnews_dist.events import Progress
with Console() as console:
    for done in range(0, 4_000, 400):
        console(Progress(task="frozen prefix", done=done, total=4_000, unit="tokens"))
        time.sleep(0.22)
    console(Progress(task="frozen prefix", done=4_000, total=4_000, unit="tokens"))
"""


def test_a_real_terminal_shows_rate_and_time_left_and_keeps_one_line() -> None:
    text = in_a_terminal("-c", WORKS_IN_A_TERMINAL)
    rates = [int(found.replace(",", "")) for found in re.findall(r"tokens.{2}([\d,]+) tokens/s", ANSI.sub("", text))]
    # 400 tokens per 0.22 s is 1,818 per second; a busy machine sleeps longer, never shorter.
    assert len(rates) >= 5
    assert all(0 < rate <= 1_819 for rate in rates)
    assert re.search(r"% +ETA \d", ANSI.sub("", text))
    last = text[text.rfind("\x1b[2K") :]
    assert re.search(r"frozen prefix: 4,000 tokens done in [\d.:]+( s)?, [\d,]+ tokens/s", ANSI.sub("", last))
    assert "ETA" not in last


def test_an_exception_leaves_a_real_terminal_in_order() -> None:
    text = in_a_terminal("-c", IN_A_TERMINAL)
    assert "step 3/5" in text or "step 1/5" in text
    # The cursor is on, also between two redraws; the display's lines are erased before what follows.
    hidden, visible = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert visible > hidden
    first_hidden = text.find("\x1b[?25l")
    assert first_hidden == -1 or text.find("\x1b[?25h", first_hidden) < text.find("step 1/5")
    assert text.index("printed meanwhile") < text.index("after")
    last_bar = text.rfind("mean loss")
    assert "\x1b[2K" in text[last_bar:]
    assert text.endswith("after\r\n")
