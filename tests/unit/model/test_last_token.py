"""The block computed for the last token alone, against Hugging Face's own block run in full on one text at a time.

Hugging Face's block gets no mask here: a text without padding needs none at its last token, which sees all others.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from agnews_dist.model.last_token import last_rows, last_token_block

WIDTH, NUM_HEADS = 12, 3
LENGTHS = [1, 2, 9, 4, 1, 12, 9]
EXACT = 1e-12
"""Relative, in fp64: some hundred roundings."""
NUM_DRAWS = 20_000
STANDARD_ERRORS = 5.0
"""Chance passes this once in 1.7 million comparisons; some hundred are made, from fixed seeds."""


def block_with(*, dtype: torch.dtype = torch.float64, **changes: object) -> GPT2Block:
    """Hugging Face's block, attention step by step; norms, biases and weights random and large enough to be seen."""
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
    """Random hidden_BTD, the same in the texts whatever `padding` is: the size of what lies behind them."""
    generator = torch.Generator().manual_seed(5)
    hidden_BTD = torch.randn(len(lengths), max(lengths) + 2, WIDTH, generator=generator, dtype=dtype)
    is_padding_BT = torch.arange(hidden_BTD.shape[1]) >= torch.tensor(lengths)[:, None]
    return torch.where(is_padding_BT[..., None], padding * hidden_BTD, hidden_BTD)


def by_huggingface(block: GPT2Block, hidden_BTD: Tensor, lengths: list[int]) -> Tensor:
    """last_BD of each text run alone, without padding."""
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
    # Every element has a weight of its own, so that no two errors cancel.
    weights_BD = torch.linspace(-1, 2, last_BD.numel(), dtype=last_BD.dtype).view_as(last_BD)
    (weights_BD * last_BD).sum().backward()
    gradients = {name: weight.grad for name, weight in block.named_parameters() if weight.grad is not None}
    assert len(gradients) == 12
    assert hidden_BTD.grad is not None
    return last_BD.detach(), hidden_BTD.grad, gradients


def ours(lengths: list[int]) -> Callable[[GPT2Block, Tensor], Tensor]:
    return lambda block, hidden_BTD: last_token_block(block, hidden_BTD, torch.tensor(lengths))


def theirs(lengths: list[int]) -> Callable[[GPT2Block, Tensor], Tensor]:
    return lambda block, hidden_BTD: by_huggingface(block, hidden_BTD, lengths)


def thirds(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query's, key's and value's part of what belongs to `c_attn`."""
    query, key, value = gradient.split(WIDTH, dim=-1)
    return query, key, value


def assert_same(actual: Outcome, expected: Outcome, relative: float) -> None:
    names = ["the output", "the gradient of the input", *expected[2]]
    for name, ours, theirs in zip(
        names, [*actual[:2], *actual[2].values()], [*expected[:2], *expected[2].values()], strict=True
    ):
        size = theirs.abs().max()
        assert size > 1e-3, f"{name} is nothing to compare with"
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
def test_output_and_all_gradients_are_huggingface_s(change: dict[str, object]) -> None:
    block, hidden_BTD = block_with(**change), ragged_hidden(LENGTHS)
    assert_same(outcome(ours(LENGTHS), block, hidden_BTD), outcome(theirs(LENGTHS), block, hidden_BTD), EXACT)


def test_another_token_than_the_last_would_be_seen() -> None:
    """The negative control of the tolerance, the lengths and the weights of the sum."""
    block, hidden_BTD = block_with(), ragged_hidden(LENGTHS)
    expected = outcome(theirs(LENGTHS), block, hidden_BTD)
    one_more = [length + 1 for length in LENGTHS]
    with pytest.raises(AssertionError, match="the output"):
        assert_same(outcome(ours(one_more), block, hidden_BTD), expected, 0.1)


def test_the_key_s_bias_gets_a_gradient_of_exactly_zero() -> None:
    """It adds the same to every score of a query. Zero, not None: optimizers and DDP expect a gradient of every weight."""
    block, hidden_BTD = block_with(), ragged_hidden(LENGTHS)
    ours_query, ours_key, ours_value = thirds(outcome(ours(LENGTHS), block, hidden_BTD)[2]["attn.c_attn.bias"])
    _, theirs_key, _ = thirds(outcome(theirs(LENGTHS), block, hidden_BTD)[2]["attn.c_attn.bias"])
    assert torch.equal(ours_key, torch.zeros(WIDTH, dtype=torch.float64))
    assert theirs_key.abs().max() < 1e-12, "the same up to rounding: what the zero stands for"
    assert min(ours_query.abs().max(), ours_value.abs().max()) > 1e-3


def test_a_text_of_one_token_has_nothing_to_choose_from() -> None:
    """Its attention weight is 1 whatever query and key say: their gradients are exactly zero, the value's is not."""
    lengths = [1, 1, 1]
    gradients = outcome(ours(lengths), block_with(), ragged_hidden(lengths))[2]
    for name in ("attn.c_attn.weight", "attn.c_attn.bias"):
        query, key, value = thirds(gradients[name])
        assert not query.any()
        assert not key.any()
        assert value.abs().max() > 1e-3


@pytest.mark.parametrize("padding", [0.0, -3.0, 1e15], ids=str)
def test_what_lies_in_the_padding_cannot_matter(padding: float) -> None:
    """Not to the last bit of the output or of a gradient, in fp32, as long as it is finite."""
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


def test_last_rows_are_those_before_the_padding() -> None:
    hidden_BTD = torch.arange(24).view(3, 4, 2)
    assert last_rows(hidden_BTD, torch.tensor([1, 4, 2])).tolist() == [[0, 1], [14, 15], [18, 19]]


def test_dropout_of_zero_in_training_is_evaluation() -> None:
    block, hidden_BTD = block_with(), ragged_hidden(LENGTHS)
    in_eval = last_token_block(block, hidden_BTD, torch.tensor(LENGTHS))
    assert torch.equal(last_token_block(block.train(), hidden_BTD, torch.tensor(LENGTHS)), in_eval)


class Mask(nn.Module):
    """Stands where a dropout stands, with a mask that is given instead of drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(())

    def forward(self, values: Tensor) -> Tensor:
        return values * self.mask


def test_the_same_masks_give_the_same_output_and_gradients() -> None:
    """Dropout at each of its three places, with one mask for both sides.

    With `reorder_and_upcast_attn` Hugging Face's attention weights pass through the block's own dropout module, which can be
    exchanged, but its scores are fp32 then: hence the tolerance.
    """
    block, hidden_BTD = block_with(reorder_and_upcast_attn=True), ragged_hidden(LENGTHS)
    generator = torch.Generator().manual_seed(2)
    num_texts, num_tokens = hidden_BTD.shape[:2]
    shapes = [(num_texts, NUM_HEADS, num_tokens), (num_texts, WIDTH), (num_texts, WIDTH)]
    masks = [
        torch.bernoulli(torch.full(shape, 0.7, dtype=torch.float64), generator=generator) / 0.7 for shape in shapes
    ]
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
            rows.append(by_huggingface(block, hidden_BTD[row : row + 1], [length]))
        return torch.cat(rows)

    actual, expected = outcome(ours_masked, block, hidden_BTD), outcome(theirs_masked, block, hidden_BTD)
    assert_same(actual, expected, 1e-5)
    unmasked = outcome(ours(LENGTHS), block, hidden_BTD)
    assert (unmasked[0] - expected[0]).abs().max() > 0.1, "the masks change something"


def moments(draws_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the elements, end to end, and the standard error of each."""
    centred_ND = draws_ND - draws_ND.mean(dim=0)
    products = torch.einsum("nd,ne->nde", centred_ND, centred_ND).flatten(1)
    samples = torch.cat([draws_ND, products], dim=1)
    return samples.mean(dim=0), samples.std(dim=0) / len(draws_ND) ** 0.5


def distance(ours_ND: Tensor, theirs_ND: Tensor) -> float:
    """The largest difference of a moment, in standard errors of the difference."""
    (our_moments, our_error), (their_moments, their_error) = moments(ours_ND), moments(theirs_ND)
    error = (our_error**2 + their_error**2).sqrt()
    # An element that does not vary on either side must not differ but by rounding.
    return float(((our_moments - their_moments).abs() / error.clamp_min(1e-9)).max())


def draw(forward: Callable[[GPT2Block, Tensor], Tensor], block: GPT2Block, text_TD: Tensor, seed: int) -> Tensor:
    """The last row of one text under `NUM_DRAWS` masks, as many copies of the text in one batch."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return forward(block, text_TD.expand(NUM_DRAWS, -1, -1))


def all_ours(block: GPT2Block, hidden_BTD: Tensor) -> Tensor:
    return last_token_block(block, hidden_BTD, torch.full((len(hidden_BTD),), hidden_BTD.shape[1]))


def all_theirs(block: GPT2Block, hidden_BTD: Tensor) -> Tensor:
    output = block(hidden_BTD)
    return (output[0] if isinstance(output, tuple) else output)[:, -1]


DROPOUTS = {"attention": {"attn_pdrop": 0.3}, "residual": {"resid_pdrop": 0.3}}
DROPOUTS["both"] = DROPOUTS["attention"] | DROPOUTS["residual"]


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("rates", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_has_huggingface_s_distribution(rates: dict[str, float], num_tokens: int) -> None:
    """Means, variances and covariances of all elements over 20,000 draws agree within 5 standard errors; elements covary
    because one attention weight scales a whole head and the MLP mixes what was dropped before it."""
    block = block_with(**rates).train()
    text_TD = ragged_hidden([num_tokens])[0, :num_tokens]
    expected_ND = draw(all_theirs, block, text_TD, seed=1)
    assert expected_ND.std(dim=0).min() > 0.01, "every element varies"
    assert distance(draw(all_ours, block, text_TD, seed=2), expected_ND) < STANDARD_ERRORS
    assert distance(draw(all_theirs, block, text_TD, seed=3), expected_ND) < STANDARD_ERRORS, "the bound fits chance"


class BeforeSoftmax(nn.Module):
    """Drops scores instead of weights."""

    def forward(self, weights_BHT: Tensor) -> Tensor:
        return nn.functional.dropout(weights_BHT.log(), 0.3).softmax(dim=-1)


class OneMaskForAllHeads(nn.Module):
    def forward(self, weights_BHT: Tensor) -> Tensor:
        return weights_BHT * nn.functional.dropout(torch.ones_like(weights_BHT[:, :1]), 0.3)


class OneMaskForAllTexts(nn.Module):
    def forward(self, weights_BHT: Tensor) -> Tensor:
        return weights_BHT * nn.functional.dropout(torch.ones_like(weights_BHT[:1]), 0.3)


@pytest.mark.parametrize(
    "wrong", [nn.Identity(), nn.Dropout(0.33), BeforeSoftmax(), OneMaskForAllHeads(), OneMaskForAllTexts()], ids=repr
)
def test_another_dropout_of_attention_would_be_seen(wrong: nn.Module) -> None:
    """The negative controls: no dropout, a slightly higher rate, another place, masks that are shared."""
    block = block_with(**DROPOUTS["attention"]).train()
    text_TD = ragged_hidden([4])[0, :4]
    expected_ND = draw(all_theirs, block, text_TD, seed=1)
    block.attn.attn_dropout = wrong
    assert distance(draw(all_ours, block, text_TD, seed=2), expected_ND) > 2 * STANDARD_ERRORS
