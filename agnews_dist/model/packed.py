"""GPT-2's blocks over packed texts, without autograd: tokens of all texts end to end, no padding, no mask, no dropout.

Works on the parameters of Hugging Face's blocks. Called by prefix.py; the plain counterpart is Hugging Face's own forward.
"""

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

Ints = NDArray[np.int64]

Attend = Callable[[Tensor, int, float], Tensor]
"""(qkv_P, number of heads, factor of the scores) -> attended_PD."""


def packed_attention(lengths_B: Sequence[int], device: torch.device, dtype: torch.dtype) -> Attend:
    """Causal attention within each text of a pack: one variable-length kernel on CUDA, else one call per run of equal lengths.

    Made once per pack and used by all its blocks.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _varlen() is not None:
        ends = torch.tensor([0, *lengths_B]).cumsum(0).to(device=device, dtype=torch.int32)
        return lambda qkv_P, num_heads, factor: _by_kernel(qkv_P, ends, max(lengths_B), num_heads, factor)
    runs = [(sum(1 for _ in run), length) for length, run in groupby(lengths_B)]
    return lambda qkv_P, num_heads, factor: _by_runs(qkv_P, runs, num_heads, factor)


def _by_runs(qkv_P: Tensor, runs: list[tuple[int, int]], num_heads: int, factor: float) -> Tensor:
    """`runs`: (texts, tokens per text) of neighbours that are equally long, so that they need no padding."""
    num_tokens, width = qkv_P.shape[0], qkv_P.shape[1] // 3
    attended_PD = qkv_P.new_empty(num_tokens, width)
    begin = 0
    for num_texts, length in runs:
        rows = slice(begin, begin := begin + num_texts * length)
        heads = qkv_P[rows].view(num_texts, length, 3, num_heads, width // num_heads)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=factor)
        attended_PD[rows].view(num_texts, length, num_heads, -1).copy_(attended.transpose(1, 2))
    return attended_PD


def _by_kernel(qkv_P: Tensor, ends: Tensor, longest: int, num_heads: int, factor: float) -> Tensor:
    """`ends`: int32 positions where the texts begin, and the end of the last one."""
    varlen, options = cast("tuple[Callable[..., Tensor], dict[str, Any]]", _varlen())
    head_dim = qkv_P.shape[1] // 3 // num_heads
    query, key, value = qkv_P.view(-1, 3, num_heads, head_dim).unbind(1)
    # The kernel's own factor is head_dim^-0.5; not every release lets it be set.
    if factor != head_dim**-0.5:
        query = query * (factor * head_dim**0.5)
    return varlen(query, key, value, ends, ends, longest, longest, **options).reshape(len(qkv_P), -1)


@cache
def _varlen() -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """torch's variable-length attention and how this release wants to be told that it is causal; None: it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "num_splits" in known:
        # Otherwise the order of a text's sums depends on the longest of its pack.
        options["num_splits"] = 1
    return cast("Callable[..., Tensor]", varlen_attn), options


def packed_block(block: Any, hidden_PD: Tensor, attend: Attend, *, compiled: bool = False) -> Tensor:
    """One of Hugging Face's GPT-2 blocks in eval mode; `hidden_PD` may be overwritten."""
    before, after = _compiled_halves() if compiled else (_before_attention, _after_attention)
    attention, mlp = block.attn, block.mlp
    qkv_P = before(hidden_PD, block.ln_1.weight, block.ln_1.bias, block.ln_1.eps, *_affine(attention.c_attn))
    attended_PD = attend(qkv_P, attention.num_heads, score_factor(attention))
    return after(
        hidden_PD,
        attended_PD,
        *_affine(attention.c_proj),
        block.ln_2.weight,
        block.ln_2.bias,
        block.ln_2.eps,
        *_affine(mlp.c_fc),
        fused_activation(mlp.act),
        *_affine(mlp.c_proj),
    )


def _affine(layer: Any) -> tuple[Tensor, Tensor]:
    """Bias and weight (inputs x outputs) of a Conv1D of Hugging Face's."""
    return layer.bias, layer.weight


def _before_attention(
    hidden_PD: Tensor, gain_D: Tensor, shift_D: Tensor, eps: float, bias: Tensor, weight: Tensor
) -> Tensor:
    normed_PD = functional.layer_norm(hidden_PD, gain_D.shape, gain_D, shift_D, eps)
    return torch.addmm(bias, normed_PD, weight)


def _after_attention(
    hidden_PD: Tensor,
    attended_PD: Tensor,
    out_bias: Tensor,
    out_weight: Tensor,
    gain_D: Tensor,
    shift_D: Tensor,
    eps: float,
    up_bias: Tensor,
    up_weight: Tensor,
    activation: Callable[[Tensor], Tensor],
    down_bias: Tensor,
    down_weight: Tensor,
) -> Tensor:
    # Sums go straight into the residual stream and the activation into its input: on a CPU, memory is what is left to save.
    hidden_PD = hidden_PD.add_(out_bias).addmm_(attended_PD, out_weight)
    normed_PD = functional.layer_norm(hidden_PD, gain_D.shape, gain_D, shift_D, eps)
    inner_P = torch.addmm(up_bias, normed_PD, up_weight)
    inner_P = torch.ops.aten.gelu_(inner_P, approximate="tanh") if activation is gelu_tanh else activation(inner_P)
    return hidden_PD.add_(down_bias).addmm_(inner_P, down_weight)


@cache
def _compiled_halves() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The dense work around attention, compiled once for all blocks (weights are inputs) and all numbers of tokens."""
    compiled = (torch.compile(half, dynamic=True, fullgraph=True) for half in (_before_attention, _after_attention))
    before, after = cast("tuple[Callable[..., Tensor], Callable[..., Tensor]]", tuple(compiled))
    return before, after


def score_factor(attention: Any) -> float:
    """What the products of query and key are multiplied by."""
    # The module's own `scaling` is missing from transformers 5.0.
    factor = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return factor / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else factor


def fused_activation(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """The block's activation; Hugging Face's step-by-step `gelu_new` as the same function in one kernel."""
    return gelu_tanh if isinstance(activation, NewGELUActivation) else cast("Callable[[Tensor], Tensor]", activation)


def gelu_tanh(inner: Tensor) -> Tensor:
    """GPT-2's own activation (Hendrycks and Gimpel 2016, with the tanh approximation)."""
    return functional.gelu(inner, approximate="tanh")


def call_bounds(lengths_B: Ints, call_tokens: int) -> list[tuple[int, int]]:
    """Cut texts, in their order, into packed calls of at most `call_tokens` tokens, one text at the least: (begin, end) each.

    >>> call_bounds(np.array([9, 3, 3, 2]), 6)
    [(0, 1), (1, 3), (3, 4)]
    """
    ends = np.cumsum(lengths_B)
    bounds: list[tuple[int, int]] = []
    begin = 0
    while begin < len(lengths_B):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + call_tokens, side="right")))
        bounds.append((begin, end))
        begin = end
    return bounds


T = TypeVar("T")


def side_by_side(pieces: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The results of `pieces` in their order; on a GPU one after the other, since each fills it.

    The first error is raised when all pieces that had begun are done.
    """
    if device.type != "cpu":
        return [piece() for piece in pieces]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # MKL's count is the process's, OpenMP's the thread's: hence the initializer too
    try:
        if num_threads == 1 or len(pieces) <= 1:
            return [piece() for piece in pieces]
        with ThreadPoolExecutor(
            min(num_threads, len(pieces)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            futures = [pool.submit(piece) for piece in pieces]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(num_threads)
