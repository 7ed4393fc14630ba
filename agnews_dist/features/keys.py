"""Keys of feature caches: a hash over everything that features depend on, so equal keys mean equal features."""

import hashlib
import json

import numpy as np
import torch
from transformers import GPT2Config

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.features.layout import Layout

FORMAT = 2
"""Version of the computation and of the files.

Raise it with every change of code that moves a bit of a feature, the order of the rows, or the files on disk. Caches of other
versions are then never read; eviction removes them. Version 1 hashed source code instead.
"""
_CONFIG_FIELDS = (
    "n_embd",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)
"""Fields of the model's config that change what the frozen weights compute."""


def features_key(
    *,
    frozen_weights: str,
    config: GPT2Config,
    num_blocks: int,
    table: TokenTable,
    layout: Layout,
    dtype: torch.dtype,
    are_means: bool = False,
) -> str:
    """Return the key of one split's features: 64 hexadecimal digits.

    `frozen_weights`: their fingerprint; `num_blocks`: number of frozen blocks; `dtype`: type of the features; `are_means`: see
    `Prefix.computes_means`.
    """
    texts_of_calls = np.array([len(ids) for ids in layout.texts], np.int64)
    numbers = np.concatenate([layout.begin_N, layout.rows_N, layout.bounds_S, texts_of_calls])
    parts: list[object] = [
        frozen_weights,
        [getattr(config, name) for name in _CONFIG_FIELDS],
        num_blocks,
        table.fingerprint,
        hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest(),
        [str(dtype), _uses_tf32(dtype)],
        FORMAT,
        *(["means"] if are_means else []),
    ]
    return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()


def _uses_tf32(dtype: torch.dtype) -> bool:
    """Return whether fp32 products are computed in TF32, which has a mantissa of 10 bits."""
    on_gpu = dtype == torch.float32 and torch.cuda.is_available()
    return on_gpu and bool(torch.backends.cuda.matmul.allow_tf32)
