"""From the hidden states of a text to one row: the last real token's, or the mean over all real tokens.

The mean is taken after the final norm: mean_t ln_f(h_t). That norm normalises each token, and then applies a gain and a shift.
Both are affine, so they commute with the mean: mean_t (gain n_t + shift) = gain mean_t n_t + shift. So the mean of the
normalised states n_t depends on no weight, and can be kept as a feature where no block above is trained.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Pooling = Literal["last", "mean"]


class GainAndShift(nn.LayerNorm):
    """Gain and shift of a layer norm, with its parameters under the same names, for rows that are normalised already.

    It is a module because FSDP and ZeRO gather sharded weights when a module is called.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(list(norm.normalized_shape), eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight + self.bias


def average_padded(hidden_BTD: Tensor, lengths_B: Tensor, eps: float) -> Tensor:
    """Return the mean of the normalised hidden states over the real tokens of right-padded texts: mean_BD."""
    normed_BTD = functional.layer_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=eps)
    is_padding_BT = torch.arange(hidden_BTD.shape[1], device=lengths_B.device) >= lengths_B[:, None]
    return normed_BTD.masked_fill(is_padding_BT[:, :, None], 0).sum(dim=1) / lengths_B[:, None]


def average_packed(hidden_PD: Tensor, lengths_B: Sequence[int], eps: float) -> Tensor:
    """Return the mean of the normalised hidden states of each text of a pack: mean_BD, in the type of `hidden_PD`.

    Neighbours of equal length are one sum, so a mean does not depend on the other texts.
    """
    normed_PD = functional.layer_norm(hidden_PD.float(), hidden_PD.shape[-1:], eps=eps)
    means: list[Tensor] = []
    begin = 0
    for length, run in groupby(lengths_B):
        num_texts = sum(1 for _ in run)
        rows_PD = normed_PD[begin : begin + num_texts * length]
        means.append(rows_PD.view(num_texts, length, -1).mean(dim=1))
        begin += num_texts * length
    return torch.cat(means).to(hidden_PD.dtype)
