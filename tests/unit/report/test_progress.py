"""StepProgress and LossHistory: time left, and the losses of a whole training as a sparkline."""

import math

import pytest
from support.events import Clock, make_step

from agnews_dist.report.progress import SPARKLINE_WIDTH, LossHistory, StepProgress


def test_eta_needs_two_steps_and_a_total() -> None:
    clock = Clock()
    for num_steps, expected in ((10, [None, 8.0, 7.0]), (0, [None, None, None])):
        progress = StepProgress(num_steps, clock)
        found: list[float | None] = []
        for number in range(1, 4):
            clock.now += 1.0
            progress.add(make_step(number))
            found.append(progress.eta)
        assert found == expected


def test_sparkline_draws_the_losses_between_their_extremes() -> None:
    history = LossHistory()
    assert history.draw() == ""
    for loss in (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        history.add(loss)
    assert history.draw() == "█▇▆▅▄▃▂▁"
    for loss in (math.nan, math.inf):
        history.add(loss)
    assert history.draw() == "█▇▆▅▄▃▂▁", "a loss that is not finite has no height"


@pytest.mark.parametrize("num_steps", [1, 20, 21, 399, 100_000])
def test_sparkline_covers_the_whole_training(num_steps: int) -> None:
    history = LossHistory()
    for step in range(num_steps):
        history.add(num_steps - step)
    drawn = history.draw()
    assert min(num_steps, SPARKLINE_WIDTH // 2) <= len(drawn) <= SPARKLINE_WIDTH
    assert list(drawn) == sorted(drawn, reverse=True)
    if num_steps > 1:
        assert (drawn[0], drawn[-1]) == ("█", "▁")


def test_sparkline_of_equal_losses_is_flat() -> None:
    history = LossHistory()
    for _ in range(3):
        history.add(0.5)
    assert history.draw() == "▁▁▁"
