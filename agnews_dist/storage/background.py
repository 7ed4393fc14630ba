"""A thread that writes bytes in order, so that a slow disk or a display that is not read never delays the training."""

import threading
import time
from collections import deque
from collections.abc import Callable

PATIENCE_SECONDS = 0.5
"""Longest wait of `settle`: a write usually takes microseconds, and then nothing is lost if the process is killed after it."""
IMPATIENT_SECONDS = 30.0
"""Time without such waits after one that was not enough. So waiting takes at most 2 % of a run."""
RETRY_SECONDS = 1.0
PIECE_BYTES = 1 << 16
DescribeGap = Callable[[int], bytes]


def _leave_gap(_: int) -> bytes:
    return b""


class BackgroundWriter:
    """Writer of bytes through a function such as `os.write`, in a daemon thread.

    A failed write is tried again when more comes, and every second. `put` never waits; `settle`, `wait` and `close` wait for a
    bounded time.
    """

    def __init__(
        self, write: Callable[[bytes], int], *, keep_bytes: int | None = None, describe_gap: DescribeGap = _leave_gap
    ) -> None:
        """`write` returns how many of the bytes it has written, or raises OSError.

        `keep_bytes`: while more bytes wait, the oldest contents of `put` are dropped, and the writer puts
        `describe_gap(number of lines)` in their place. None: nothing is dropped.
        """
        self._write, self._keep_bytes, self._describe_gap = write, keep_bytes, describe_gap
        self._pending: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._num_dropped = 0
        self._is_closed = False
        self._impatient_until = float("-inf")
        self._waiting_since: float | None = None
        self.num_written = 0
        """Bytes written so far."""
        self.num_pending = 0
        """Bytes that wait to be written."""
        self.error: OSError | None = None
        """Error of the last try to write; None: it succeeded, or still runs."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all `put` so far, written or not."""
        with self._changed:
            return self.num_written + self.num_pending

    @property
    def seconds_behind(self) -> float:
        """Time since the last progress while bytes wait; 0 if none wait."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def put(self, content: bytes) -> None:
        """Add bytes to be written."""
        with self._changed:
            if not content or self._is_closed:
                return
            self._pending.append(content)
            self.num_pending += len(content)
            self.error = None
            self._waiting_since = self._waiting_since or time.monotonic()
            while self._keep_bytes is not None and self.num_pending > self._keep_bytes and len(self._pending) > 1:
                dropped = self._pending.popleft()
                self.num_pending -= len(dropped)
                self._num_dropped += dropped.count(b"\n")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait a moment, if that was enough lately: usually all is written, or has failed, when this returns."""
        now = time.monotonic()
        if now >= self._impatient_until and not self.wait(PATIENCE_SECONDS) and self.error is None:
            self._impatient_until = now + IMPATIENT_SECONDS

    def wait(self, seconds: float | None) -> bool:
        """Wait until all is written, at most `seconds`, or until writing fails; return whether all is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self.num_pending or self.error is not None, seconds)
            return not self.num_pending

    def close(self, seconds: float) -> bool:
        """Wait as `wait` does and end the thread; return whether all is written. Otherwise the thread may still be writing."""
        with self._changed:
            # One more try.
            self.error = None
            self._changed.notify_all()
        is_done = self.wait(seconds)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and is_done:
            self._thread.join()
        return is_done

    def _run(self) -> None:
        piece = b""
        while True:
            with self._changed:
                if not piece:
                    self._changed.wait_for(lambda: self._pending or self._is_closed)
                    piece = self._take_piece()
                if not piece:
                    return
            try:
                count = self._write(piece)
            except OSError as error:
                with self._changed:
                    self.error = error
                    self._changed.notify_all()
                    if self._is_closed:
                        return
                    self._changed.wait(RETRY_SECONDS)
                continue
            piece = piece[count:]
            with self._changed:
                self.num_written += count
                self.num_pending -= count
                self._waiting_since = time.monotonic() if self.num_pending else None
                self.error = None
                self._changed.notify_all()

    def _take_piece(self) -> bytes:
        """Remove the oldest bytes, about PIECE_BYTES of them; empty if there are none."""
        pieces: list[bytes] = []
        if self._num_dropped:
            pieces.append(self._describe_gap(self._num_dropped))
            self._num_dropped = 0
            self.num_pending += len(pieces[0])
        while self._pending and sum(map(len, pieces)) < PIECE_BYTES:
            pieces.append(self._pending.popleft())
        return b"".join(pieces)
