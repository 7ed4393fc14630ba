"""Errors that the user can fix, and text that their messages share.

Every message reads `<what is wrong, with the value>: <why it matters>. <what to do>.` A bug of this package is never one of
these errors: it keeps its traceback.
"""

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """An error that the user can fix; commands print its message without a traceback and exit with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """Wrong settings, one per line."""

    exit_code = 2


class DataError(UserError):
    """Wrong text, labels or source of data; the message names file and row."""


class ModelError(UserError):
    """A wrong model or tokenizer directory."""


class SharedError(UserError):
    """An error that all ranks raise together, so that none waits for another; rank 0 prints it with the rank that had it."""

    def __init__(self, message: str, rank: int, exit_code: int = 1, kind: type[UserError] | None = None) -> None:
        """`rank`: the one that had the error; `kind`: the class of its error, if it was not this one."""
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code
        self.kind = kind

    @property
    def original(self) -> UserError:
        """The error as its rank had it."""
        return self if self.kind is None else self.kind(str(self))


class AlreadyFinished(SharedError):  # noqa: N818
    """The end of a command with nothing left to do; rank 0 prints it, and the exit code is 0."""

    def __init__(self, message: str) -> None:
        super().__init__(message, rank=0, exit_code=0)


class Stopped(Exception):  # noqa: N818
    """The end of a run that all ranks have agreed to stop early; its checkpoint is saved."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` with the valid name nearest to `wrong`, or an empty string.

    >>> did_you_mean("optim.lrr", ["optim.lr", "run.seed"])
    " Did you mean 'optim.lr'?"
    """
    from difflib import get_close_matches  # late: imported by every command, needed by few

    close = get_close_matches(wrong, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def quote(text: str) -> str:
    """Return the text in quotes, cut to a length that a message can show.

    >>> quote("a" * 70)[-10:]
    "aaaaaa'..."
    """
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def shorten(text: str, most: int) -> str:
    """Cut the middle out of a text of more than `most` characters. Long names often differ at their end.

    >>> shorten("level one / level two / level three", 20)
    'level on...el three'
    """
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def count_noun(number: int, noun: str) -> str:
    """Format a count with its noun: `1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def find_nearest(wrong: str, valid: Iterable[str]) -> list[str]:
    """Return the dotted names or flags nearest to `wrong`: those with the same last part, or else the most similar one.

    >>> find_nearest("--lr", ["--optim.lr", "--run.seed"])
    ['--optim.lr']
    """
    from difflib import get_close_matches

    by_last_part: dict[str, list[str]] = {}
    for name in valid:
        by_last_part.setdefault(_last_part(name), []).append(name)
    if _last_part(wrong) in by_last_part:
        return by_last_part[_last_part(wrong)]
    if "." in wrong:
        return get_close_matches(wrong, [name for names in by_last_part.values() for name in names], n=1)
    return [name for part in get_close_matches(_last_part(wrong), by_last_part, n=1) for name in by_last_part[part]]


def _last_part(name: str) -> str:
    return name.lstrip("-").replace("-", "_").rsplit(".", 1)[-1]


NUM_NAMED_IDS = 20
"""Examples that a message names; events.jsonl has all of them."""


def format_ids(ids: Sequence[int]) -> str:
    """Format the first ids and the number of the others.

    >>> format_ids([3, 7]), format_ids(range(22))[-17:]
    ('examples 3, 7', '18, 19 and 2 more')
    """
    more = f" and {len(ids) - NUM_NAMED_IDS} more" if len(ids) > NUM_NAMED_IDS else ""
    return f"examples {', '.join(map(str, ids[:NUM_NAMED_IDS]))}{more}"
