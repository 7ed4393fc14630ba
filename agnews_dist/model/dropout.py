"""Dropout without a random state: whether an element is dropped is a function of (seed, step, example, site, element).

So an example gets the same masks on any number of ranks, in any micro-batch, with any padding, and after a restart. Keys and
masks come from one counter-based hash (Salmon et al. 2011), here SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom
Number Generators, 2014): number n of the sequence that begins at a key. Integers only: a CPU and a GPU draw the same bits.
"""

import math

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""SplitMix64's constants as int64, whose sums and products wrap around as those of uint64 do."""
_MULTIPLIER_1, _MULTIPLIER_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_ROW_STRIDE = 2**32
"""Between the counters of two rows of an example: more than any row is long, and the same whatever the padding."""


def step_key(seed: int, step: int) -> int:
    """The key of one optimiser step, within int64; `seed` may be such a key itself. Both must fit in int64."""
    return int(_hashed(_hashed(torch.zeros((), dtype=torch.int64), seed), step))


def example_keys(step_key: int, ids_B: Tensor) -> Tensor:
    """keys_B (int64) of the examples with row numbers `ids_B` (int64) in that step, on the device of `ids_B`."""
    return _hashed(torch.full_like(ids_B, step_key), ids_B)


def dropped(values: Tensor, keys_B: Tensor, site: int, p: float) -> Tensor:
    """`values` of shape (B, ..., T), each element zero with probability `p`, else divided by 1 - p.

    `site` (int64) tells apart places that share `keys_B`. More examples, or more elements in the last dimension (padding),
    change nothing for the others.
    """
    if p <= 0:
        return values
    if p >= 1:
        # Not new zeros: every weight below must still get a gradient.
        return values * 0
    return values.masked_fill(_is_dropped(values.shape, keys_B, site, p), 0) / (1 - p)


def _is_dropped(shape: torch.Size, keys_B: Tensor, site: int, p: float) -> Tensor:
    """A mask of that shape, true where an element is to be dropped."""
    elements = torch.arange(shape[-1], device=keys_B.device)
    rows = _ROW_STRIDE * torch.arange(math.prod(shape[1:-1]), device=keys_B.device)
    counters = (rows[:, None] + elements).view(shape[1:])
    site_keys = _hashed(keys_B, site).view(len(keys_B), *[1] * len(shape[1:]))
    # Uniform in int64: the smallest share p of it.
    return _hashed(site_keys, counters) < int(p * 2**64) - 2**63


def _hashed(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """Number `numbers` + 1 of the sequences that SplitMix64 makes of the keys (int64); the shapes broadcast."""
    mixed = keys + (torch.as_tensor(numbers) * _GOLDEN_GAMMA + _GOLDEN_GAMMA)
    mixed = _xor_shifted(mixed, 30) * _MULTIPLIER_1
    mixed = _xor_shifted(mixed, 27) * _MULTIPLIER_2
    return _xor_shifted(mixed, 31)


def _xor_shifted(mixed: Tensor, bits: int) -> Tensor:
    # int64's shift repeats the sign, which the mask takes away: SplitMix64 shifts zeros in.
    return mixed ^ ((mixed >> bits) & (2 ** (64 - bits) - 1))
