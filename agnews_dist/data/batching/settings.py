"""What a plan is made from: the lengths of the texts and the settings that decide the global batches. Pure numpy."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import UserError

_CHUNK = 1 << 20


class Lengths(Protocol):
    """Tokens per example: a numpy array, memory-mapped or not, or whatever can be indexed like one."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Lengths of a slice or of an integer array of examples."""
        ...


def as_lengths(lengths: Any) -> Lengths:
    """A list, tensor or series as an array; an array, and what can be indexed like one, as it is."""
    if isinstance(lengths, list | tuple) or (hasattr(lengths, "__array__") and not isinstance(lengths, np.ndarray)):
        return np.asarray(lengths) if len(lengths) else np.zeros(0, np.int64)
    return lengths


def check_whole(lengths: NDArray[Any]) -> None:
    """Refuse what is not a row of whole numbers.

    Raises:
        UserError: says what it is.
    """
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise UserError(
            f"lengths of {lengths.ndim} dimension(s) and type {lengths.dtype}: examples would be lost or counted wrong. Give "
            "one whole number of tokens per example."
        )


def chunks(lengths: Lengths) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first example, lengths) piece by piece, for what has to look at all of them."""
    for begin in range(0, len(lengths), _CHUNK):
        yield begin, np.asarray(lengths[begin : begin + _CHUNK])


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What decides the global batches, apart from the lengths and the epoch.

    Raises:
        UserError: a value out of range, or blocks too large for the windows.
    """

    global_batch_size: int = 32
    """Examples per global batch; one batch of the epoch holds the remainder."""
    global_token_budget: int | None = None
    """At most so many real tokens per global batch, whatever the number of examples; replaces global_batch_size."""
    bucket_window: int | Literal["epoch"] = 256
    """Global batches within which examples are sorted by length, about: 1 is random batches. 'epoch' sorts all; then the
    rarest lengths, the longest above all, can meet the same batch mates in every epoch."""
    seed: int = 0
    block_size: int = 1
    """Neighbouring examples that are shuffled together; above 1 for data sets beyond memory."""

    def __post_init__(self) -> None:
        for name, least in (
            ("global_batch_size", 1),
            ("global_token_budget", 1),
            ("bucket_window", 1),
            ("block_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if (name, value) in (("global_token_budget", None), ("bucket_window", "epoch")):
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                also = " (or 'epoch')" if name == "bucket_window" else ""
                raise UserError(
                    f"{name} {value!r}: no plan can be made of it. Set a whole number of at least {least}{also}."
                )
            # As Python's own int: numpy's would not go into the JSON of a saved position.
            object.__setattr__(self, name, operator.index(value))
