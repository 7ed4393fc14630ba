"""What features are a function of, as one key: two caches of the same key hold the same features."""

import hashlib
import inspect
import json
from types import ModuleType

import numpy as np
import torch
from transformers import GPT2Config

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.features import layout as calls
from agnews_dist.features.layout import Layout
from agnews_dist.model import last_token, packed, prefix

# Computing and laying out: with their source in the key, a change of the code cannot meet features of the old one.
_CODE: tuple[ModuleType, ...] = (calls, last_token, packed, prefix)
_SHAPE = (
    "n_embd",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)


def features_key(
    *, frozen_weights: str, config: GPT2Config, num_blocks: int, table: TokenTable, layout: Layout, dtype: torch.dtype
) -> str:
    """sha256 over the frozen weights (`frozen_weights`: their fingerprint) and how the config reads them, the number of frozen
    blocks, the split's tokens, the order of the rows and the calls that make them, their type, and the source text of what
    computes them."""
    texts_of_calls = np.array([len(ids) for ids in layout.texts], np.int64)
    parts: list[object] = [
        frozen_weights,
        [getattr(config, name) for name in _SHAPE],
        num_blocks,
        table.fingerprint,
        _digest(np.concatenate([layout.begin_N, layout.rows_N, layout.bounds_S, texts_of_calls])),
        [str(dtype), _rounds_products(dtype)],
        [hashlib.sha256(inspect.getsource(module).encode()).hexdigest() for module in _CODE],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _rounds_products(dtype: torch.dtype) -> bool:
    """Whether fp32 products are TF32, which has bf16's precision."""
    on_gpu = dtype == torch.float32 and torch.cuda.is_available()
    return on_gpu and bool(torch.backends.cuda.matmul.allow_tf32)


def _digest(numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
