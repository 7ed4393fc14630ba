"""How text and numbers are put into words, the same in plain lines, on the terminal and in the model card."""

import math
import re

from agnews_dist.errors import name_ids
from agnews_dist.events import CheckpointSaved, NonFinite, Resumed

# What would move the cursor, ring the bell or turn the reading direction of a terminal; tab and newline stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str, encoding: str) -> str:
    """`text` with control characters, and what `encoding` cannot hold, as backslash escapes: safe to print anywhere.

    >>> visible("a \\x1b[31m red \\u2713 tick", "ascii")
    'a \\\\x1b[31m red \\\\u2713 tick'
    """
    escaped = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; a short time with a decimal.

    >>> duration(3.21), duration(75), duration(7384)
    ('3.2 s', '1:15', '2:03:04')
    """
    if seconds < 60 and round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(value: float) -> str:
    """A figure between 0 and 1 with three decimals; `-` for NaN, a ratio of nothing.

    >>> share(0.5), share(float("nan"))
    ('0.500', '-')
    """
    return "-" if math.isnan(value) else f"{value:.3f}"


def happened(event: NonFinite | Resumed | CheckpointSaved) -> str:
    """One line about what interrupts a training, or guards it."""
    match event:
        case NonFinite():
            return f"step {event.step} made no update: a loss or gradient was not finite, from {name_ids(event.ids)}"
        case Resumed():
            return f"goes on from step {event.step}, attempt {event.attempt}: {event.path}"
        case CheckpointSaved():
            return (
                f"step {event.step} saved: {event.num_bytes / 1e6:,.1f} MB in {duration(event.seconds)}, training stood still "
                f"for {1000 * event.stall:.0f} ms"
            )


def when(split: str, epoch: int) -> str:
    """Which evaluation: `epoch 2 validation`, or only the split outside training (epoch 0)."""
    return f"epoch {epoch} {split}" if epoch else split
