"""The block for the last token only, against Hugging Face's block on one text at a time.

Hugging Face's block gets no mask: the last token of a text without padding attends to all tokens.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from agnews_dist.model.last_token import run_last_token_block, select_last_rows

WIDTH, NUM_HEADS = 12, 3
LENGTHS = [1, 2, 9, 4, 1, 12, 9]
EXACT = 1e-12
"""Relative tolerance in fp64, for about a hundred roundings."""
NUM_DRAWS = 20_000
STANDARD_ERRORS = 5.0
"""Exceeded by chance once in 1.7 million comparisons. There are about a hundred, from fixed seeds."""


def block_with(*, dtype: torch.dtype = torch.float64, **changes: object) -> GPT2Block:
    """Return Hugging Face's block with eager attention; all parameters are random and large enough to matter."""
    shape: dict[str, object] = {"n_embd": WIDTH, "n_head": NUM_HEADS, "n_layer": 2, "attn_implementation": "eager"}
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0}
    generator = torch.Generator().manual_seed(11)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(12)
        block = GPT2Block(GPT2Config(**(shape | dropout | changes)), layer_idx=1).to(dtype)
        for weight in block.parameters():
            weight.add_(0.4 * torch.randn(weight.shape, generator=generator, dtype=dtype))
    return block.eval()


def ragged_hidden(lengths: list[int], *, padding: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random hidden_BTD; `padding` scales only the rows in the padding."""
    generator = torch.Generator().manual_seed(5)
    hidden_BTD = torch.randn(len(lengths), max(lengths) + 2, WIDTH, generator=generator, dtype=dtype)
    is_padding_BT = torch.arange(hidden_BTD.shape[1]) >= torch.tensor(lengths)[:, None]
    return torch.where(is_padding_BT[..., None], padding * hidden_BTD, hidden_BTD)


def run_hugging_face(block: GPT2Block, hidden_BTD: Tensor, lengths: list[int]) -> Tensor:
    """Return last_BD, from each text alone without padding."""
    rows = []
    for row, length in enumerate(lengths):
        output = block(hidden_BTD[row : row + 1, :length])
        rows.append((output[0] if isinstance(output, tuple) else output)[0, -1])
    return torch.stack(rows)


Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]
"""last_BD, the gradient of the input, the gradients of the parameters."""


def outcome(forward: Callable[[GPT2Block, Tensor], Tensor], block: GPT2Block, hidden_BTD: Tensor) -> Outcome:
    block, hidden_BTD = copy.deepcopy(block), hidden_BTD.clone().requires_grad_()
    last_BD = forward(block, hidden_BTD)
    # Every element has its own weight, so that errors cannot cancel.
    weights_BD = torch.linspace(-1, 2, last_BD.numel(), dtype=last_BD.dtype).view_as(last_BD)
    (weights_BD * last_BD).sum().backward()
    gradients = {name: weight.grad for name, weight in block.named_parameters() if weight.grad is not None}
    assert len(gradients) == 12
    assert hidden_BTD.grad is not None
    return last_BD.detach(), hidden_BTD.grad, gradients


def ours(lengths: list[int]) -> Callable[[GPT2Block, Tensor], Tensor]:
    return lambda block, hidden_BTD: run_last_token_block(block, hidden_BTD, torch.tensor(lengths))


def theirs(lengths: list[int]) -> Callable[[GPT2Block, Tensor], Tensor]:
    return lambda block, hidden_BTD: run_hugging_face(block, hidden_BTD, lengths)


def thirds(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a gradient of `c_attn` into those of query, key and value."""
    query, key, value = gradient.split(WIDTH, dim=-1)
    return query, key, value


def assert_same(actual: Outcome, expected: Outcome, relative: float) -> None:
    names = ["the output", "the gradient of the input", *expected[2]]
    for name, ours, theirs in zip(
        names, [*actual[:2], *actual[2].values()], [*expected[:2], *expected[2].values()], strict=True
    ):
        size = theirs.abs().max()
        assert size > 1e-3, f"{name} is too small to compare"
        assert (ours - theirs).abs().max() <= relative * size, name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"n_head": 1},
        {"n_head": WIDTH},
        {"n_inner": 7},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 0.3},
    ],
    ids=str,
)
def test_output_and_gradients_equal_hugging_face(change: dict[str, object]) -> None:
    block, hidden_BTD = block_with(**change), ragged_hidden(LENGTHS)
    assert_same(outcome(ours(LENGTHS), block, hidden_BTD), outcome(theirs(LENGTHS), block, hidden_BTD), EXACT)


def test_another_token_than_the_last_is_detected() -> None:
    """Check the tolerance, the lengths and the weights of the sum."""
    block, hidden_BTD = block_with(), ragged_hidden(LENGTHS)
    expected = outcome(theirs(LENGTHS), block, hidden_BTD)
    one_more = [length + 1 for length in LENGTHS]
    with pytest.raises(AssertionError, match="the output"):
        assert_same(outcome(ours(one_more), block, hidden_BTD), expected, 0.1)


def test_gradient_of_the_key_bias_is_exactly_zero() -> None:
    """The bias adds the same to every score. Zero, not None: optimizers and DDP expect a gradient of every weight."""
    block, hidden_BTD = block_with(), ragged_hidden(LENGTHS)
    ours_query, ours_key, ours_value = thirds(outcome(ours(LENGTHS), block, hidden_BTD)[2]["attn.c_attn.bias"])
    _, theirs_key, _ = thirds(outcome(theirs(LENGTHS), block, hidden_BTD)[2]["attn.c_attn.bias"])
    assert torch.equal(ours_key, torch.zeros(WIDTH, dtype=torch.float64))
    assert theirs_key.abs().max() < 1e-12, "zero up to rounding"
    assert min(ours_query.abs().max(), ours_value.abs().max()) > 1e-3


def test_text_of_one_token_has_no_query_and_key_gradients() -> None:
    """The attention weight is always 1, so only the value has a gradient."""
    lengths = [1, 1, 1]
    gradients = outcome(ours(lengths), block_with(), ragged_hidden(lengths))[2]
    for name in ("attn.c_attn.weight", "attn.c_attn.bias"):
        query, key, value = thirds(gradients[name])
        assert not query.any()
        assert not key.any()
        assert value.abs().max() > 1e-3


@pytest.mark.parametrize("padding", [0.0, -3.0, 1e15], ids=str)
def test_padding_has_no_influence(padding: float) -> None:
    """Check every bit of the output and of the gradients, in fp32, for finite padding."""
    block = block_with(dtype=torch.float32)
    expected = outcome(ours(LENGTHS), block, ragged_hidden(LENGTHS, dtype=torch.float32))
    actual = outcome(ours(LENGTHS), block, ragged_hidden(LENGTHS, padding=padding, dtype=torch.float32))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    for name, gradient in actual[2].items():
        assert torch.equal(gradient, expected[2][name]), name
    is_padding_BT = torch.arange(actual[1].shape[1]) >= torch.tensor(LENGTHS)[:, None]
    assert is_padding_BT.any()
    assert not actual[1][is_padding_BT].any(), "padding gets no gradient"
    assert actual[1][~is_padding_BT].any(dim=-1).all(), "every real token does"


def test_select_last_rows_are_those_before_the_padding() -> None:
    hidden_BTD = torch.arange(24).view(3, 4, 2)
    assert select_last_rows(hidden_BTD, torch.tensor([1, 4, 2])).tolist() == [[0, 1], [14, 15], [18, 19]]


def test_dropout_rate_0_equals_evaluation() -> None:
    block, hidden_BTD = block_with(), ragged_hidden(LENGTHS)
    in_eval = run_last_token_block(block, hidden_BTD, torch.tensor(LENGTHS))
    assert torch.equal(run_last_token_block(block.train(), hidden_BTD, torch.tensor(LENGTHS)), in_eval)


class Mask(nn.Module):
    """A replacement of dropout that multiplies by a given mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(())

    def forward(self, values: Tensor) -> Tensor:
        return values * self.mask


def test_output_and_gradients_equal_hugging_face_under_the_same_masks() -> None:
    """Use the same masks at all three places of dropout.

    With `reorder_and_upcast_attn`, Hugging Face's attention weights pass through the block's dropout module, which a test can
    replace. Its scores are then fp32, hence the tolerance.
    """
    block, hidden_BTD = block_with(reorder_and_upcast_attn=True), ragged_hidden(LENGTHS)
    generator = torch.Generator().manual_seed(2)
    num_texts, num_tokens = hidden_BTD.shape[:2]
    shapes = [(num_texts, NUM_HEADS, num_tokens), (num_texts, WIDTH), (num_texts, WIDTH)]
    masks = [torch.bernoulli(torch.full(shape, 0.7, dtype=torch.float64), generator=generator) / 0.7 for shape in shapes]
    block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.dropout = sites = (Mask(), Mask(), Mask())
    assert [type(site) for site in sites] == [Mask] * 3

    def set_masks(block: GPT2Block, given: list[Tensor]) -> None:
        places = (block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.dropout)
        for place, mask in zip(places, given, strict=True):
            place.mask = mask

    def ours_masked(block: GPT2Block, hidden_BTD: Tensor) -> Tensor:
        set_masks(block, masks)
        return ours(LENGTHS)(block, hidden_BTD)

    def theirs_masked(block: GPT2Block, hidden_BTD: Tensor) -> Tensor:
        rows = []
        for row, length in enumerate(LENGTHS):
            set_masks(block, [masks[0][row, :, None, :length], masks[1][row], masks[2][row]])
            rows.append(run_hugging_face(block, hidden_BTD[row : row + 1], [length]))
        return torch.cat(rows)

    actual, expected = outcome(ours_masked, block, hidden_BTD), outcome(theirs_masked, block, hidden_BTD)
    assert_same(actual, expected, 1e-5)
    unmasked = outcome(ours(LENGTHS), block, hidden_BTD)
    assert (unmasked[0] - expected[0]).abs().max() > 0.1, "control: the masks have an effect"


def moments(draws_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and covariances of the elements in one vector, and the standard error of each."""
    centred_ND = draws_ND - draws_ND.mean(dim=0)
    products = torch.einsum("nd,ne->nde", centred_ND, centred_ND).flatten(1)
    samples = torch.cat([draws_ND, products], dim=1)
    return samples.mean(dim=0), samples.std(dim=0) / len(draws_ND) ** 0.5


def distance(ours_ND: Tensor, theirs_ND: Tensor) -> float:
    """Return the largest difference of a moment, in standard errors of the difference."""
    (our_moments, our_error), (their_moments, their_error) = moments(ours_ND), moments(theirs_ND)
    error = (our_error**2 + their_error**2).sqrt()
    # Constant elements may differ by rounding only.
    return float(((our_moments - their_moments).abs() / error.clamp_min(1e-9)).max())


def draw(forward: Callable[[GPT2Block, Tensor], Tensor], block: GPT2Block, text_TD: Tensor, seed: int) -> Tensor:
    """Return the last row of one text under `NUM_DRAWS` masks, from one batch of copies."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return forward(block, text_TD.expand(NUM_DRAWS, -1, -1))


def all_ours(block: GPT2Block, hidden_BTD: Tensor) -> Tensor:
    return run_last_token_block(block, hidden_BTD, torch.full((len(hidden_BTD),), hidden_BTD.shape[1]))


def all_theirs(block: GPT2Block, hidden_BTD: Tensor) -> Tensor:
    output = block(hidden_BTD)
    return (output[0] if isinstance(output, tuple) else output)[:, -1]


DROPOUTS = {"attention": {"attn_pdrop": 0.3}, "residual": {"resid_pdrop": 0.3}}
DROPOUTS["both"] = DROPOUTS["attention"] | DROPOUTS["residual"]


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("rates", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_has_the_distribution_of_hugging_face(rates: dict[str, float], num_tokens: int) -> None:
    """Compare means, variances and covariances over 20,000 draws: they agree within 5 standard errors.

    Elements covary, as one attention weight scales a whole head and the MLP mixes the elements.
    """
    block = block_with(**rates).train()
    text_TD = ragged_hidden([num_tokens])[0, :num_tokens]
    expected_ND = draw(all_theirs, block, text_TD, seed=1)
    assert expected_ND.std(dim=0).min() > 0.01, "every element varies"
    assert distance(draw(all_ours, block, text_TD, seed=2), expected_ND) < STANDARD_ERRORS
    assert distance(draw(all_theirs, block, text_TD, seed=3), expected_ND) < STANDARD_ERRORS, (
        "control: two draws of Hugging Face"
    )


class BeforeSoftmax(nn.Module):
    """A dropout of scores instead of weights."""

    def forward(self, weights_BHT: Tensor) -> Tensor:
        return nn.functional.dropout(weights_BHT.log(), 0.3).softmax(dim=-1)


class OneMaskForAllHeads(nn.Module):
    def forward(self, weights_BHT: Tensor) -> Tensor:
        return weights_BHT * nn.functional.dropout(torch.ones_like(weights_BHT[:, :1]), 0.3)


class OneMaskForAllTexts(nn.Module):
    def forward(self, weights_BHT: Tensor) -> Tensor:
        return weights_BHT * nn.functional.dropout(torch.ones_like(weights_BHT[:1]), 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [nn.Identity(), nn.Dropout(0.33), BeforeSoftmax(), OneMaskForAllHeads(), OneMaskForAllTexts()], ids=repr
)
def test_wrong_attention_dropout_is_detected(wrong: nn.Module) -> None:
    """Try no dropout, a slightly higher rate, another place and shared masks."""
    block = block_with(**DROPOUTS["attention"]).train()
    text_TD = ragged_hidden([4])[0, :4]
    expected_ND = draw(all_theirs, block, text_TD, seed=1)
    block.attn.attn_dropout = wrong
    assert distance(draw(all_ours, block, text_TD, seed=2), expected_ND) > 2 * STANDARD_ERRORS
