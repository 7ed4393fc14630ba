"""Step events -> the few numbers worth watching: a steady loss, tokens per second, time left."""

import time
from collections import deque
from collections.abc import Callable

from agnews_dist.events import StepDone
from agnews_dist.report.wording import duration

WINDOW = 20
"""Steps over which loss and tokens/s are averaged: one step's loss jumps too much to be read."""


class Pace:
    """Running figures of a training of `num_steps` steps (0: unknown)."""

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_steps = num_steps
        self._clock = clock
        self._recent: deque[StepDone] = deque(maxlen=WINDOW)
        self._first: tuple[int, float] | None = None

    @property
    def last(self) -> StepDone:
        """The newest step."""
        return self._recent[-1]

    @property
    def is_complete(self) -> bool:
        """Whether the newest step was the last of the run."""
        return self.last.step == self.num_steps

    def add(self, event: StepDone) -> None:
        """Take in one step."""
        self._recent.append(event)
        if self._first is None:
            # The time left is judged from the end of the first step: the first one also warms everything up.
            self._first = (event.step, self._clock())

    @property
    def mean_loss(self) -> float:
        """Mean of the window's losses."""
        return sum(event.loss for event in self._recent) / len(self._recent)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over all ranks per second of stepping, in the window."""
        seconds = sum(event.seconds for event in self._recent)
        return sum(event.num_tokens for event in self._recent) / seconds if seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until the last step, evaluations between included at their past rate; None: not known yet."""
        if self._first is None or self.num_steps <= 0:
            return None
        first_step, first_time = self._first
        since = self.last.step - first_step
        if since <= 0:
            return None
        return (self._clock() - first_time) / since * max(self.num_steps - self.last.step, 0)

    def words(self, *, exact: bool = False) -> list[str]:
        """The figures as short texts; `exact`: the newest step's own loss instead of the window's mean."""
        loss = self.last.loss if exact else self.mean_loss
        return [
            f"epoch {self.last.epoch}",
            f"loss {loss:.4f}" if exact else f"mean loss {loss:.4f}",
            f"lr {self.last.lr:.2e}",
            f"grad norm {self.last.grad_norm:.3g}",
            f"{self.tokens_per_second:,.0f} tokens/s",
        ]

    def step_words(self) -> str:
        """`step 12/375`, the number padded so that lines stand under each other."""
        total = f"{self.num_steps}" if self.num_steps else ""
        number = f"{self.last.step:>{len(total)}}"
        return f"step {number}/{total}" if total else f"step {number}"

    def eta_words(self) -> str | None:
        """`ETA 0:42`, or None where it is not known or over."""
        return None if self.eta is None or self.is_complete else f"ETA {duration(self.eta)}"
