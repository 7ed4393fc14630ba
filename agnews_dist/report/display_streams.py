"""Standard streams that never delay the training: a display that is not read, a closed pipe, streams closed from the start."""

import errno
import io
import os
import select
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TextIO

from agnews_dist.errors import count_noun
from agnews_dist.storage.background import BackgroundWriter

KEEP_BYTES = 1 << 15
"""Text kept for a display that is not read. Older lines are dropped."""
LIVE_LINES = 11
"""Lines of the live display on a terminal, at most."""
LAST_SECONDS = 10.0
"""Longest wait at the end for a display that is not read."""
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Errors of a pipe or terminal that will never be read again: the run continues without it."""
_MODES = (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))


class DisplayStream(io.TextIOBase):
    """Text stream in place of standard output or standard error. A thread writes; without a reader, old lines are dropped."""

    def __init__(self, stream: TextIO, writer: BackgroundWriter) -> None:
        """`writer`: shared by streams of one file, so that their lines keep their order."""
        self._stream, self._writer = stream, writer
        self._begun = ""
        self._guard = threading.Lock()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # typeshed has an attribute
        """Encoding of the stream that this one replaces."""
        return self._stream.encoding

    @property
    def is_read(self) -> bool:
        """True unless text waits for a reader: a picture that the next one replaces is of no use then."""
        return self._writer.num_pending == 0

    def fileno(self) -> int:
        """Return the file descriptor, for the size of the terminal."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Pass whole lines to the thread: `print` writes a line's end on its own, and processes share the display."""
        with self._guard:
            lines, newline, self._begun = (self._begun + text).rpartition("\n")
            self._writer.put((lines + newline).encode(self.encoding, "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Pass also a line without its end, and give the thread a moment."""
        with self._guard:
            text, self._begun = self._begun, ""
            self._writer.put(text.encode(self.encoding, "backslashreplace"))
        self._writer.settle()


def describe_gap(number: int, *, is_terminal: bool) -> bytes:
    """Describe lines that a display lacks, below the live display of a terminal, which the next text erases."""
    verb = "is" if number == 1 else "are"
    text = f"... {count_noun(number, 'line')} of this output {verb} missing here: it was not read for a while\n"
    return (f"\n{text}" + "\n" * LIVE_LINES if is_terminal else text).encode()


def open_missing_streams() -> None:
    """Open /dev/null in place of standard streams that are closed: the next file opened would get their number."""
    for number, (name, mode) in enumerate(_MODES):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, mode)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            # Not closed at exit: the number stays taken.
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))


@contextmanager
def background_streams(*names: str) -> Generator[None]:
    """Replace `stdout` or `stderr` by DisplayStreams in this context, unless they are not those of the process.

    Those of a notebook have the file number of its server's log, and those of tests none.
    """
    writers: dict[tuple[int, int], BackgroundWriter] = {}
    replaced: list[tuple[str, TextIO, DisplayStream]] = []
    for name in names:
        stream: TextIO = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        try:
            status = os.fstat(stream.fileno())
        except (OSError, ValueError):
            continue
        with suppress(OSError):
            stream.flush()
        key = (status.st_dev, status.st_ino)
        if key not in writers:
            gap = partial(describe_gap, is_terminal=stream.isatty())
            writers[key] = BackgroundWriter(_Descriptor(stream.fileno()).write, keep_bytes=KEEP_BYTES, describe_gap=gap)
        replaced.append((name, stream, DisplayStream(stream, writers[key])))
        setattr(sys, name, replaced[-1][2])
    try:
        yield
    finally:
        for name, stream, display in replaced:
            if getattr(sys, name) is display:
                setattr(sys, name, stream)
            display.flush()
        for writer in writers.values():
            writer.close(LAST_SECONDS)


class _Descriptor:
    """A file descriptor that becomes silent once nothing can read it any more."""

    def __init__(self, number: int) -> None:
        self._number, self._is_gone = number, False

    def write(self, content: bytes) -> int:
        """Write some of the bytes; return their number."""
        if self._is_gone:
            return len(content)
        try:
            return os.write(self._number, content)
        except BlockingIOError:
            select.select([], [self._number], [], 1.0)
            return 0
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._is_gone = True
            return len(content)
