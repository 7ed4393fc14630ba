"""The frozen part over packed texts, against Hugging Face's GPT2Model on a padded batch with an attention mask."""

import inspect
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.random_gpt2 import assert_close, mask_of, ours_like, ragged_batch, random_reference
from support.tools import requires_tool
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import GPT2ForSequenceClassification

from agnews_dist.model import packed
from agnews_dist.model.prefix import CALL_TOKENS, Prefix

EXACT = 1e-12
"""Relative tolerance in fp64, for about a hundred roundings."""
ORDERS = {
    "longest first": [17, 12, 12, 9, 3, 3, 3, 1],
    "shortest first": [1, 1, 3, 12, 17],
    "in no order": [3, 12, 3, 3, 1, 17, 12, 12, 1, 9],
    "all of one length": [6, 6, 6, 6],
    "one token each": [1, 1, 1],
    "one text": [13],
    "one token": [1],
}
every_boundary = pytest.mark.parametrize("trainable_blocks", [0, 1, 2, "all"])


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return ragged_batch(lengths, low=1, high=97, pad_id=0)


def packed_of(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(tokens_BT, lengths_B.tolist(), strict=True)])


def expected_rows(reference: GPT2ForSequenceClassification, boundary: int, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Return Hugging Face's hidden states after `boundary` blocks, without padding, end to end."""
    model, found = reference.transformer, []
    module = model.h[boundary - 1] if boundary else model.drop
    handle = module.register_forward_hook(lambda *_: found.append(_[-1]))
    with torch.no_grad():
        model(input_ids=tokens_BT, attention_mask=mask_of(tokens_BT, lengths_B))
    handle.remove()
    (output,) = found
    return packed_of(output[0] if isinstance(output, tuple) else output, lengths_B)


def expected_features(reference: GPT2ForSequenceClassification, half: Prefix, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the expected result of `half.rows`: only the last row of each text if no block follows."""
    rows = expected_rows(reference, len(half.h), tokens_BT, lengths_B)
    return rows[lengths_B.cumsum(0) - 1] if half.one_row_per_text else rows


@every_boundary
@pytest.mark.parametrize("lengths", ORDERS.values(), ids=ORDERS)
def test_rows_equal_hugging_face_hidden_states(lengths: list[int], trainable_blocks: int | str) -> None:
    reference = random_reference(pad_token_id=0).double()
    half = ours_like(reference, trainable_blocks).prefix
    tokens_BT, lengths_B = batch_of(lengths)
    rows = half.rows(packed_of(tokens_BT, lengths_B), lengths)
    assert half.one_row_per_text == (trainable_blocks == 0)
    assert_close(rows, expected_features(reference, half, tokens_BT, lengths_B), "rows", EXACT)


@every_boundary
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_text_have_the_same_bits_in_any_call(dtype: torch.dtype, trainable_blocks: int | str) -> None:
    """Neither its place, nor its mates, nor the size of the call moves a bit, also of texts of one to three tokens."""
    half = ours_like(random_reference(n_positions=128), trainable_blocks).prefix.to(dtype)
    rng = np.random.default_rng(3)
    lengths = [1, 1, 2, 2, 3, 3, *rng.integers(1, 60, 12).tolist(), 100]
    texts = [torch.from_numpy(rng.integers(1, 97, length)) for length in lengths]
    row_counts = [1 if half.one_row_per_text else length for length in lengths]
    alone = [half.rows(text, [len(text)]) for text in texts]
    for min_rows, num_calls in ((0, 3), (512, 1), (512, 5), (64, len(texts))):
        for ids in np.array_split(rng.permutation(len(texts)), num_calls):
            rows = half.rows(torch.cat([texts[i] for i in ids]), [lengths[i] for i in ids], min_rows=min_rows)
            for i, found in zip(ids, rows.split([row_counts[i] for i in ids]), strict=True):
                assert torch.equal(found, alone[i]), f"text of {lengths[i]} tokens"


def test_attention_across_texts_is_detected() -> None:
    """Control: the same tokens with other boundaries are other texts."""
    reference = random_reference(pad_token_id=0).double()
    half = ours_like(reference, 1).prefix
    tokens_BT, lengths_B = batch_of([4, 4])
    expected = expected_features(reference, half, tokens_BT, lengths_B)
    cut_elsewhere = half.rows(packed_of(tokens_BT, lengths_B), [3, 5])
    assert_close(cut_elsewhere[:3], expected[:3], "the tokens before the other boundary", EXACT)
    assert (cut_elsewhere[3:] - expected[3:]).abs().amax(dim=1).min() > 1e-3


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Limit calls to 20 tokens; the value collects the lengths of each call."""
    calls: list[list[int]] = []
    plain_rows = Prefix.rows

    def rows(self: Prefix, tokens_P: Tensor, lengths_B: list[int]) -> Tensor:
        calls.append(list(lengths_B))
        return plain_rows(self, tokens_P, lengths_B)

    monkeypatch.setattr(Prefix, "rows", rows)
    monkeypatch.setitem(CALL_TOKENS, "cpu", 20)
    return calls


@every_boundary
def test_features_over_several_calls_are_padded_rows(small_calls: list[list[int]], trainable_blocks: int | str) -> None:
    reference = random_reference(pad_token_id=0).double()
    half = ours_like(reference, trainable_blocks).prefix
    lengths = [3, 12, 25, 3, 1, 17, 12, 8, 1, 9]
    tokens_BT, lengths_B = batch_of(lengths)
    features = half.features(tokens_BT, lengths_B)
    assert sorted(small_calls) == sorted([[3, 12], [25], [3, 1], [17], [12, 8], [1, 9]])
    rows = packed_of(features.hidden_BTD, features.lengths_B)
    assert torch.equal(features.lengths_B, torch.ones_like(lengths_B) if trainable_blocks == 0 else lengths_B)
    assert features.hidden_BTD.shape[:2] == (len(lengths), int(features.lengths_B.max()))
    assert_close(rows, expected_features(reference, half, tokens_BT, lengths_B), "features", EXACT)


@every_boundary
def test_features_do_not_depend_on_the_number_of_threads(
    small_calls: list[list[int]], num_threads: None, trainable_blocks: int | str
) -> None:
    half = ours_like(random_reference(n_embd=96, n_head=6), trainable_blocks).prefix
    tokens_BT, lengths_B = batch_of([3, 12, 25, 3, 1, 17, 12, 8, 1, 9])
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(half.features(tokens_BT, lengths_B).hidden_BTD)
    assert len(small_calls) == 3 * 6
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def root_mean_square(difference: Tensor) -> float:
    return float(difference.float().square().mean().sqrt())


@every_boundary
def test_bf16_error_is_at_most_that_of_hugging_face(trainable_blocks: int | str) -> None:
    reference = random_reference(pad_token_id=0)
    half = ours_like(reference, trainable_blocks).prefix.to(torch.bfloat16)
    tokens_BT, lengths_B = batch_of(ORDERS["in no order"])
    exact = expected_features(reference, half, tokens_BT, lengths_B)
    rounded = expected_features(reference.to(torch.bfloat16), half, tokens_BT, lengths_B)
    rows = half.rows(packed_of(tokens_BT, lengths_B), lengths_B.tolist())
    assert rows.dtype == rounded.dtype == torch.bfloat16
    ours, theirs = root_mean_square(rows - exact), root_mean_square(rounded - exact)
    assert 0 < theirs < 0.02 * root_mean_square(exact), "bf16 rounds to 1 in 256"
    assert 0 < ours < 1.5 * theirs


@every_boundary
def test_caller_autocast_has_no_effect(trainable_blocks: int | str) -> None:
    half = ours_like(random_reference(), trainable_blocks).prefix
    tokens_BT, lengths_B = batch_of(ORDERS["in no order"])
    plain = half.features(tokens_BT, lengths_B).hidden_BTD
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = half.features(tokens_BT, lengths_B).hidden_BTD
        matrix = torch.ones(2, 2)
        assert torch.mm(matrix, matrix).dtype == torch.bfloat16, "control: autocast was active"
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


@every_boundary
def test_rows_build_no_graph_and_change_no_input(trainable_blocks: int | str) -> None:
    """Blocks overwrite the residual stream in place, but no weights and no tokens."""
    half = ours_like(random_reference(), trainable_blocks).prefix
    half.requires_grad_(True)  # so that a graph would be built if autograd were on
    before = {name: weight.clone() for name, weight in half.state_dict().items()}
    tokens_BT, lengths_B = batch_of(ORDERS["in no order"])
    tokens_P = packed_of(tokens_BT, lengths_B)
    tokens_before_P = tokens_P.clone()
    rows = half.rows(tokens_P, lengths_B.tolist())
    assert rows.grad_fn is None
    assert not rows.requires_grad
    assert not rows.is_inference(), "autograd would refuse inference tensors in the suffix"
    assert torch.equal(half.rows(tokens_P, lengths_B.tolist()), rows), "the weights are unchanged"
    assert torch.equal(tokens_P, tokens_before_P)
    after = half.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
@requires_tool("g++")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # from inductor's own imports
def test_compiled_calls_equal_hugging_face(monkeypatch: pytest.MonkeyPatch, num_threads: None) -> None:
    """One compilation serves both blocks and all sizes of packs. It takes most of this file's time."""
    torch.set_num_threads(1)
    reference = random_reference(pad_token_id=0)
    half = ours_like(reference, 2).prefix
    half.compiled = True
    assert len(half.h) == 2
    calls = []
    halves = packed._compile_halves()
    monkeypatch.setattr(packed, "_compile_halves", lambda: calls.append(1) or halves)
    for lengths in (ORDERS["in no order"], ORDERS["longest first"], ORDERS["one token"]):
        tokens_BT, lengths_B = batch_of(lengths)
        rows = half.rows(packed_of(tokens_BT, lengths_B), lengths)
        assert_close(rows, expected_features(reference, half, tokens_BT, lengths_B), f"compiled, {lengths}")
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["gelu_new", "gelu"])
def test_fuse_activation_replaces_gelu_new_only(name: str) -> None:
    """The kernel computes gelu_new, not gelu; other activations stay Hugging Face's modules."""
    activation = random_reference(activation_function=name).transformer.h[0].mlp.act
    inner = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    fused = packed.fuse_activation(activation)
    assert (fused is activation) == (name == "gelu")
    assert_close(fused(inner), activation(inner), name, EXACT)
    assert (functional.gelu(inner) - functional.gelu(inner, approximate="tanh")).abs().max() > 1e-4


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def numpy_attention(qkv_P: Tensor, lengths: list[int], num_heads: int, factor: float) -> Tensor:
    """Compute causal attention within each text in numpy, one query at a time."""
    query, key, value = np.split(qkv_P.numpy().reshape(len(qkv_P), 3 * num_heads, -1), 3, axis=1)
    attended = np.empty_like(query)
    for begin, end in pairwise(accumulate([0, *lengths])):
        for row in range(begin, end):
            scores = factor * np.einsum("he,the->ht", query[row], key[begin : row + 1])
            attended[row] = np.einsum("ht,the->he", softmax(scores), value[begin : row + 1])
    return torch.from_numpy(attended.reshape(len(qkv_P), -1))


def random_qkv(num_tokens: int, num_heads: int, head_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, 3 * num_heads * head_dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("factor", [4**-0.5, 1.0, 0.1])
@pytest.mark.parametrize("lengths", ORDERS.values(), ids=ORDERS)
def test_attention_by_runs_equals_numpy(lengths: list[int], factor: float) -> None:
    qkv_P = random_qkv(sum(lengths), 3, 4)
    attend = packed.make_packed_attention(lengths, torch.device("cpu"), qkv_P.dtype)
    assert_close(attend(qkv_P, 3, factor), numpy_attention(qkv_P, lengths, 3, factor), "attention", EXACT)


def test_attention_makes_one_call_per_run_of_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted texts need one call per length; texts apart from each other cannot share one."""
    plain, shapes = functional.scaled_dot_product_attention, []

    def spy(query: Tensor, *args: Tensor, **options: object) -> Tensor:
        shapes.append((query.shape[0], query.shape[2]))
        return plain(query, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    lengths = [5, 5, 5, 2, 2, 5]
    qkv_P = random_qkv(sum(lengths), 3, 4)
    packed.make_packed_attention(lengths, torch.device("cpu"), qkv_P.dtype)(qkv_P, 3, 0.5)
    assert shapes == [(3, 5), (2, 2), (1, 5)]


def varlen_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    num_splits: int | None = None,
) -> Tensor:
    """Imitate torch's variable-length kernel, which does not run on a CPU, by its documented contract."""
    for ends in (cu_seq_q, cu_seq_k):
        assert ends.dtype == torch.int32
        assert ends.ndim == 1
        assert ends[0] == 0
        assert ends[-1] == len(query)
        assert int(ends.diff().max()) == max_q == max_k
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1, "the kernel reads whole rows of a head"
    assert window_size in ((-1, -1), (-1, 0))
    outputs = []
    for begin, end in pairwise(cu_seq_q.tolist()):
        heads = (part[None, begin:end].transpose(1, 2) for part in (query, key, value))
        causal = window_size == (-1, 0)
        outputs.append(functional.scaled_dot_product_attention(*heads, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("factor", [4**-0.5, 1.0, 0.1])
@pytest.mark.parametrize("lengths", ORDERS.values(), ids=ORDERS)
def test_attention_by_kernel_passes_heads_ends_and_factor(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], factor: float
) -> None:
    """The kernel itself is tested on a GPU (tests/gpu)."""
    monkeypatch.setattr(packed, "_find_varlen_kernel", lambda: (varlen_on_cpu, {"window_size": (-1, 0), "num_splits": 1}))
    qkv_P = random_qkv(sum(lengths), 3, 4)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    before_P = qkv_P.clone()
    attended_PD = packed._attend_by_kernel(qkv_P, ends, max(lengths), 3, factor)
    assert_close(attended_PD, numpy_attention(qkv_P, lengths, 3, factor), "attention", EXACT)
    assert torch.equal(qkv_P, before_P)


def test_varlen_kernel_of_this_release_accepts_our_arguments() -> None:
    found = packed._find_varlen_kernel()
    assert found is not None
    kernel, options = found
    assert kernel is varlen_attn
    qkv, ends = torch.empty(3, 1, 8), torch.tensor([0, 3])
    inspect.signature(kernel).bind(qkv, qkv, qkv, ends, ends, 3, 3, **options)
    assert options.get("window_size") == (-1, 0) or options.get("is_causal") is True
    assert options.get("num_splits", 1) == 1


def test_fp32_on_a_gpu_uses_runs() -> None:
    """The kernel supports bf16 and fp16 only. The choice depends on the device passed in; the tensors here are on the CPU."""
    qkv_P = random_qkv(5, 3, 4).float()
    attend = packed.make_packed_attention([3, 2], torch.device("cuda"), torch.float32)
    assert_close(attend(qkv_P, 3, 0.5), numpy_attention(qkv_P, [3, 2], 3, 0.5), "attention")
