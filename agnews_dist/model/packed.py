"""GPT-2's blocks over packed texts: the tokens of all texts end to end, without padding, mask, dropout or autograd.

The functions use the parameters of Hugging Face's blocks. Packed texts are cut into calls, and on a CPU calls run in parallel.
"""

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

from agnews_dist.data.rows import Ints
from agnews_dist.errors import ModelError, shorten

T = TypeVar("T")
MAX_REASON = 200
"""Characters of torch.compile's reason in a message."""
Attend = Callable[[Tensor, int, float], Tensor]
"""(qkv_P, number of heads, factor of the scores) -> attended_PD."""


class Linear(NamedTuple):
    """Parameters of one of Hugging Face's Conv1D layers; the weight has the shape (inputs, outputs)."""

    bias: Tensor
    weight: Tensor


class Norm(NamedTuple):
    """Parameters of a layer norm."""

    gain_D: Tensor
    shift_D: Tensor
    eps: float


def make_packed_attention(lengths_B: Sequence[int], device: torch.device, dtype: torch.dtype) -> Attend:
    """Return causal attention within each text of a pack, to be used by all blocks. Filler rows after the texts give zeros.

    On CUDA in half precision it is one variable-length kernel, otherwise one call per run of texts of equal length.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _find_varlen_kernel() is not None:
        ends = torch.tensor([0, *lengths_B]).cumsum(0).to(device=device, dtype=torch.int32)
        num_tokens = sum(lengths_B)

        def attend(qkv_P: Tensor, num_heads: int, factor: float) -> Tensor:
            attended_PD = _attend_by_kernel(qkv_P[:num_tokens], ends, max(lengths_B), num_heads, factor)
            return functional.pad(attended_PD, (0, 0, 0, len(qkv_P) - num_tokens))

        return attend
    runs = find_runs(lengths_B)
    return lambda qkv_P, num_heads, factor: _attend_by_runs(qkv_P, runs, num_heads, factor)


def find_runs(lengths_B: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of neighbours of equal length: (texts, tokens per text) of each.

    >>> find_runs([5, 5, 2, 5])
    [(2, 5), (1, 2), (1, 5)]
    """
    return [(sum(1 for _ in run), length) for length, run in groupby(lengths_B)]


def _attend_by_runs(qkv_P: Tensor, runs: list[tuple[int, int]], num_heads: int, factor: float) -> Tensor:
    """Attend in one call per run; `runs`: (texts, tokens per text) of neighbours of equal length, which need no padding."""
    num_tokens, width = qkv_P.shape[0], qkv_P.shape[1] // 3
    attended_PD = qkv_P.new_empty(num_tokens, width)
    begin = 0
    for num_texts, length in runs:
        rows = slice(begin, begin := begin + num_texts * length)
        heads = qkv_P[rows].view(num_texts, length, 3, num_heads, width // num_heads)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=factor)
        attended_PD[rows].view(num_texts, length, num_heads, -1).copy_(attended.transpose(1, 2))
    attended_PD[begin:] = 0
    return attended_PD


def _attend_by_kernel(qkv_P: Tensor, ends: Tensor, longest: int, num_heads: int, factor: float) -> Tensor:
    """Attend in one kernel; `ends`: 0 and the end of each text (int32)."""
    kernel, options = cast("tuple[Callable[..., Tensor], dict[str, Any]]", _find_varlen_kernel())
    head_dim = qkv_P.shape[1] // 3 // num_heads
    query, key, value = qkv_P.view(-1, 3, num_heads, head_dim).unbind(1)
    # The kernel's own factor is head_dim^-0.5, and not every release of torch has a parameter for it.
    if factor != head_dim**-0.5:
        query = query * (factor * head_dim**0.5)
    return kernel(query, key, value, ends, ends, longest, longest, **options).reshape(len(qkv_P), -1)


@cache
def _find_varlen_kernel() -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """Return torch's variable-length attention and its options for causal attention; None if this release has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "num_splits" in parameters:
        # Otherwise the order of a text's sums depends on the longest text of its pack.
        options["num_splits"] = 1
    return cast("Callable[..., Tensor]", varlen_attn), options


def run_packed_block(block: Any, hidden_PD: Tensor, attend: Attend, *, compiled: bool = False) -> Tensor:
    """Run one of Hugging Face's GPT-2 blocks in eval mode. May overwrite `hidden_PD`.

    Raises:
        ModelError: torch.compile failed.
    """
    try:
        return _run_halves(block, hidden_PD, attend, compiled=compiled)
    except Exception as error:
        # torch.compile runs compilers and loads what they made, so any machine has its own way of failing.
        if not compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = shorten(str(error).strip().split("\n")[0], MAX_REASON)
        raise ModelError(f"engine.compile: torch.compile failed ({reason}). Set --engine.compile never.") from error


def _run_halves(block: Any, hidden_PD: Tensor, attend: Attend, *, compiled: bool) -> Tensor:
    before, after = _compile_halves() if compiled else (_before_attention, _after_attention)
    attention, mlp = block.attn, block.mlp
    qkv_P = before(hidden_PD, _norm_of(block.ln_1), _linear_of(attention.c_attn))
    attended_PD = attend(qkv_P, attention.num_heads, score_factor(attention))
    linears = (_linear_of(attention.c_proj), _linear_of(mlp.c_fc), _linear_of(mlp.c_proj))
    return after(hidden_PD, attended_PD, _norm_of(block.ln_2), linears, fuse_activation(mlp.act))


def _linear_of(layer: Any) -> Linear:
    return Linear(layer.bias, layer.weight)


def _norm_of(layer: Any) -> Norm:
    return Norm(layer.weight, layer.bias, layer.eps)


def _before_attention(hidden_PD: Tensor, norm: Norm, qkv: Linear) -> Tensor:
    normed_PD = functional.layer_norm(hidden_PD, norm.gain_D.shape, norm.gain_D, norm.shift_D, norm.eps)
    return torch.addmm(qkv.bias, normed_PD, qkv.weight)


def _after_attention(
    hidden_PD: Tensor,
    attended_PD: Tensor,
    norm: Norm,
    linears: tuple[Linear, Linear, Linear],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run a block from the attention's output on; `linears`: attention's output projection, MLP up, MLP down."""
    out, up, down = linears
    # In place where possible: on a CPU, writing new memory is what limits the speed here.
    hidden_PD = hidden_PD.add_(out.bias).addmm_(attended_PD, out.weight)
    normed_PD = functional.layer_norm(hidden_PD, norm.gain_D.shape, norm.gain_D, norm.shift_D, norm.eps)
    inner_P = torch.addmm(up.bias, normed_PD, up.weight)
    inner_P = torch.ops.aten.gelu_(inner_P, approximate="tanh") if activation is gelu_tanh else activation(inner_P)
    return hidden_PD.add_(down.bias).addmm_(inner_P, down.weight)


@cache
def _compile_halves() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Compile the work around attention, once for all blocks (weights are inputs) and all numbers of tokens."""
    compile_half = partial(torch.compile, dynamic=True, fullgraph=True)
    return compile_half(_before_attention), compile_half(_after_attention)


def score_factor(attention: Any) -> float:
    """Return the factor of the products of query and key."""
    # The module's own `scaling` is missing from transformers 5.0.
    factor = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return factor / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else factor


def fuse_activation(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return one kernel for `gelu_new`, which Hugging Face computes in several steps; any other activation unchanged.

    The trainable part has a module of that kernel in its place (see `Suffix.use_fast_path`).
    """
    is_fused = isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    if is_fused or isinstance(activation, NewGELUActivation):
        return gelu_tanh
    return cast("Callable[[Tensor], Tensor]", activation)


def gelu_tanh(inner: Tensor) -> Tensor:
    """Apply GPT-2's activation: GELU with the tanh approximation (Hendrycks and Gimpel 2016)."""
    return functional.gelu(inner, approximate="tanh")


def cut_by_size(sizes: Ints, limit: int) -> list[tuple[int, int]]:
    """Cut items, in their order, into pieces of at most `limit` in size and at least one item: (begin, end) of each.

    >>> cut_by_size(np.array([9, 3, 3, 2]), 6)
    [(0, 1), (1, 3), (3, 4)]
    """
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    bounds: list[tuple[int, int]] = []
    begin = 0
    while begin < len(sizes):
        last_fitting = int(np.searchsorted(offsets, offsets[begin] + limit, side="right")) - 1
        end = max(begin + 1, last_fitting)
        bounds.append((begin, end))
        begin = end
    return bounds


def run_in_threads(tasks: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Run `tasks` and return their results in order: in parallel on a CPU, one thread each; in sequence on a GPU.

    Raises:
        BaseException: the first task's error, after all running tasks have ended. The others never start.
    """
    if device.type != "cpu":
        return [task() for task in tasks]
    num_threads = torch.get_num_threads()
    # MKL's number of threads belongs to the process, OpenMP's to the thread: hence the initializer too.
    torch.set_num_threads(1)
    try:
        if num_threads == 1 or len(tasks) <= 1:
            return [task() for task in tasks]
        with ThreadPoolExecutor(min(num_threads, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(num_threads)
