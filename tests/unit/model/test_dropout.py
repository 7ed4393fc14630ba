"""Dropout by keys: against SplitMix64 in numpy, against statistics, and in the last block against Hugging Face's block.

An example's masks depend on the example alone: they are the same in any batch, with any padding, after any random draws.
"""

import itertools

import numpy as np
import pytest
import torch
from support.dropout_reference import reference_kept, reference_keys, reference_with_dropout, splitmix64
from support.toy import toy_classifier, toy_split
from torch import Tensor
from torch.nn import functional

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.model.dropout import apply_dropout, example_keys, step_key
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features

SEED, STEP, P = 17, 123, 0.2
IDS = [0, 1, 2, 3, 119_999, 2**40, -1]
SIGMAS = 5.0
"""Exceeded by chance once in 1.7 million comparisons. There are about fifty, all from fixed seeds."""


def keys_of(ids: list[int] | range, *, seed: int = SEED, step: int = STEP) -> Tensor:
    return example_keys(step_key(seed, step), torch.tensor(list(ids), dtype=torch.int64))


def mask(keys_B: Tensor, rest: tuple[int, ...], *, site: int = 0, p: float = P) -> Tensor:
    """Return which of (B, *rest) elements are kept."""
    return apply_dropout(torch.ones(len(keys_B), *rest), keys_B, site, p) != 0


def test_example_keys_are_the_published_splitmix64_sequence() -> None:
    """Compare with the published numbers for the seeds 1234567 and 0 (Rosetta Code; the paper's Java class)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [key % 2**64 for key in example_keys(1234567, torch.arange(5)).tolist()] == published
    assert example_keys(0, torch.tensor([0])).item() % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5])
def test_example_keys_equal_the_numpy_reference(seed: int) -> None:
    for step in (0, 1, 10_000_000):
        keys_B = keys_of(IDS, seed=seed, step=step)
        assert keys_B.dtype == torch.int64
        assert keys_B.numpy().view(np.uint64).tolist() == reference_keys(seed, step, IDS).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("rest", [(50,), (3, 20), (2, 3, 7)], ids=str)
def test_apply_dropout_equals_the_numpy_reference(rest: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    values = torch.randn(len(IDS), *rest, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    for site in (0, 1, 2):
        kept = torch.from_numpy(reference_kept(reference_keys(SEED, STEP, IDS), site, p, rest))
        left = apply_dropout(values, keys_of(IDS), site, p)
        assert left.dtype == dtype
        assert torch.equal(left, torch.where(kept, values / (1 - p), 0))
        (gradient,) = torch.autograd.grad(left.sum(), values)
        assert torch.equal(gradient, torch.where(kept, torch.ones_like(values) / (1 - p), 0))


def test_apply_dropout_with_rates_0_and_1() -> None:
    values = torch.randn(len(IDS), 9).requires_grad_()
    assert apply_dropout(values, keys_of(IDS), 0, 0.0) is values
    nothing_left = apply_dropout(values, keys_of(IDS), 0, 1.0)
    assert torch.equal(nothing_left, torch.zeros(len(IDS), 9))
    (gradient,) = torch.autograd.grad(nothing_left.sum(), values)
    assert torch.equal(gradient, torch.zeros(len(IDS), 9)), "zeros, not None: engines expect a gradient of every weight"


def test_apply_dropout_replaces_infinities_by_zero() -> None:
    values = torch.full((len(IDS), 100), float("inf"))
    left = apply_dropout(values, keys_of(IDS), 0, 0.5)
    assert left.isinf().any()
    assert (left[~left.isinf()] == 0).all()


def test_apply_dropout_of_no_examples() -> None:
    assert apply_dropout(torch.ones(0, 3, 4), keys_of([]), 0, P).shape == (0, 3, 4)


@pytest.mark.parametrize("rest", [(64,), (12, 64)], ids=str)
def test_masks_depend_on_the_example_alone(rest: tuple[int, ...]) -> None:
    """Compare masks alone, in any order, in any batch, and with any number of columns."""
    ids = list(range(40))
    together = mask(keys_of(ids), rest)
    assert together.any()
    assert not together.all()
    order = np.random.default_rng(3).permutation(40)
    assert torch.equal(mask(keys_of([ids[i] for i in order]), rest), together[order])
    for row in (0, 7, 39):
        assert torch.equal(mask(keys_of(ids[row : row + 1]), rest), together[row : row + 1])
    for length in (1, 13, 300):
        shared = min(length, rest[-1])
        other = mask(keys_of(ids), (*rest[:-1], length))
        assert torch.equal(other[..., :shared], together[..., :shared]), f"with {length} columns"


def correlation(first: Tensor, second: Tensor) -> float:
    """Return the correlation of two masks, in standard errors."""
    pairs = np.corrcoef(first.flatten().numpy(), second.flatten().numpy())
    return float(abs(pairs[0, 1]) * first.numel() ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_of_neighbours_do_not_correlate(p: float) -> None:
    """Masks of neighbouring steps, seeds, examples, sites, rows and elements do not correlate, at distances 1 and 2."""
    rest = (12, 64)

    def of(*, seed: int = SEED, step: int = STEP, first: int = 0, site: int = 0) -> Tensor:
        return mask(keys_of(range(first, first + 500), seed=seed, step=step), rest, site=site, p=p)

    base = of()
    assert correlation(base, of()) > 100, "control: with itself"
    for distance in (1, 2):
        others = {
            "step": of(step=STEP + distance),
            "seed": of(seed=SEED + distance),
            "example": of(first=distance),
            "site": of(site=distance),
            "step and seed": of(step=STEP + distance, seed=SEED - distance),
            "step and example": of(step=STEP + distance, first=-distance),
        }
        for what, other in others.items():
            assert correlation(base, other) < SIGMAS, f"{what} at distance {distance}"
        assert correlation(base[..., distance:], base[..., :-distance]) < SIGMAS, "elements"
        assert correlation(base[:, distance:], base[:, :-distance]) < SIGMAS, "rows"


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_masks_have_the_rate_and_keep_the_mean(p: float) -> None:
    """Check a million draws of a thousand examples, in total and for each example and element."""
    kept = mask(keys_of(range(1000)), (1000,), p=p).double()
    error = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < SIGMAS * error / 1000
    for axis in (0, 1):
        rates = kept.mean(dim=axis)
        assert (rates - (1 - p)).abs().max() < 6 * error / 1000**0.5, "the largest of a thousand"
        assert rates.std() == pytest.approx(error / 1000**0.5, rel=SIGMAS / 2000**0.5)
    ones = torch.ones(1000, 1000, dtype=torch.float64)
    mean = apply_dropout(ones, keys_of(range(1000)), 0, p).mean()
    assert abs(mean - 1) < SIGMAS * error / (1 - p) / 1000


def test_mask_patterns_are_equally_frequent() -> None:
    """Check chi-square over the 256 patterns of eight consecutive elements, and of one element in eight steps."""
    consecutive = mask(keys_of(range(2000)), (512,), p=0.5).numpy().reshape(-1, 8)
    steps = [mask(keys_of(range(2000), step=step), (64,), p=0.5).numpy().reshape(-1) for step in range(8)]
    for bits in (consecutive, np.stack(steps, axis=1)):
        counts = np.bincount(bits @ (1 << np.arange(8)), minlength=256)
        expected = len(bits) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < SIGMAS * (2 * 255) ** 0.5


def test_masks_do_not_use_the_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = mask(keys_of(IDS), (3, 30))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(mask(keys_of(IDS), (3, 30)), first)


# --- in the suffix --------------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 17, 9, 2, 30, 9, 13]
EXACT = 1e-11
"""Relative, in fp64."""


def classifier_with(
    trainable_blocks: int = 1, *, dtype: torch.dtype = torch.float64, checkpointing: bool = False
) -> Classifier:
    classifier = toy_classifier(trainable_blocks, dropout=P)
    classifier.prefix.to(dtype)
    classifier.suffix.to(dtype).train()
    classifier.suffix.checkpointing = checkpointing
    return classifier


def batch_of(rows: list[int]) -> Batch:
    return TokenTable(toy_split(LENGTHS), pad_id=0, device=torch.device("cpu")).batch(np.array(rows))


ALL = list(range(len(LENGTHS)))
Outcome = tuple[Tensor, dict[str, Tensor]]
"""logits_BC, the gradients of the sum of losses."""


def outcome(classifier: Classifier, rows: list[int], *, step: int = STEP, extra: int = 0) -> Outcome:
    batch = batch_of(rows)
    hidden_BTD, lengths_B = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    features = Features(functional.pad(hidden_BTD, (0, 0, 0, extra), value=3.0), lengths_B)
    # Other random states for other batches.
    torch.manual_seed(len(rows) + 100 * extra)
    logits_BC = classifier.suffix(*features, example_keys(step_key(SEED, step), batch.ids_B))
    classifier.suffix.zero_grad()
    functional.cross_entropy(logits_BC, batch.labels_B, reduction="sum").backward()
    gradients = {name: weight.grad for name, weight in classifier.suffix.named_parameters()}
    assert None not in gradients.values()
    return logits_BC.detach(), gradients  # type: ignore[return-value]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_last_block_equals_hugging_face_under_the_same_masks(checkpointing: bool) -> None:
    """Compare logits and all gradients with Hugging Face's full block on padded texts under numpy's masks."""
    keys_B = reference_keys(SEED, STEP, ALL)
    expected_BC, expected = reference_with_dropout(LENGTHS, keys_B, P)
    logits_BC, gradients = outcome(classifier_with(checkpointing=checkpointing), ALL)
    assert relative(logits_BC, expected_BC) < EXACT
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # That of the key's bias is zero in exact arithmetic, and rounding in Hugging Face's: see test_last_token.py.
        assert relative(gradient / len(LENGTHS), expected[name]) < EXACT, name

    others = {"another step": reference_keys(SEED, STEP + 1, ALL), "other examples": reference_keys(SEED, STEP, ALL[::-1])}
    for what, other_keys_B in others.items():
        other_BC, _ = reference_with_dropout(LENGTHS, other_keys_B, P)
        assert relative(logits_BC, other_BC) > 0.01, f"control: {what}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "parts", [[ALL[::-1]], [[6, 0], [1], [7, 5, 2], [4, 3]], [[row] for row in ALL]], ids=["reversed", "split", "alone"]
)
def test_training_results_of_an_example_do_not_depend_on_its_batch(parts: list[list[int]], checkpointing: bool) -> None:
    classifier = classifier_with(checkpointing=checkpointing)
    together_BC, together = outcome(classifier, ALL)
    sums = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for extra, rows in enumerate(parts):
        logits_BC, gradients = outcome(classifier, rows, extra=extra)
        assert relative(logits_BC, together_BC[rows]) < EXACT
        sums = {name: total + gradients[name] for name, total in sums.items()}
    for name, total in sums.items():
        assert relative(total, together[name]) < EXACT, name
    assert relative(outcome(classifier, ALL, step=STEP + 1)[0], together_BC) > 0.01, "another step, other masks"


def test_keys_have_no_effect_in_evaluation() -> None:
    classifier = classifier_with()
    classifier.suffix.eval()
    batch = batch_of(ALL)
    features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    assert torch.equal(classifier.suffix(*features, keys_of(ALL)), classifier.suffix(*features))


def test_dropout_without_keys_uses_the_random_state() -> None:
    classifier = classifier_with()
    batch = batch_of(ALL)
    features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(classifier.suffix(*features).detach())
    assert torch.equal(found[0], found[1])
    assert relative(found[2], found[0]) > 0.01


@pytest.mark.parametrize("part", ["a lower block", "the plain path"])
def test_dropout_outside_the_keys_repeats_with_the_seed(part: str) -> None:
    """The keys do not reach the blocks below the last one, nor Hugging Face's own forward."""
    classifier = classifier_with(1 if part == "the plain path" else 2)
    classifier.use_fast_path(part != "the plain path")
    batch = batch_of(ALL)
    features, found = classifier.prefix.features(batch.tokens_BT, batch.lengths_B), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(classifier.suffix(*features, keys_of(ALL)).detach())
    assert torch.equal(found[0], found[1])
    assert relative(found[2], found[0]) > 0.01


@pytest.mark.parametrize("trainable_blocks", [0, 1, 3])
def test_keys_work_with_any_number_of_trainable_blocks(trainable_blocks: int) -> None:
    assert len(outcome(classifier_with(trainable_blocks), ALL)[0]) == len(LENGTHS)


def test_masks_are_the_same_under_bf16_autocast() -> None:
    """Logits are within bf16's rounding of those with the same masks in fp32, far from others, and repeatable to the bit."""
    exact = classifier_with(dtype=torch.float32)
    exact_BC, other_BC = outcome(exact, ALL)[0], outcome(exact, ALL, step=STEP + 1)[0]
    exact.suffix.autocast_dtype = torch.bfloat16
    rounded_BC = outcome(exact, ALL)[0]
    assert 0 < relative(rounded_BC, exact_BC) < 0.05
    assert relative(rounded_BC, other_BC) > 0.2
    assert torch.equal(outcome(exact, ALL)[0], rounded_BC)
    again_BC = torch.cat([outcome(exact, [row], extra=row)[0] for row in ALL])
    assert relative(again_BC, exact_BC) < 0.05, "each alone"


def test_numpy_reference_depends_on_every_argument() -> None:
    """Check the reference itself: every argument changes it."""
    base = reference_keys(1, 2, [3])
    others = [reference_keys(*changed) for changed in ((2, 2, [3]), (1, 3, [3]), (1, 2, [4]))]
    assert len({int(keys[0]) for keys in (base, *others)}) == 4
    masks = [reference_kept(base, site, 0.5, (200,)) for site in (0, 1)]
    assert not np.array_equal(*masks)
    assert all(a != b for a, b in itertools.pairwise(splitmix64(base, np.arange(9)).tolist()))
