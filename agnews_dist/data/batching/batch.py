"""A batch on one rank, and the legend of the shape letters used in names all over the package.

    B  examples in a batch (tensors: in the local micro-batch; plan: in the global batch)
    T  padded tokens per example              D  model width
    N  examples in a split                    C  classes
    K  steps        W  windows of the plan    E  epochs
    S  slices       M  micro-batches          R  ranks

`tokens_BT` is a tensor of shape (B, T). `local_` means this rank's share, `global_` the sum over ranks.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, right-padded, on the device."""

    tokens_BT: Tensor
    """int64; positions at or beyond the length hold the pad id, which no real token ever attends to."""
    lengths_B: Tensor
    """int64, >= 1; the last real token of example b is at `lengths_B[b] - 1`."""
    labels_B: Tensor
    """int64 class indices."""
    weights_B: Tensor
    """float32; 1 for an example of the global batch, 0 for the filler row of a rank that has nothing to do."""
    ids_B: Tensor
    """int64 row numbers in the split; -1 for a filler row."""
