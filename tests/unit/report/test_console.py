"""Console: content, number of lines, escaping of data, and a terminal restored at the end."""

import dataclasses
import io
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import rich.console
from support.events import Clock, make_progress, make_step
from support.processes import TIMEOUT, wait_until

from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.evaluation.metrics import compute_scores
from agnews_dist.events import (
    CheckpointSaved,
    ClassScores,
    EvalDone,
    Event,
    Loading,
    NonFinite,
    OverfitChecked,
    Predicted,
    Profiled,
    Progress,
    Resumed,
    RunDone,
    RunStarted,
    Scores,
    StoppedEarly,
    Warned,
)
from agnews_dist.report import console
from agnews_dist.report.console import Verbosity, create_console
from agnews_dist.report.display_streams import LIVE_LINES
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.terminal import TerminalDisplay

ROOT = Path(__file__).resolve().parents[3]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STARTED = RunStarted(
    facts={"ranks": "2 (gloo)", "data": "[red]local[/red] rows"},
    parameters={"embeddings": (0, 39_383_808), "block 11": (7_087_872, 0), "out_head": (3_076, 0)},
    num_steps=100,
)
# World: 4 examples, 5 predictions, 3 correct: recall 0.750, precision 0.600. Swapping rows and columns would swap these.
EVALUATED = EvalDone(
    split="validation",
    epoch=2,
    scores=Scores(
        num_examples=7, num_correct=4, accuracy=4 / 7, macro_f1=0.5333, loss=0.4321, confusion=((3, 1, 0), (2, 1, 0), (0, 0, 0))
    ),
    class_names=("World", "[b]Sports", "Business"),
    num_classes=3,
    classes=(
        ClassScores(name="World", num_examples=4, precision=0.6, recall=0.75, f1=2 / 3),
        ClassScores(name="[b]Sports", num_examples=3, precision=0.5, recall=1 / 3, f1=0.4),
        ClassScores(name="Business", num_examples=0, precision=math.nan, recall=math.nan, f1=math.nan),
    ),
    seconds=75.0,
)
DONE = RunDone(facts={"best weights": "2 of 3"}, paths={"model": "runs/x/model"})
OTHERS: list[Event] = [
    Profiled(path="runs/x/trace.json", top_operators="Name    CPU\naten::addmm   40%"),
    OverfitChecked(num_examples=8, num_steps=50, first_loss=1.4, last_loss=0.0123, accuracy=1.0),
    NonFinite(step=7, epoch=1, ids=tuple(range(100, 122))),
    Resumed(path="runs/x/checkpoints/step-00000040", step=40, attempt=3),
    Predicted(split="test", num_examples=1_600, seconds=75.0),
    StoppedEarly(step=90, epoch=2, num_worse=3, metric="macro_f1", best_step=60),
]
SAVED = CheckpointSaved(path="runs/x/checkpoints/step-00000040", step=40, num_bytes=85_432_100, stall=0.0123, seconds=2.5)


def render(
    *events: Event,
    terminal: bool,
    width: int = 80,
    verbosity: Verbosity = "normal",
    every_step: bool = False,
    clock: Clock | None = None,
) -> str:
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=terminal, width=width, _environ={"TERM": "xterm-256color"})
    # Without the thread of `Console`, which would read the test's clock.
    display = create_console(inner, verbosity=verbosity, every_step=every_step, clock=clock or Clock()).display
    assert type(display) is (TerminalDisplay if terminal else PlainLines)
    with closing(display):
        for event in events:
            display(event)
    return out.getvalue() if not terminal else ANSI.sub("", out.getvalue())


@pytest.fixture(params=[False, True], ids=["plain", "terminal"])
def terminal(request: pytest.FixtureRequest) -> Iterator[bool]:
    return request.param


def test_header_has_facts_parts_and_totals(terminal: bool) -> None:
    text = render(STARTED, terminal=terminal, verbosity="verbose")
    for expected in ("ranks", "2 (gloo)", "[red]local[/red] rows", "embeddings", "block 11", "7,087,872", "3,076"):
        assert expected in text
    # Totals, added by hand.
    assert "7,090,948" in text
    assert "39,383,808" in text


def test_evaluation_has_scores_and_each_class(terminal: bool) -> None:
    text = render(EVALUATED, terminal=terminal, verbosity="verbose")
    for expected in ("epoch 2 validation", "accuracy 0.5714", "macro F1 0.5333", "loss 0.4321", "1:15", "[b]Sports"):
        assert expected in text
    if terminal:
        assert re.search(r"class +examples +precision +recall +F1", text)
        assert re.search(r"World +4 +0.600 +0.750 +0.667", text)
        assert re.search(r"Business +0 +- +- +-", text)
    else:
        assert "precision/recall: World 0.600/0.750, [b]Sports 0.500/0.333, Business -/-" in text
        assert "(4 of 7)" in text
    assert "epoch 2, step 750 validation" in render(
        dataclasses.replace(EVALUATED, step=750), terminal=terminal, verbosity="verbose"
    )
    assert "epoch" not in render(dataclasses.replace(EVALUATED, split="test", epoch=0), terminal=terminal)


def test_evaluation_in_a_training_is_one_line_without_verbose() -> None:
    text = render(EVALUATED, dataclasses.replace(EVALUATED, is_best=True), terminal=False)
    line = "epoch 2 validation: accuracy 0.5714 (4 of 7), macro F1 0.5333, loss 0.4321, 1:15"
    assert [each[9:] for each in text.splitlines()] == [line, f"{line}, the best so far"]


def test_header_has_ten_facts_unless_verbose(terminal: bool) -> None:
    facts = {f"fact{number:02}": f"value {number}" for number in range(12)}
    started = dataclasses.replace(STARTED, facts=facts)
    for verbosity, expected in (("normal", 10), ("verbose", 12)):
        text = render(started, terminal=terminal, verbosity=verbosity)
        assert re.findall(r"(fact\d\d) +value", text) == list(facts)[:expected]
        assert ("7,087,872" in text) == (verbosity == "verbose")


@pytest.mark.parametrize(("width", "num_lines"), [(80, 10), (119, 10), (120, 5), (200, 5)])
def test_terminal_header_has_two_columns_if_there_is_room(width: int, num_lines: int) -> None:
    facts = {f"fact{number}": f"value {number}" for number in range(10)}
    lines = render(dataclasses.replace(STARTED, facts=facts), terminal=True, width=width).splitlines()
    assert max(map(len, lines)) == width
    rows = [re.findall(r"fact\d", line) for line in lines if "fact" in line]
    names = list(facts)
    assert rows == (
        [[name] for name in names] if num_lines == 10 else [list(pair) for pair in zip(names[:5], names[5:], strict=True)]
    )


def many_classes(num_classes: int) -> EvalDone:
    """Return an evaluation by the package, in which class 7 is always wrong."""
    labels = np.arange(2 * num_classes) % num_classes
    predictions = np.where(labels == 7, 8, labels)
    made = compute_scores(labels, predictions, num_classes, 1.0)
    split = SplitScores(labels, predictions, np.empty((0, 0), "f4"), made, seconds=1.0)
    event = split.to_event("test", 0, tuple(f"name-{i}" for i in range(num_classes)))
    assert isinstance(event, EvalDone)
    return event


@pytest.mark.parametrize(("num_classes", "num_listed"), [(20, 20), (21, 5), (150, 5), (10_000, 5)])
def test_of_many_classes_those_with_the_lowest_f1_are_shown(terminal: bool, num_classes: int, num_listed: int) -> None:
    text = render(many_classes(num_classes), terminal=terminal, width=60)
    assert len(re.findall(r"name-\d+", text)) == num_listed
    assert (f"lowest F1 of {num_classes:,} classes" in text) == (num_listed < num_classes)
    if terminal:
        assert re.search(r"name-7 +2 +- +0.000 +0.000", text)
        assert re.search(r"name-8 +2 +0.500 +1.000 +0.667", text)
        assert len(text.splitlines()) <= num_listed + 5
    elif num_listed < num_classes:
        assert f"precision/recall (lowest F1 of {num_classes:,} classes): name-7 -/0.000, name-8 0.500/1.000, name-0 1" in text


def test_other_events_are_printed(terminal: bool) -> None:
    text = render(*OTHERS, DONE, terminal=terminal, width=300)
    for expected in (
        "profile written to runs/x/trace.json",
        "aten::addmm   40%",
        "8 examples, 50 steps: loss 1.4000 -> 0.0123, accuracy 1.000",
        "step 7 skipped its update: loss or gradient not finite, examples 100, 101,",
        "119 and 2 more",
        "resumed from step 40, attempt 3: runs/x/checkpoints/step-00000040",
        "test: 1,600 rows without labels: predicted, not scored, 1:15",
        "stopped early after step 90: 3 evaluations without a better macro_f1 (optim.patience); the best is that of step 60",
        "best weights",
        "2 of 3",
        "model",
        "runs/x/model",
    ):
        assert expected in text


def test_checkpoints_print_few_lines() -> None:
    line = "checkpoint of step 40 written: 85.4 MB in 2.5 s (stall 12 ms)"
    clock = Clock()
    out = io.StringIO()
    lines = PlainLines(out, seconds_between_lines=10, clock=clock)
    for _ in range(6):
        lines(SAVED)
        clock.now += 4
    assert out.getvalue().count(line) == 2
    assert render(SAVED, SAVED, terminal=False, every_step=True).count(line) == 2
    quick = dataclasses.replace(SAVED, seconds=0.5)
    assert line in render(SAVED, terminal=True)
    assert render(quick, terminal=True) == ""
    assert "0.5 s" in render(quick, terminal=True, every_step=True)


def test_text_from_data_is_printed_without_markup(terminal: bool) -> None:
    text = render(Warned(message="[red]row[/red] [/] :smile: \x1b[31m\x07 \udc80"), terminal=terminal)
    assert "warning: [red]row[/red] [/] :smile: \\x1b[31m\\x07 \\udc80" in text


def test_warnings_are_yellow_unless_NO_COLOR() -> None:
    def raw_output(environ: dict[str, str]) -> str:
        out = io.StringIO()
        terminal = rich.console.Console(file=out, force_terminal=True, _environ={"TERM": "xterm-256color", **environ})
        create_console(terminal).display(Warned(message="careful"))
        return out.getvalue()

    assert "\x1b[33mwarning: careful" in raw_output({})
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: careful\n", raw_output({"NO_COLOR": "1"}))


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_dumb_terminal_gets_plain_lines(environ: dict[str, str]) -> None:
    out = io.StringIO()
    with closing(create_console(rich.console.Console(file=out, force_terminal=True, _environ=environ))) as console:
        console(make_step(1))
        console(STARTED)
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().isascii()


def test_plain_lines_have_a_time_and_no_control_codes() -> None:
    text = render(STARTED, make_step(1), EVALUATED, *OTHERS, DONE, terminal=False, width=20, verbosity="verbose")
    lines = text.splitlines()
    assert len(lines) > 10
    assert "\x1b" not in text
    assert text.isascii()
    # Nothing is wrapped to the 20 columns.
    assert all(re.match(r"\d\d:\d\d:\d\d |         ", line) for line in lines)
    assert len([line for line in lines if "epoch 2 validation" in line and "Business" in line]) == 1


def test_an_encoding_without_unicode_gets_escapes() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with closing(create_console(rich.console.Console(file=file, force_terminal=True))) as console:
        console(Warned(message="caf\xe9 \U0001f600"))
        console(STARTED)
    # Frames and bars need Unicode, so this gets plain lines.
    assert re.match(rb"\d\d:\d\d:\d\d warning", raw.getvalue())
    assert b"\x1b" not in raw.getvalue()
    assert b"warning: caf\\xe9 \\U0001f600" in raw.getvalue()


def test_plain_steps_are_the_first_the_last_and_one_per_interval() -> None:
    clock = Clock()
    out = io.StringIO()
    sink = PlainLines(out, seconds_between_lines=12.5, clock=clock)
    sink(dataclasses.replace(STARTED, parameters={}, num_steps=1000))
    header = len(out.getvalue().splitlines())
    for number in range(1, 1001):
        clock.now += 0.125
        sink(make_step(number))
    steps = [int(found) for found in re.findall(r"step +(\d+)/1000", out.getvalue())]
    assert steps == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901, 1000]
    assert len(out.getvalue().splitlines()) == header + 11


@pytest.mark.parametrize("width", [80, 200])
def test_every_step_prints_every_step_with_its_own_loss(terminal: bool, width: int) -> None:
    events = [make_step(number, loss=number / 100) for number in range(1, 101)]
    text = render(STARTED, *events, terminal=terminal, width=width, every_step=True)
    found = re.findall(r"step +(\d+)/100  epoch 1  loss (\d\.\d+)", text)
    assert found == [(str(number), f"{number / 100:.4f}") for number in range(1, 101)]


def test_step_line_has_means_over_20_steps() -> None:
    clock = Clock()
    events: list[Event] = []
    out = io.StringIO()
    sink = PlainLines(out, seconds_between_lines=0.0, clock=clock)
    sink(STARTED)
    # The last 20 of 40 steps have loss 0.3 and 4,000 tokens per 0.5 s.
    for number in range(1, 41):
        clock.now += 2.0
        late = number > 20
        events.append(make_step(number, loss=0.3 if late else 9.0, num_tokens=4000 if late else 1, seconds=0.5))
        sink(events[-1])
    last = out.getvalue().splitlines()[-1]
    assert "step  40/100  epoch 1  mean loss 0.3000  lr 1.00e-03  grad norm 2  8,000 tokens/s  64 examples/s  memory " in last
    # 60 steps remain, at 2 s each by the clock: time between steps counts too.
    assert last.endswith("ETA 2:00")


def test_plain_task_prints_few_lines_at_any_length() -> None:
    for seconds in (5, 60, 3600, 36_000):
        clock = Clock()
        out = io.StringIO()
        sink = PlainLines(out, clock=clock)
        for done in range(1001):
            sink(Progress(task="tokenising", done=done * 120, total=120_000))
            clock.now += seconds / 1000
        lines = out.getvalue().splitlines()
        assert 1 <= len(lines) <= 90
        assert "tokenising: 120,000 done in " in lines[-1]
        assert len(lines) == 1 or re.search(r"tokenising: [\d,]+/120,000 \(\d+%\) after", lines[0])


def test_plain_task_of_unknown_total_counts_and_can_be_repeated() -> None:
    clock = Clock()
    out = io.StringIO()
    sink = PlainLines(out, clock=clock)
    for done in range(100):
        clock.now += 1
        sink(Progress(task="reading", done=done, total=0))
    counts = [int(count) for count in re.findall(r"reading: (\d+) after", out.getvalue())]
    assert counts == [*range(4, 44, 4), 44, 49, 54, 60, 66, 73, 81, 90, 99]
    for _ in range(2):
        sink(Progress(task="scoring", done=0, total=5))
        clock.now += 3
        sink(Progress(task="scoring", done=5, total=5))
    assert out.getvalue().count("scoring: 5 done in 3.0 s") == 2


def test_terminal_task_has_a_bar_and_a_line_if_long() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with closing(create_console(inner, clock=clock).display) as console:
        for done in (0, 50, 100):
            console(Progress(task="tokenising", done=done, total=100))
            clock.now += 10
        text = ANSI.sub("", out.getvalue())
        assert re.search(r"tokenising [^\w]+ 50% 50/100 +ETA 00:10", text)
        assert "tokenising: 100 done in 20.0 s" in text
        for done in (0, 100):
            console(Progress(task="short", done=done, total=100))
        assert "short: 100 done" not in ANSI.sub("", out.getvalue())


@pytest.mark.parametrize("unit", ["tokens", ""])
def test_plain_task_with_a_unit_has_rate_and_eta(unit: str) -> None:
    clock = Clock()
    out = io.StringIO()
    sink = PlainLines(out, clock=clock)
    for done in range(0, 6_200_001, 40_000):
        sink(make_progress(done, unit=unit))
        clock.now += 1.0
    lines = [line[9:] for line in out.getvalue().splitlines()]
    if unit:
        assert lines[:2] == [
            "frozen prefix: 160,000/6,200,000 tokens (3%) after 4.0 s, 40,000 tokens/s, ETA 2:31",
            "frozen prefix: 320,000/6,200,000 tokens (5%) after 8.0 s, 40,000 tokens/s, ETA 2:27",
        ]
        assert lines[-1] == "frozen prefix: 6,200,000 tokens done in 2:35, 40,000 tokens/s"
    else:
        assert lines[0] == "frozen prefix: 160,000/6,200,000 (3%) after 4.0 s"
        assert lines[-1] == "frozen prefix: 6,200,000 done in 2:35"


def test_terminal_task_with_a_unit_has_rate_and_eta() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with closing(create_console(inner, clock=clock).display) as console:
        console(make_progress(0))
        assert re.search(r"frozen prefix [^\w]+ 0% 0/6,200,000 tokens *$", ANSI.sub("", out.getvalue()), re.MULTILINE)
        clock.now += 30.0
        console(make_progress(1_200_000))
        text = ANSI.sub("", out.getvalue())
        assert re.search(r"frozen prefix [^\w]+ 19% 1,200,000/6,200,000 40,000 tokens/s ETA 02:05", text)
        clock.now += 125.0
        console(make_progress(6_200_000))
        assert "frozen prefix: 6,200,000 tokens done in 2:35, 40,000 tokens/s" in ANSI.sub("", out.getvalue())
        console(Progress(task="rows", done=1, total=0, unit="rows"))
        clock.now += 2.0
        console(Progress(task="rows", done=4_001, total=0, unit="rows"))
        assert re.search(r"rows [^\w]+ 4,001 2,000 rows/s", ANSI.sub("", out.getvalue()))


def test_task_that_was_already_done_has_no_rate(terminal: bool) -> None:
    text = render(make_progress(6_200_000), make_progress(0), make_progress(6_200_000), terminal=terminal)
    assert "frozen prefix" in text
    assert not re.search(r"/s|ETA", text)
    if not terminal:
        assert text.count("frozen prefix: 6,200,000 tokens done in 0.0 s\n") == 2


def test_terminal_redraws_at_most_ten_times_per_second() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with closing(create_console(inner, clock=clock).display) as console:
        console(dataclasses.replace(STARTED, num_steps=2000))
        for number in range(1, 1001):
            clock.now += 0.001
            console(make_step(number))
        drawn = re.findall(r" (\d+)/2,000", ANSI.sub("", out.getvalue()))
    assert 9 <= len(drawn) <= 12


@pytest.mark.parametrize("width", [1, 10, 24, 40])
def test_narrow_terminals(terminal: bool, width: int) -> None:
    progress = [Progress(task="t", done=1, total=3), make_progress(0), make_progress(1)]
    evaluations = [EVALUATED, many_classes(150)]
    assert render(STARTED, *progress, make_step(1), make_step(2), *evaluations, *OTHERS, DONE, terminal=terminal, width=width)


def test_empty_events_are_printed(terminal: bool) -> None:
    bare: list[Event] = [RunStarted(facts={}, parameters={}), RunDone(), make_step(1, loss=float("nan"), seconds=0.0)]
    text = render(*bare, terminal=terminal)
    assert "nan" in text


def test_a_long_path_is_one_line(terminal: bool) -> None:
    path = "/data/" + "directory/" * 12 + "model"
    assert path in render(RunDone(facts={}, paths={"model": path}), terminal=terminal)


class SetClock(Clock):
    """A clock that the console's thread reads; `read` is set after that."""

    def __init__(self) -> None:
        super().__init__()
        self.read = threading.Event()

    def __call__(self) -> float:
        if threading.current_thread() is not threading.main_thread():
            self.read.set()
        return super().__call__()


def test_console_shows_a_phase_that_takes_long_without_an_event(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "TICK_SECONDS", 0.01)
    out, clock = io.StringIO(), SetClock()
    inner = rich.console.Console(file=out, force_terminal=terminal, width=80, _environ={"TERM": "xterm-256color"})
    with closing(create_console(inner, clock=clock)) as sink:
        sink(Loading(program="agnews_dist 1", what="PyTorch"))
        first = out.getvalue()
        assert first.count("\n") == 1
        clock.now += 3.0
        assert clock.read.wait(TIMEOUT)
        assert out.getvalue() == first, "short phases have no line"
        clock.now += 1.0
        assert wait_until(lambda: out.getvalue() != first)
        shown = ANSI.sub("", out.getvalue()[len(first) :])
    assert re.search(r"load PyTorch [^\w]+ 4\.0 s" if terminal else r"load PyTorch: 4\.0 s so far\n$", shown)


def test_closed_console_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    tick_until_closed = console.Console._tick_until_closed

    def end_slowly(self: console.Console) -> None:
        tick_until_closed(self)
        time.sleep(0.2)

    monkeypatch.setattr(console.Console, "_tick_until_closed", end_slowly)
    before = threading.active_count()
    with closing(create_console(rich.console.Console(file=io.StringIO()))) as sink:
        sink(Loading(program="agnews_dist 1", what="PyTorch"))
    assert threading.active_count() <= before


def test_quiet_console_shows_warnings_and_results(terminal: bool) -> None:
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=terminal, width=120, _environ={"TERM": "xterm-256color"})
    scored = dataclasses.replace(EVALUATED, split="test", epoch=0)
    with closing(create_console(inner, verbosity="quiet", clock=Clock())) as sink:
        for event in (
            STARTED,
            make_progress(0),
            make_step(1),
            EVALUATED,
            SAVED,
            *OTHERS,
            Warned(message="careful"),
            scored,
            DONE,
        ):
            sink(event)
    text = ANSI.sub("", out.getvalue())
    kept = ("warning: careful", "step 7 skipped its update", "test: 1,600 rows without labels", "runs/x/model", "World")
    assert [words for words in kept if words not in text] == []
    for words in ("ranks", "step 1/", "step   1", "epoch 2", "checkpoint", "resumed", "overfit", "trace.json"):
        assert words not in text


def test_terminal_keeps_the_latest_evaluations_and_marks_the_best() -> None:
    first = render(STARTED, EVALUATED, terminal=True).splitlines()
    assert [line.split()[-1] for line in first[-2:]] == ["time", "1:15"], "a start may resume at an evaluation"
    scored = [dataclasses.replace(EVALUATED, step=10 * number, is_best=number in (1, 3)) for number in range(1, 9)]
    text = render(STARTED, make_step(1), *scored, terminal=True)
    lines = text[text.rindex("epoch  step") :].splitlines()
    assert [re.sub(" +", " ", line.strip()) for line in lines] == [
        "epoch step split accuracy macro F1 loss time",
        "2 30 validation 0.5714 0.5333 0.4321 1:15 best",
        *(f"2 {step} validation 0.5714 0.5333 0.4321 1:15" for step in (50, 60, 70, 80)),
        "loss ▁ 0.5000 4,000 tokens/s 128 examples/s",
    ]


def test_live_display_has_the_figures_of_a_training() -> None:
    clock = Clock()
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with closing(create_console(inner, clock=clock).display) as display:
        display.measure_memory = lambda: 1_234_000_000
        display(STARTED)
        for number in range(1, 11):
            clock.now += 2.0
            display(make_step(number, loss=1 / number))
            if number == 4:
                display(SAVED)
        live = ANSI.sub("", out.getvalue()).splitlines()[-3:]
    assert re.fullmatch(r"train [━╸╺]+ +10% 10/100 0\.5 steps/s ETA 03:00", live[0][live[0].rindex("train") :])
    assert live[1:] == [
        "loss █▄▃▂▂▂▁▁▁▁ 0.2929  4,000 tokens/s  128 examples/s",
        "epoch 1  lr 1.00e-03  grad norm 2  memory 1.2 GB  checkpoint 12 s ago",
    ]


def test_live_display_has_a_bounded_height() -> None:
    out = io.StringIO()
    inner = rich.console.Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with closing(create_console(inner, clock=Clock()).display) as display:
        for event in (STARTED, make_step(1), *[EVALUATED] * 9, make_step(2), make_progress(1), EVALUATED):
            display(event)
    moves = re.findall(r"(?:\x1b\[1A)+", out.getvalue().replace("\x1b[2K", ""))
    heights = [len(up) // len("\x1b[1A") + 1 for up in moves]
    assert 1 < max(heights) <= LIVE_LINES
