"""Keys of feature caches: a hash over everything that features depend on, so equal keys mean equal features."""

import hashlib
import json

import torch
from transformers import GPT2Config

from agnews_dist.features.piece_index import PieceIndex
from agnews_dist.model.prefix import Prefix

FORMAT = 3
"""Version of the computation and of the files.

Raise it with every change of code that moves a bit of a feature, or the files on disk. Caches of other versions are then never
read; eviction removes them. Version 1 hashed source code instead. Version 2 had one file per split, of use for its texts only.
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


def frozen_key(*, frozen_weights: str, config: GPT2Config, prefix: Prefix) -> str:
    """Return the key of the frozen part: all that a text's features depend on, except the text.

    `frozen_weights`: fingerprint of the frozen weights, in the type of their file.
    """
    dtype = prefix.wte.weight.dtype
    parts: list[object] = [
        frozen_weights,
        [getattr(config, name) for name in _CONFIG_FIELDS],
        len(prefix.h),
        prefix.one_row_per_text,
        [str(dtype), _uses_tf32(dtype)],
        [prefix.call_tokens, prefix.compiled],
        FORMAT,
        prefix.computes_means,
    ]
    return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()


def piece_key(frozen: str, index: PieceIndex) -> str:
    """Return the key of a file of features: 64 hexadecimal digits. `frozen`: see `frozen_key`."""
    digest = hashlib.sha256(frozen.encode())
    for array in (index.hashes_I, index.rows_I.astype("<i8"), index.texts_S.astype("<i8")):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _uses_tf32(dtype: torch.dtype) -> bool:
    """Return whether fp32 products are computed in TF32, which has a mantissa of 10 bits."""
    on_gpu = dtype == torch.float32 and torch.cuda.is_available()
    return on_gpu and bool(torch.backends.cuda.matmul.allow_tf32)
