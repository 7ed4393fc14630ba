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
TEXTS_PER_GROUP, ROWS_PER_PRODUCT = {"cpu": 8, "cuda": 64}, {"cpu": 16, "cuda": 512}
"""Shapes of `run_last_tokens`. Other numbers of texts, and padding, may move the last bits."""


def run_last_token_block(block: Any, hidden_BTD: Tensor, lengths_B: Tensor, keys_B: Tensor | None = None) -> Tensor:
    """Run one of Hugging Face's blocks for the last real token of right-padded hidden_BTD; return last_BD.

    Parameters, gradients and places of dropout are the same as Hugging Face's. The gradient of the key's bias is exactly zero,
    as in exact arithmetic. `lengths_B` counts real tokens, >= 1. The padding must be finite and has no influence. `keys_B` are
    the keys of the dropout masks (see `example_keys`); None draws the masks from torch's random state.
    """
    last_BD = select_last_rows(hidden_BTD, lengths_B)
    mean_BHD, sum_BH1 = _attend(block, _make_probe(block, last_BD), hidden_BTD, lengths_B, keys_B)
    return _finish(block, last_BD, mean_BHD, sum_BH1, keys_B)


def _make_probe(block: Any, last_BD: Tensor) -> Tensor:
    """Return probe_BHD, whose product with a token's normalised input is its score."""
    norm, attention = block.ln_1, block.attn
    heads = (-1, attention.num_heads, attention.head_dim)
    query_w, key_w, _ = attention.c_attn.weight.split(last_BD.shape[1], dim=1)
    query_b = attention.c_attn.bias[: last_BD.shape[1]]
    query_BHE = functional.linear(norm(last_BD), query_w.t(), query_b).view(heads)
    return torch.einsum("bhe,dhe->bhd", query_BHE, key_w.view(heads)) * norm.weight


def _attend(
    block: Any, probe_BHD: Tensor, hidden_BTD: Tensor, lengths_B: Tensor, keys_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each head's weighted mean of the block's input, normalised, and the sum of its weights."""
    norm, attention = block.ln_1, block.attn
    normed_BTD = functional.layer_norm(hidden_BTD, hidden_BTD.shape[2:], eps=norm.eps)
    scores_BHT = torch.matmul(probe_BHD.to(normed_BTD.dtype), normed_BTD.transpose(1, 2)) * score_factor(attention)
    is_padding_BT = torch.arange(hidden_BTD.shape[1], device=lengths_B.device) >= lengths_B[:, None]
    weights_BHT = scores_BHT.masked_fill(is_padding_BT[:, None], -math.inf).softmax(dim=-1)
    weights_BHT = _apply_module_dropout(attention.attn_dropout, weights_BHT, keys_B, ATTENTION_WEIGHTS)
    sum_BH1 = weights_BHT.sum(dim=-1, keepdim=True)
    return torch.matmul(weights_BHT, normed_BTD) * norm.weight + sum_BH1 * norm.bias, sum_BH1


def _finish(block: Any, last_BD: Tensor, mean_BHD: Tensor, sum_BH1: Tensor, keys_B: Tensor | None) -> Tensor:
    """Run the block from the attention's weights on."""
    attention, mlp = block.attn, block.mlp
    heads = (-1, attention.num_heads, attention.head_dim)
    value_w, value_b = (part.chunk(3, dim=-1)[2] for part in (attention.c_attn.weight, attention.c_attn.bias))
    out_BHE = torch.einsum("bhd,dhe->bhe", mean_BHD, value_w.view(heads)) + sum_BH1 * value_b.view(heads)
    attended_BD = attention.c_proj(out_BHE.reshape(last_BD.shape))
    last_BD = last_BD + _apply_module_dropout(attention.resid_dropout, attended_BD, keys_B, ATTENTION_OUTPUT)
    inner = fuse_activation(mlp.act)(mlp.c_fc(block.ln_2(last_BD)))
    return last_BD + _apply_module_dropout(mlp.dropout, mlp.c_proj(inner), keys_B, MLP_OUTPUT)


def run_last_tokens(block: Any, hidden_PD: Tensor, lengths_B: Sequence[int]) -> Tensor:
    """Run a block in eval mode for the last token of each text of a pack, so that no text depends on its mates; last_BD.

    Products with weights have ROWS_PER_PRODUCT rows. Attention runs over groups of TEXTS_PER_GROUP texts of equal length. Zeros
    fill both up, so that all shapes depend on the text's own length alone.
    """
    device, num_texts, width = hidden_PD.device, len(lengths_B), hidden_PD.shape[1]
    group, product = TEXTS_PER_GROUP[device.type], ROWS_PER_PRODUCT[device.type]
    last_BD = hidden_PD[torch.tensor(lengths_B, device=device).cumsum(0) - 1]
    rows = functional.pad(last_BD, (0, 0, 0, -num_texts % product)).split(product)
    probe_BHD = torch.cat([_make_probe(block, rows_BD) for rows_BD in rows])
    mean_BHD, sum_BH1 = torch.zeros_like(probe_BHD), torch.zeros_like(probe_BHD[..., :1])
    text = token = 0
    for num_equal, length in find_runs(lengths_B):
        lengths_G = torch.full((group,), length, device=device)
        for size in [group] * (num_equal // group) + [num_equal % group] * (num_equal % group > 0):
            of_group, missing = slice(text, text + size), group - size
            hidden_GTD = hidden_PD[token : token + size * length].view(size, length, width)
            hidden_GTD = functional.pad(hidden_GTD, (0, 0, 0, 0, 0, missing))
            probe_GHD = functional.pad(probe_BHD[of_group], (0, 0, 0, 0, 0, missing))
            mean_GHD, sum_GH1 = _attend(block, probe_GHD, hidden_GTD, lengths_G, None)
            mean_BHD[of_group], sum_BH1[of_group] = mean_GHD[:size], sum_GH1[:size]
            text, token = text + size, token + size * length
    parts = zip(rows, mean_BHD.split(product), sum_BH1.split(product), strict=True)
    return torch.cat([_finish(block, last, mean, total, None) for last, mean, total in parts])[:num_texts]


def select_last_rows(hidden_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the row of each text's last real token: last_BD."""
    return hidden_BTD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]


def _apply_module_dropout(dropout: nn.Dropout, values: Tensor, keys_B: Tensor | None, site: int) -> Tensor:
    if keys_B is None or not dropout.training:
        return cast(Tensor, dropout(values))
    return apply_dropout(values, keys_B, site, dropout.p)
