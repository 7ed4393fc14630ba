"""Progress of training steps: smoothed loss, rates, time left, the losses so far as a sparkline."""

import math
from collections import deque
from collections.abc import Callable

from agnews_dist.events import StepDone
from agnews_dist.report.formatting import format_duration

WINDOW = 20
"""Steps over which loss, tokens/s and examples/s are averaged."""
BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 20
"""Blocks of a sparkline, at most."""


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

    @property
    def mean_loss(self) -> float:
        """Mean loss of the last steps."""
        return sum(event.loss for event in self._recent) / len(self._recent)

    def format_rates(self) -> list[str]:
        """Format tokens/s and examples/s of the last steps."""
        seconds = sum(event.seconds for event in self._recent)
        counts = {unit: sum(getattr(event, f"num_{unit}") for event in self._recent) for unit in ("tokens", "examples")}
        return [f"{count / seconds if seconds > 0 else 0.0:,.0f} {unit}/s" for unit, count in counts.items()]

    def format_state(self) -> list[str]:
        """Format epoch, learning rate and gradient norm of the last step."""
        norm = self.last.grad_norm
        grad_norm = "update skipped" if norm is None else f"grad norm {norm:.3g}"
        return [f"epoch {self.last.epoch}", f"lr {self.last.lr:.2e}", grad_norm]

    def format_figures(self, *, exact: bool = False) -> list[str]:
        """Format all figures as short texts. `exact`: the newest step's loss instead of the mean."""
        epoch, *state = self.format_state()
        loss = f"loss {self.last.loss:.4f}" if exact else f"mean loss {self.mean_loss:.4f}"
        return [epoch, loss, *state, *self.format_rates()]

    def format_step(self) -> str:
        """Format `step 12/375`, with the number padded for alignment."""
        total = str(self.num_steps)
        return f"step {self.last.step:>{len(total)}}/{total}" if self.num_steps else f"step {self.last.step}"

    def format_eta(self) -> str | None:
        """Format `ETA 0:42`; None if it is unknown or the training is complete."""
        return None if self.eta is None or self.is_complete else f"ETA {format_duration(self.eta)}"


class LossHistory:
    """The losses of a whole training in few numbers: means of steps that follow each other."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._steps_per_mean = 1
        self._num_open = 0
        """Steps in the last sum."""

    def add(self, loss: float) -> None:
        """Add the loss of a step. One that is not finite is left out."""
        if not math.isfinite(loss):
            return
        if not self._sums or self._num_open == self._steps_per_mean:
            if len(self._sums) == SPARKLINE_WIDTH:
                self._sums = [sum(self._sums[i : i + 2]) for i in range(0, SPARKLINE_WIDTH, 2)]
                self._steps_per_mean *= 2
            self._sums.append(0.0)
            self._num_open = 0
        self._sums[-1] += loss
        self._num_open += 1

    def draw(self) -> str:
        """Draw the means as blocks of eight heights, the oldest first."""
        if not self._sums:
            return ""
        means = [*(total / self._steps_per_mean for total in self._sums[:-1]), self._sums[-1] / self._num_open]
        low, high = min(means), max(means)
        scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
