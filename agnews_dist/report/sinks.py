"""Several sinks as one: what a story emits into."""

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

from agnews_dist.events import Event, Warned


class Sink(Protocol):
    """Consumes events until it is closed."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Release what the sink holds."""
        ...


class Sinks:
    """Passes every event to each sink, in the order they were added; with none it is silent (ranks other than 0).

    A sink that cannot write, to a full disk for example, does not end the run: the others are told, once.
    """

    def __init__(self) -> None:
        self._sinks: list[Callable[[Event], None]] = []
        self._stack = ExitStack()
        self._failing: set[int] = set()

    def add(self, sink: Sink) -> None:
        """From now on `sink` gets every event; it is closed with this object."""
        self._sinks.append(sink)
        self._stack.callback(sink.close)

    def __call__(self, event: Event) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                sink(event)
            except OSError as error:
                if number not in self._failing:
                    self._failing.add(number)
                    self._tell_others(number, error)
            else:
                self._failing.discard(number)

    def _tell_others(self, failing: int, error: OSError) -> None:
        message = (
            f"{error.filename or type(self._sinks[failing]).__name__} cannot be written ({error.strerror or error}): what the "
            "run says now is kept in memory and written when it can be. Free some space there."
        )
        for number, sink in enumerate(self._sinks):
            if number not in self._failing:
                sink(Warned(message=message))

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
