"""The console: live on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

import rich.console

from agnews_dist.events import Event
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.terminal import TerminalDisplay


def draws(out: rich.console.Console) -> bool:
    """Whether it is a terminal that can move the cursor and has the characters to draw with."""
    return out.is_terminal and not out.is_dumb_terminal and out.encoding.startswith("utf")


class Console:
    """Sink that shows events to a person; a context manager, so that an exception finds the terminal in order.

    A terminal gets panels, tables and a live progress line; a file, a pipe, a dumb terminal or one without Unicode
    gets plain lines (see `PlainLines` for how many). `out` is where to, default standard output. `NO_COLOR` switches
    the colours off.
    """

    def __init__(
        self,
        out: rich.console.Console | None = None,
        *,
        every_step: bool = False,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if out is None:
            # FORCE_COLOR, set for other tools, must not put cursor movements into a log file.
            out = rich.console.Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
        if draws(out):
            self._sink = TerminalDisplay(out, every_step=every_step, clock=clock)
        else:
            self._sink = PlainLines(
                out.file,  # pyright: ignore[reportArgumentType] # IO[str] with an encoding is a TextIO
                every_step=every_step,
                seconds_between_lines=seconds_between_lines,
                clock=clock,
            )

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._sink(event)

    def close(self) -> None:
        """End the live display and give the terminal back; further calls do nothing."""
        self._sink.close()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
