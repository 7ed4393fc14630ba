"""Progress of training steps and of long tasks: smoothed loss, rate, time left."""

from collections import deque
from collections.abc import Callable

from agnews_dist.events import Progress, StepDone
from agnews_dist.report.formatting import format_duration

WINDOW = 20
"""Steps over which loss and tokens/s are averaged."""
MIN_RATE_SECONDS = 0.1
"""Shortest time over which a rate is computed."""


class StepProgress:
    """Progress of a training of `num_steps` steps (0: unknown)."""

    def __init__(self, num_steps: int, clock: Callable[[], float]) -> None:
        self.num_steps, self._clock = num_steps, clock
        self._recent: deque[StepDone] = deque(maxlen=WINDOW)
        self._first: tuple[int, float] | None = None

    @property
    def has_steps(self) -> bool:
        return bool(self._recent)

    @property
    def last(self) -> StepDone:
        return self._recent[-1]

    @property
    def is_complete(self) -> bool:
        """True after the last step of the run."""
        return self.last.step == self.num_steps

    def add(self, event: StepDone) -> None:
        self._recent.append(event)
        if self._first is None:
            # The first step includes warm-up, so the time left is computed from its end.
            self._first = (event.step, self._clock())

    @property
    def eta(self) -> float | None:
        """Seconds until the last step, evaluations included; None: unknown."""
        if self._first is None or self.num_steps <= 0:
            return None
        first_step, first_time = self._first
        since = self.last.step - first_step
        if since <= 0:
            return None
        return (self._clock() - first_time) / since * max(self.num_steps - self.last.step, 0)

    def format_figures(self, *, exact: bool = False) -> list[str]:
        """Format the figures as short texts. `exact`: the newest step's loss instead of the mean."""
        mean_loss = sum(event.loss for event in self._recent) / len(self._recent)
        seconds = sum(event.seconds for event in self._recent)
        tokens_per_second = sum(event.num_tokens for event in self._recent) / seconds if seconds > 0 else 0.0
        return [
            f"epoch {self.last.epoch}",
            f"loss {self.last.loss:.4f}" if exact else f"mean loss {mean_loss:.4f}",
            f"lr {self.last.lr:.2e}",
            "update skipped" if self.last.grad_norm is None else f"grad norm {self.last.grad_norm:.3g}",
            f"{tokens_per_second:,.0f} tokens/s",
        ]

    def format_step(self) -> str:
        """Format `step 12/375`, with the number padded for alignment."""
        total = str(self.num_steps)
        return f"step {self.last.step:>{len(total)}}/{total}" if self.num_steps else f"step {self.last.step}"

    def format_eta(self) -> str | None:
        """Format `ETA 0:42`; None if it is unknown or the training is complete."""
        return None if self.eta is None or self.is_complete else f"ETA {format_duration(self.eta)}"


class TaskProgress:
    """Progress of one long task. Work of the first report was already done and does not count for the rate."""

    def __init__(self, first: Progress, clock: Callable[[], float]) -> None:
        self.last, self._clock, self._started = first, clock, clock()
        self._base = (self._started, first.done)

    def add(self, event: Progress) -> None:
        self.last = event
        now = self._clock()
        if now - self._started < MIN_RATE_SECONDS:
            # Work that was already done may be reported in pieces. Counting it would make the rate too high.
            self._base = (now, event.done)

    @property
    def is_complete(self) -> bool:
        """True when all work is done; always False if the total is unknown."""
        return 0 < self.last.total <= self.last.done

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started

    @property
    def rate(self) -> float | None:
        """Units per second; None: unknown."""
        base_time, base_done = self._base
        seconds, done = self._clock() - base_time, self.last.done - base_done
        return done / seconds if done > 0 and seconds >= MIN_RATE_SECONDS else None

    @property
    def eta(self) -> float | None:
        """Seconds until all work is done; None: unknown."""
        rate = self.rate
        return (self.last.total - self.last.done) / rate if rate and self.last.total > 0 else None

    def format_count(self) -> str:
        """Format `1,000/6,000 tokens`."""
        total = f"/{self.last.total:,}" if self.last.total > 0 else ""
        return f"{self.last.done:,}{total} {self.last.unit}".rstrip()

    def format_rate(self) -> str | None:
        """Format `12,345 tokens/s`; None if it is unknown or the task has no unit."""
        rate = self.rate
        return None if rate is None or not self.last.unit else f"{rate:,.0f} {self.last.unit}/s"

    def format_eta(self) -> str | None:
        """Format `ETA 0:42`; None if it is unknown, the task is complete or has no unit."""
        eta = self.eta
        return None if eta is None or self.is_complete or not self.last.unit else f"ETA {format_duration(eta)}"

    def format_line(self) -> str:
        """Format `tokenize: 1,000/6,000 (17%) after 10.0 s`, or at the end `tokenize: 6,000 done in 1:00`."""
        last = self.last
        if self.is_complete:
            state = f"{f'{last.done:,} {last.unit}'.rstrip()} done in {format_duration(self.elapsed)}"
        else:
            percent = f" ({last.done / last.total:.0%})" if last.total > 0 else ""
            state = f"{self.format_count()}{percent} after {format_duration(self.elapsed)}"
        return ", ".join(filter(None, [f"{last.task}: {state}", self.format_rate(), self.format_eta()]))
