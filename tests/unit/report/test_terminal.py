"""Console of a real process: in a terminal, and with a pipe as its output."""

import re

import pytest
from support.processes import in_a_terminal, python

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_pipes_are_plain_despite_force_color() -> None:
    code = (
        "from contextlib import closing\nfrom agnews_dist.events import Warned, Progress\n"
        "from agnews_dist.report.console import create_console\n"
        "with closing(create_console()) as console:\n    console(Warned(message='careful'))\n"
        "    console(Progress(task='t', done=1, total=2))\n"
    )
    done = python("-c", code, FORCE_COLOR="1", TERM="xterm-256color")
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: careful\n", done.stdout)


IN_A_TERMINAL = """
import sys
from agnews_dist.report.console import create_console
from contextlib import closing
from agnews_dist.events import Progress, RunStarted, StepDone
try:
    with closing(create_console()) as console:
        console(RunStarted(facts={}, parameters={}, num_steps=5))
        for n in (1, 2, 3):
            console(StepDone(step=n, epoch=1, loss=1, lr=1, grad_norm=1, num_examples=1, num_tokens=1, seconds=1))
        print("other output")
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__
print("after")
"""


TASK_IN_A_TERMINAL = """
import time
from agnews_dist.report.console import create_console
from contextlib import closing
from agnews_dist.events import Progress
with closing(create_console()) as console:
    for done in range(0, 4_000, 400):
        console(Progress(task="frozen prefix", done=done, total=4_000, unit="tokens"))
        time.sleep(0.22)
    console(Progress(task="frozen prefix", done=4_000, total=4_000, unit="tokens"))
"""


@pytest.mark.slow
def test_a_real_terminal_has_rate_and_eta_and_ends_with_one_line() -> None:
    text = in_a_terminal("-c", TASK_IN_A_TERMINAL)
    rates = [int(found.replace(",", "")) for found in re.findall(r"/4,000 +([\d,]+) tokens/s", ANSI.sub("", text))]
    # 400 tokens per 0.22 s are 1,818 per second. A busy machine may be slower, never faster.
    assert len(rates) >= 5
    assert all(0 < rate <= 1_819 for rate in rates)
    assert re.search(r" tokens/s ETA \d\d:\d\d", ANSI.sub("", text))
    last = text[text.rfind("\x1b[2K") :]
    assert re.search(r"frozen prefix: 4,000 tokens done in [\d.:]+( s)?, [\d,]+ tokens/s", ANSI.sub("", last))
    assert "ETA" not in last


def test_an_exception_restores_a_real_terminal() -> None:
    text = in_a_terminal("-c", IN_A_TERMINAL)
    assert "1/5" in text
    # The cursor is visible, also between two redraws, and the live lines are erased.
    hidden, visible = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert visible > hidden
    first_hidden = text.find("\x1b[?25l")
    assert first_hidden == -1 or text.find("\x1b[?25h", first_hidden) < text.find("1/5")
    assert text.index("other output") < text.index("after")
    assert "\x1b[2K" in text[text.rfind("/5") :]
    assert re.search(r"loss ▁▁▁ 1.0000  1 tokens/s  1 examples/s\r\nafter\r\n$", ANSI.sub("", text))


@pytest.mark.parametrize(
    "variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"JPY_PARENT_PID": "1"}], ids=lambda each: next(iter(each))
)
def test_a_terminal_that_shows_no_codes_gets_plain_lines(variables: dict[str, str]) -> None:
    """A command after `!` in a notebook has a terminal too; its kernel sets JPY_PARENT_PID."""
    text = in_a_terminal("-c", IN_A_TERMINAL, **variables)
    lines = [re.sub(r"\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]
    assert re.sub(r"memory \d+ MB", "memory", "\n".join(lines[1:])) == (
        "step 1/5  epoch 1  mean loss 1.0000  lr 1.00e+00  grad norm 1  1 tokens/s  1 examples/s  memory\nother output\nafter"
    )
    assert re.fullmatch(r"run started on \d{4}-\d\d-\d\d, 5 steps", lines[0])
