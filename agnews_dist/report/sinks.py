"""Several sinks as one: what a story emits into."""

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

from agnews_dist.events import Event


class Sink(Protocol):
    """Consumes events until it is closed."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Release what the sink holds."""
        ...


class Sinks:
    """Passes every event to each sink, in the order they were added; with none it is silent (ranks other than 0)."""

    def __init__(self) -> None:
        self._sinks: list[Callable[[Event], None]] = []
        self._stack = ExitStack()

    def add(self, sink: Sink) -> None:
        """From now on `sink` gets every event; it is closed with this object."""
        self._sinks.append(sink)
        self._stack.callback(sink.close)

    def __call__(self, event: Event) -> None:
        for sink in self._sinks:
            sink(event)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
