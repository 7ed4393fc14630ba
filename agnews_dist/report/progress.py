"""Events of steps and of long work -> the few numbers worth watching: a steady loss, a rate, time left."""

import time
from collections import deque
from collections.abc import Callable

from agnews_dist.events import Progress, StepDone
from agnews_dist.report.formatting import duration

WINDOW = 20
"""Steps over which loss and tokens/s are averaged: one step's loss jumps too much to be read."""
SECONDS_WORTH_A_RATE = 0.1
"""Over less time a rate is chance."""


class StepProgress:
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
            "update left out" if self.last.grad_norm is None else f"grad norm {self.last.grad_norm:.3g}",
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


class TaskProgress:
    """Running figures of one long task. The work of its first report was found done: only what follows makes the rate."""

    def __init__(self, first: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.last = first
        self._clock = clock
        self._started = clock()
        self._base = (self._started, first.done)

    def add(self, event: Progress) -> None:
        """Take in one report."""
        self.last = event
        now = self._clock()
        if now - self._started < SECONDS_WORTH_A_RATE:
            # What was found done may also come piece by piece, in no time: taken as work, it would promise an early end.
            self._base = (now, event.done)

    @property
    def is_complete(self) -> bool:
        """Whether all is done; never, where the total is unknown."""
        return 0 < self.last.total <= self.last.done

    @property
    def elapsed(self) -> float:
        """Seconds since the first report."""
        return self._clock() - self._started

    @property
    def rate(self) -> float | None:
        """Units per second; None: not known yet."""
        base_time, base_done = self._base
        seconds, done = self._clock() - base_time, self.last.done - base_done
        return done / seconds if done > 0 and seconds >= SECONDS_WORTH_A_RATE else None

    @property
    def eta(self) -> float | None:
        """Seconds until all is done; None: not known yet."""
        rate = self.rate
        return (self.last.total - self.last.done) / rate if rate and self.last.total > 0 else None

    def count_words(self) -> str:
        """`1,000/6,000 tokens`."""
        total = f"/{self.last.total:,}" if self.last.total > 0 else ""
        unit = f" {self.last.unit}" if self.last.unit else ""
        return f"{self.last.done:,}{total}{unit}"

    def rate_words(self) -> str | None:
        """`12,345 tokens/s`, or None where it is not known or the task has no unit."""
        rate = self.rate
        return None if rate is None or not self.last.unit else f"{rate:,.0f} {self.last.unit}/s"

    def eta_words(self) -> str | None:
        """`ETA 0:42`, or None where it is not known, where all is done, or the task has no unit."""
        eta = self.eta
        return None if eta is None or self.is_complete or not self.last.unit else f"ETA {duration(eta)}"

    def line(self) -> str:
        """`tokenize: 1,000/6,000 (17%) after 10.0 s` of a task under way, `tokenize: 6,000 done in 1:00` of an ended one."""
        last = self.last
        if self.is_complete:
            state = f"{last.done:,}{f' {last.unit}' if last.unit else ''} done in {duration(self.elapsed)}"
        else:
            percent = f" ({last.done / last.total:.0%})" if last.total > 0 else ""
            state = f"{self.count_words()}{percent} after {duration(self.elapsed)}"
        return ", ".join(filter(None, [f"{last.task}: {state}", self.rate_words(), self.eta_words()]))
