"""A reference of dropout by keys without our code: SplitMix64 in numpy, Hugging Face's classifier under its masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from support.toy import our_name, toy_reference_model, toy_split

NUM_HEADS, WIDTH = 3, 24
"""Sizes of the toy model."""
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, MLP_OUTPUT = range(3)


def splitmix64(keys: np.ndarray, numbers: np.ndarray | int) -> np.ndarray:
    """Return element `numbers` (from 0) of the SplitMix64 sequences with seeds `keys`, as in the authors' C code."""
    mixed = keys + (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def reference_keys(seed: int, step: int, ids: Sequence[int]) -> np.ndarray:
    """Return keys_B (uint64)."""
    # Arrays, as numpy warns of scalars that wrap around.
    of_step = splitmix64(splitmix64(np.zeros(1, np.uint64), np.array([seed])), np.array([step]))
    return splitmix64(of_step, np.array(ids, np.int64))


def reference_kept(keys_B: np.ndarray, site: int, p: float, rest: tuple[int, ...]) -> np.ndarray:
    """Return which elements of an array of shape (B, *rest) are kept, computed row by row."""
    site_keys_B = splitmix64(keys_B, np.array([site]))
    kept = np.empty((len(keys_B), *rest), bool)
    for row, where in enumerate(np.ndindex(*rest[:-1])):
        hashes_BT = splitmix64(site_keys_B[:, None], row * 2**32 + np.arange(rest[-1]))
        kept[(slice(None), *where)] = hashes_BT.view(np.int64) >= int(p * 2**64) - 2**63
    return kept


@contextmanager
def masks_in_place_of_dropout(masks: Sequence[Tensor], p: float) -> Iterator[None]:
    """Make every dropout in training multiply by the next of `masks`, the same for all tokens, instead of drawing one."""
    original, remaining = functional.dropout, iter(masks)

    def masked(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return values
        assert p == expected
        return values * next(remaining).unsqueeze(-2).to(values.dtype)

    expected = p
    functional.dropout = masked
    try:
        yield
    finally:
        functional.dropout = original
    assert next(remaining, None) is None, "every mask was used"


def logits_under_masks(model: torch.nn.Module, tokens_BT: Tensor, mask_BT: Tensor, keys_B: np.ndarray, p: float) -> Tensor:
    """Return logits_BC of Hugging Face's classifier with dropout in its last block, under the masks of `keys_B`."""
    last = model.transformer.h[-1].train()
    last.attn.attn_dropout.p = last.attn.resid_dropout.p = last.mlp.dropout.p = p
    rests = {ATTENTION_WEIGHTS: (NUM_HEADS, tokens_BT.shape[1]), ATTENTION_OUTPUT: (WIDTH,), MLP_OUTPUT: (WIDTH,)}
    masks = [torch.from_numpy(reference_kept(keys_B, site, p, rest)) / (1 - p) for site, rest in rests.items()]
    with masks_in_place_of_dropout(masks, p):
        return model(input_ids=tokens_BT, attention_mask=mask_BT).logits


def reference_with_dropout(
    lengths: list[int], keys_B: np.ndarray, p: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits_BC and the gradients of the mean loss, by our names, of Hugging Face's classifier on padded texts."""
    model, tokens_BT, mask_BT = toy_reference_model(lengths, 1, dtype)
    model.set_attn_implementation("eager")
    logits_BC = logits_under_masks(model, tokens_BT, mask_BT, keys_B, p)
    functional.cross_entropy(logits_BC, torch.from_numpy(toy_split(lengths).labels)).backward()
    return logits_BC.detach(), {our_name(name): w.grad for name, w in model.named_parameters() if w.requires_grad}


def second_pass_keys(seed: int, step: int, ids: Sequence[int]) -> np.ndarray:
    """Return keys_B (uint64) of R-Drop's second pass: those of step 1 under a seed that is the key of the step."""
    of_step = splitmix64(splitmix64(np.zeros(1, np.uint64), np.array([seed])), np.array([step]))
    of_pass = splitmix64(splitmix64(np.zeros(1, np.uint64), of_step), np.array([1]))
    return splitmix64(of_pass, np.array(ids, np.int64))


def reference_r_drop(
    lengths: list[int], passes: Sequence[np.ndarray], p: float, alpha: float, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the gradients of R-Drop's loss in fp64, by our names: mean over the texts, each weighted by its class.

    `passes`: keys_B of either pass. Per text: the mean of both cross-entropies + `alpha` times the mean of both divergences.
    """
    model, tokens_BT, mask_BT = toy_reference_model(lengths, 1, torch.float64)
    model.set_attn_implementation("eager")
    labels_B = torch.from_numpy(toy_split(lengths).labels)
    one, other = (logits_under_masks(model, tokens_BT, mask_BT, keys_B, p).log_softmax(dim=1) for keys_B in passes)
    entropies = [functional.nll_loss(each, labels_B, reduction="none") for each in (one, other)]
    pairs = ((one, other), (other, one))
    divergences = [functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=1) for p, q in pairs]
    weights_B = torch.ones(len(lengths), dtype=torch.float64) if weight is None else weight[labels_B]
    losses_B = sum(entropies) / 2 + alpha * sum(divergences) / 2
    ((losses_B * weights_B).sum() / weights_B.sum()).backward()
    return {our_name(name): w.grad for name, w in model.named_parameters() if w.requires_grad}
