"""A GPT-2 block for the last real token only: all that a classifier reads of its last block, at a fraction of the cost.

With one query per text, the key and value projections move out of the sums over tokens. Per head, with the block's normalised
input h_t and attention weights a_t,

    score_t = q . (h_t W_k + b_k) = (q W_k^T) . h_t + a constant, which does not change the softmax
    out     = sum_t a_t (h_t W_v + b_v) = (sum_t a_t h_t) W_v + (sum_t a_t) b_v

So a token costs 2 d multiply-adds per head instead of 12 d^2, and W_k and W_v multiply one row per text. The norm's gain and
shift move out in the same way (h_t = gain n_t + shift). Without dropout, sum_t a_t is 1.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from agnews_dist.model.dropout import apply_dropout
from agnews_dist.model.packed import find_runs, fuse_activation, score_factor

ATTENTION_WEIGHTS, ATTENTION_OUTPUT, MLP_OUTPUT = 0, 1, 2
"""Sites of the block's three dropouts (see `apply_dropout`)."""
TEXTS_PER_GROUP = 8
"""Texts of equal length that `run_last_tokens` runs at once. The number of texts and the padding move the last bits."""


def run_last_token_block(block: Any, hidden_BTD: Tensor, lengths_B: Tensor, keys_B: Tensor | None = None) -> Tensor:
    """Run one of Hugging Face's blocks for the last real token of right-padded hidden_BTD; return last_BD.

    Parameters, gradients and places of dropout are the same as Hugging Face's. The gradient of the key's bias is exactly zero,
    as in exact arithmetic. `lengths_B` counts real tokens, >= 1. The padding must be finite and has no influence. `keys_B` are
    the keys of the dropout masks (see `example_keys`); None draws the masks from torch's random state.
    """
    norm, attention, mlp = block.ln_1, block.attn, block.mlp
    num_texts, num_tokens, width = hidden_BTD.shape
    heads = (-1, attention.num_heads, attention.head_dim)
    last_BD = select_last_rows(hidden_BTD, lengths_B)
    query_w, key_w, value_w = attention.c_attn.weight.split(width, dim=1)
    query_b, _, value_b = attention.c_attn.bias.split(width)

    normed_BTD = functional.layer_norm(hidden_BTD, (width,), eps=norm.eps)
    query_BHE = functional.linear(norm(last_BD), query_w.t(), query_b).view(heads)
    probe_BHD = torch.einsum("bhe,dhe->bhd", query_BHE, key_w.view(heads)) * norm.weight
    scores_BHT = torch.matmul(probe_BHD.to(normed_BTD.dtype), normed_BTD.transpose(1, 2)) * score_factor(attention)
    is_padding_BT = torch.arange(num_tokens, device=lengths_B.device) >= lengths_B[:, None]
    weights_BHT = scores_BHT.masked_fill(is_padding_BT[:, None], -math.inf).softmax(dim=-1)
    weights_BHT = _apply_module_dropout(attention.attn_dropout, weights_BHT, keys_B, ATTENTION_WEIGHTS)

    sum_BH1 = weights_BHT.sum(dim=-1, keepdim=True)
    mean_BHD = torch.matmul(weights_BHT, normed_BTD) * norm.weight + sum_BH1 * norm.bias
    out_BHE = torch.einsum("bhd,dhe->bhe", mean_BHD, value_w.view(heads)) + sum_BH1 * value_b.view(heads)
    attended_BD = attention.c_proj(out_BHE.reshape(num_texts, width))
    last_BD = last_BD + _apply_module_dropout(attention.resid_dropout, attended_BD, keys_B, ATTENTION_OUTPUT)
    inner = fuse_activation(mlp.act)(mlp.c_fc(block.ln_2(last_BD)))
    return last_BD + _apply_module_dropout(mlp.dropout, mlp.c_proj(inner), keys_B, MLP_OUTPUT)


def run_last_tokens(block: Any, hidden_PD: Tensor, lengths_B: Sequence[int]) -> Tensor:
    """Run a block in eval mode for the last token of each text of a pack, so that no text depends on its mates; last_BD.

    All shapes depend on the text's own length alone: groups of equal length, filled up with zeros.
    """
    groups: list[Tensor] = []
    begin = 0
    for num_texts, length in find_runs(lengths_B):
        lengths_G = torch.full((TEXTS_PER_GROUP,), length, device=hidden_PD.device)
        for hidden_GTD in hidden_PD[begin : begin + num_texts * length].view(num_texts, length, -1).split(TEXTS_PER_GROUP):
            filled_GTD = functional.pad(hidden_GTD, (0, 0, 0, 0, 0, TEXTS_PER_GROUP - len(hidden_GTD)))
            groups.append(run_last_token_block(block, filled_GTD, lengths_G)[: len(hidden_GTD)])
        begin += num_texts * length
    return torch.cat(groups)


def select_last_rows(hidden_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the row of each text's last real token: last_BD."""
    return hidden_BTD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]


def _apply_module_dropout(dropout: nn.Dropout, values: Tensor, keys_B: Tensor | None, site: int) -> Tensor:
    if keys_B is None or not dropout.training:
        return cast(Tensor, dropout(values))
    return apply_dropout(values, keys_B, site, dropout.p)
