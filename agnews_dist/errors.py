"""Errors a user can mend, all of one form, and the nearest-name hint they share.

Every message reads `<what is wrong, with the value>: <why it matters>. <what to do>.` A bug of ours is never one of
these: it keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Something the user can mend; the stories print the message without a traceback and exit with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """One or more wrong settings, all of them in one message."""

    exit_code = 2


class DataError(UserError):
    """A fault of the text, the labels or the place they come from; names file and row."""


class ModelError(UserError):
    """A fault of a model or tokenizer directory."""


class SharedError(UserError):
    """Raised by all ranks together, so that none is left waiting; rank 0 tells the user which rank saw it."""

    def __init__(self, message: str, rank: int, exit_code: int = 1) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


class Done(SharedError):  # noqa: N818
    """Nothing is left to do: told like an error, by rank 0, and no failure."""

    def __init__(self, message: str) -> None:
        super().__init__(message, rank=0, exit_code=0)


class Stopped(Exception):  # noqa: N818
    """All ranks have agreed to stop before the end; whatever was to be saved is saved."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the valid name nearest to `wrong`, or an empty string.

    >>> did_you_mean("optim.lrr", ["optim.lr", "run.seed"])
    " Did you mean 'optim.lr'?"
    """
    close = difflib.get_close_matches(wrong, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def name_ids(ids: Sequence[int]) -> str:
    """The first of them, and how many more there are.

    >>> name_ids([3, 7]), name_ids(range(22))[-20:]
    ('examples 3, 7', '18, 19 and 2 more')
    """
    more = f" and {len(ids) - NAMED_IDS} more" if len(ids) > NAMED_IDS else ""
    return f"examples {', '.join(map(str, ids[:NAMED_IDS]))}{more}"


NAMED_IDS = 20
"""Offending examples that a line names; events.jsonl has all of them."""
