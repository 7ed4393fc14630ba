"""A batch on one rank, and the shape letters of the whole package.

An array's name ends in the letters of its dimensions, in order: `tokens_BT` has the shape (B, T). Arrays of bounds
or offsets have one more entry: slice s lies between `bounds_S[s]` and `bounds_S[s + 1]`.

    data        N  examples of a split                C  classes                   V  entries of the vocabulary
    batch       B  examples of a batch: of the micro-batch in tensors, of the global batch in a plan
                T  padded tokens per example          P  tokens of several examples end to end, without padding
    model       D  width                              H  attention heads           E  width of one head
    plan        E  epochs                             K  steps                     W  windows of examples sorted by length
    shares      M  micro-batches of a step            R  ranks                     S  slices of a global batch
    features    S  segments, stored as a whole

`num_` is a count. `local_` is this rank's part, `global_` the sum over all ranks.

    split (N) -> plan of an epoch (W, K) -> global batch (B) -> share (S = M x R) -> `Batch` (B, T)
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, right-padded, on the device.

    A rank without an example in a micro-batch gets a filler row: one pad token of weight 0. It must take part in the step, and
    Hugging Face's blocks refuse a batch of 0 rows.
    """

    tokens_BT: Tensor
    """int64; positions at or beyond the length hold the pad id. With causal attention no real token attends to them."""
    lengths_B: Tensor
    """int64, >= 1; the last real token of example b is at `lengths_B[b] - 1`."""
    labels_B: Tensor
    """int64 class indices."""
    weights_B: Tensor
    """float32; 1 for an example of the global batch, 0 for a filler row."""
    ids_B: Tensor
    """int64 row numbers in the split; -1 for a filler row."""
