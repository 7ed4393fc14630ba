"""Dropout without random state: a mask is a hash of (seed, step, example, site, element).

So an example has the same masks on any number of ranks, in any micro-batch, with any padding, and after a restart. The hash is
counter-based (Salmon et al. 2011): element n of the SplitMix64 sequence that starts at a key (Steele, Lea, Flood: Fast
Splittable Pseudorandom Number Generators, 2014). It uses integers only, so a CPU and a GPU draw the same bits.
"""

import math

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""Constants of SplitMix64 as int64, whose sums and products wrap around like those of uint64."""
_MULTIPLIER_1, _MULTIPLIER_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_ROW_STRIDE = 2**32
"""Distance of the counters of two rows: longer than any row, and independent of the padding."""


def step_key(seed: int, step: int) -> int:
    """Return the key of one optimiser step (int64). Both arguments must fit in int64; `seed` may itself be a key."""
    return _mix_number(_mix_number(0, seed), step)


def example_keys(step_key: int, ids_B: Tensor) -> Tensor:
    """Return keys_B (int64) of the examples with row numbers `ids_B` (int64) in a step, on the device of `ids_B`."""
    return _splitmix64(torch.full_like(ids_B, step_key), ids_B)


def apply_dropout(values: Tensor, keys_B: Tensor, site: int, p: float) -> Tensor:
    """Set each element of `values` (B, ..., T) to zero with probability `p`, and divide the others by 1 - p.

    `site` (int64) distinguishes places that share `keys_B`. Additional examples, or elements in the last dimension (padding),
    do not change the masks of the others.
    """
    if p <= 0:
        return values
    if p >= 1:
        # Not new zeros: the weights before this layer must still get a gradient.
        return values * 0
    return values.masked_fill(_draw_mask(values.shape, keys_B, site, p), 0) / (1 - p)


def _draw_mask(shape: torch.Size, keys_B: Tensor, site: int, p: float) -> Tensor:
    """Draw a mask of this shape, true for elements to drop."""
    elements = torch.arange(shape[-1], device=keys_B.device)
    rows = _ROW_STRIDE * torch.arange(math.prod(shape[1:-1]), device=keys_B.device)
    counters = (rows[:, None] + elements).view(shape[1:])
    site_keys = _splitmix64(keys_B, site).view(len(keys_B), *[1] * len(shape[1:]))
    # Hashes are uniform in int64: drop the lowest share p.
    return _splitmix64(site_keys, counters) < int(p * 2**64) - 2**63


def _splitmix64(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """Return element `numbers` (from 0) of the SplitMix64 sequences that start at `keys` (int64); the shapes broadcast."""
    mixed = keys + (torch.as_tensor(numbers) * _GOLDEN_GAMMA + _GOLDEN_GAMMA)
    mixed = _xor_shift(mixed, 30) * _MULTIPLIER_1
    mixed = _xor_shift(mixed, 27) * _MULTIPLIER_2
    return _xor_shift(mixed, 31)


def _mix_number(key: int, number: int) -> int:
    """Compute `_splitmix64` of two numbers without the overhead of torch."""
    mixed = (key + (number + 1) * _GOLDEN_GAMMA) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * _MULTIPLIER_1 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * _MULTIPLIER_2 % 2**64
    mixed ^= mixed >> 31
    return mixed - 2**64 if mixed >= 2**63 else mixed


def _xor_shift(mixed: Tensor, bits: int) -> Tensor:
    # SplitMix64 shifts zeros in. The mask clears the copies of the sign bit that int64's shift inserts.
    return mixed ^ ((mixed >> bits) & (2 ** (64 - bits) - 1))
