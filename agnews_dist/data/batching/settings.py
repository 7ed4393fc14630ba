"""Inputs of a plan: lengths of the texts, and the settings that decide the global batches. Pure numpy."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import UserError

CHUNK_SIZE = 1 << 20
"""Examples per chunk in passes over all lengths, which may be memory-mapped."""


class Lengths(Protocol):
    """Tokens per example: a numpy array, memory-mapped or not, or any object with the same indexing."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return the lengths of a slice or of an integer array of examples."""
        ...


def as_lengths(lengths: Any) -> Lengths:
    """Convert a list, tensor or series to an array; return anything else unchanged."""
    if isinstance(lengths, list | tuple) or (hasattr(lengths, "__array__") and not isinstance(lengths, np.ndarray)):
        return np.asarray(lengths) if len(lengths) else np.zeros(0, np.int64)
    return lengths


def check_integers(lengths: NDArray[Any]) -> None:
    """Check that `lengths` has one dimension and an integer type.

    Raises:
        UserError: it does not.
    """
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise UserError(
            f"lengths of {lengths.ndim} dimension(s) and type {lengths.dtype}: examples would be lost or miscounted. "
            "Give one whole number of tokens per example."
        )


def iterate_chunks(lengths: Lengths) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (first example, lengths) of every chunk of `CHUNK_SIZE` examples."""
    for begin in range(0, len(lengths), CHUNK_SIZE):
        yield begin, np.asarray(lengths[begin : begin + CHUNK_SIZE])


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings that decide the global batches, together with the lengths and the epoch.

    Raises:
        UserError: a value is out of range.
    """

    global_batch_size: int = 32
    """Examples per global batch; one batch of the epoch holds the remainder."""
    global_token_budget: int | None = None
    """Maximum of real tokens per global batch, with any number of examples; replaces `global_batch_size`."""
    bucket_window: int | Literal["epoch"] = 256
    """Approximate number of global batches within which examples are sorted by length. 1: random batches. 'epoch': one window;
    the rarest lengths, above all the longest, can then meet the same examples in every epoch."""
    seed: int = 0
    block_size: int = 1
    """Neighbouring examples that are shuffled together; above 1 for data sets larger than memory."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "seed" else 1
            if (name, value) in (("global_token_budget", None), ("bucket_window", "epoch")):
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                also = " (or 'epoch')" if name == "bucket_window" else ""
                raise UserError(f"{name} {value!r}: out of range. Set a whole number of at least {least}{also}.")
            # Python's own int, because numpy's cannot be written into the JSON of a saved position.
            object.__setattr__(self, name, operator.index(value))
