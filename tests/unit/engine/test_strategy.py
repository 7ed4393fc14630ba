"""Strategy in one process: precision, loss scaling, activation checkpointing, saved state."""

import math
from collections.abc import Callable

import pytest
import torch
from support.toy import reference_gradients, toy_classifier, toy_split

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import StepBatches, TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import DTYPES
from agnews_dist.engine.engine import INITIAL_LOSS_SCALE, Engine, choose_bucket_megabytes
from agnews_dist.engine.strategy import Strategy
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features, uncached_features
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import NonFiniteError, accumulate_gradients, train_step

LENGTHS = [30, 27, 25, 25, 20, 18, 12, 9, 7, 5, 3, 1]


def engine_of(precision: str) -> Engine:
    return Engine(World(), device="cpu", precision=precision, allow_tf32=False, timeout_seconds=60)


def one_step() -> StepBatches:
    """Return all examples as one global batch of several micro-batches."""
    table = TokenTable(toy_split(LENGTHS), pad_id=0, device=torch.device("cpu"))
    settings = PlanSettings(global_batch_size=len(LENGTHS))
    (batches,) = TrainLoader(table, World(), settings, max_tokens_per_rank=120, quadratic=0.0).steps(0)
    assert len(batches.micro_batches) > 1
    return batches


def make_strategy(
    classifier: Classifier, *, scale: float | None = None, max_grad_norm: float = 0.0, sgd: bool = False
) -> tuple[Strategy, torch.optim.Optimizer]:
    suffix = classifier.suffix
    optimizer = torch.optim.SGD(suffix.parameters(), lr=1.0) if sgd else build_optimizer(suffix, lr=1e-3, weight_decay=0.1)
    strategy = Strategy(
        World(), suffix, suffix, optimizer, torch.device("cpu"), max_grad_norm=max_grad_norm, initial_loss_scale=scale
    )
    return strategy, optimizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_types_of_weights_products_and_gradients(precision: str) -> None:
    """Check the documented table: the type in which each tensor is stored, computed and reduced."""
    engine, classifier = engine_of(precision), toy_classifier(2)
    place_classifier(classifier, engine, fast_path=True)
    low, full = DTYPES[precision], torch.float32
    assert {weight.dtype for weight in classifier.prefix.parameters()} == {low}, "frozen weights"
    batches = one_step()
    features = classifier.prefix.features(batches.micro_batches[0].tokens_BT, batches.micro_batches[0].lengths_B)
    assert features.hidden_BTD.dtype == low, "features"

    products: set[torch.dtype] = set()
    for block in classifier.suffix.h.values():
        block.mlp.c_fc.register_forward_hook(lambda module, args, output: products.add(output.dtype))
    assert classifier.suffix.train()(*features).dtype == full, "logits"
    assert products == {low}, "products of the trainable part"

    optimizer = build_optimizer(classifier.suffix, lr=1e-3, weight_decay=0.1)
    strategy = engine.prepare(classifier.suffix, optimizer, max_grad_norm=1.0)
    accumulate_gradients(engine, uncached_features(classifier.prefix), strategy, batches)
    gradients = [weight.grad for weight in classifier.suffix.parameters()]
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {full}
    assert None not in gradients
    strategy.update()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(gradients)
    assert {moment.dtype for moment in moments} == {full}
    assert {weight.dtype for weight in classifier.suffix.parameters()} == {full}


def test_loss_scale_does_not_change_the_update() -> None:
    """Check that gradients are unscaled before clipping: norm and update equal the reference."""
    classifier, engine = toy_classifier(), engine_of("fp32")
    classifier.suffix.double()
    classifier.prefix.double()
    before = {name: value.detach().clone() for name, value in classifier.suffix.named_parameters()}
    reference = reference_gradients(LENGTHS)
    norm = math.sqrt(sum(float(value.square().sum()) for value in reference.values()))
    strategy, _ = make_strategy(classifier, scale=INITIAL_LOSS_SCALE, max_grad_norm=norm / 2, sgd=True)
    result = train_step(engine, uncached_features(classifier.prefix), strategy, one_step())
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)
    for name, value in classifier.suffix.named_parameters():
        torch.testing.assert_close(before[name] - value.detach(), reference[name] / 2, rtol=1e-5, atol=1e-9)


def overflowing(classifier: Classifier, factor: float) -> Callable[[Batch], Features]:
    """Return features whose gradients overflow if the scale is too large; the loss stays finite."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    classifier.suffix.out_head.register_forward_hook(lambda module, args, output: Overflow.apply(output))
    return uncached_features(classifier.prefix)


def test_an_overflow_halves_the_scale_and_skips_the_update() -> None:
    classifier, engine = toy_classifier(), engine_of("fp32")
    embed = overflowing(classifier, 1e37)
    strategy, optimizer = make_strategy(classifier, scale=INITIAL_LOSS_SCALE)
    before = strategy.gather_weights()
    assert strategy.loss_scale == INITIAL_LOSS_SCALE
    result = train_step(engine, embed, strategy, one_step())
    assert result.grad_norm is None
    assert math.isfinite(result.loss)
    assert strategy.loss_scale == INITIAL_LOSS_SCALE / 2
    assert all(torch.equal(before[name], value) for name, value in strategy.gather_weights().items())
    assert not optimizer.state, "a skipped update creates no moments"
    assert all(weight.grad is None for weight in classifier.suffix.parameters()), "gradients are cleared"


def test_an_overflow_at_scale_1_raises() -> None:
    """Check the error. Otherwise fp16 would silently skip every update to the end of the run."""
    classifier, engine = toy_classifier(), engine_of("fp32")
    embed = overflowing(classifier, math.inf)
    strategy, _ = make_strategy(classifier, scale=4.0)
    before = strategy.gather_weights()
    assert [train_step(engine, embed, strategy, one_step()).grad_norm for _ in range(2)] == [None, None]
    assert strategy.loss_scale == 1.0
    with pytest.raises(
        NonFiniteError, match=r"gradient norm (inf|nan) in a global batch of examples 0, 1.*: no rank updated.*Lower optim.lr"
    ):
        train_step(engine, embed, strategy, one_step())
    assert all(torch.equal(before[name], value) for name, value in strategy.gather_weights().items())


@pytest.mark.parametrize("trainable_blocks", [1, 3])
def test_activation_checkpointing_gives_the_same_gradients(trainable_blocks: int) -> None:
    """Check that weights get their gradients although features need none, with the same dropout masks."""
    batch, found, kept = one_step().micro_batches[0], [], []
    for checkpointing in (False, True):
        classifier = toy_classifier(trainable_blocks, dropout=0.2)
        classifier.suffix.checkpointing = checkpointing
        features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
        torch.manual_seed(3)
        num_elements = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_elements
            num_elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = classifier.suffix.train()(*features).square().sum()
        loss.backward()
        found.append({name: value.grad for name, value in classifier.suffix.named_parameters()})
        kept.append(num_elements)
    plain, recomputed = found
    assert all(gradient is not None for gradient in plain.values())
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())
    assert kept[1] < kept[0] / 3, "it keeps fewer activations"


def test_evaluation_recomputes_nothing() -> None:
    classifier, calls = toy_classifier(2), []
    classifier.suffix.checkpointing = True
    classifier.suffix.h["1"].register_forward_pre_hook(lambda *_: calls.append(1))
    batch = one_step().micro_batches[0]
    features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    classifier.suffix.eval()(*features).sum().backward()
    assert len(calls) == 1
    classifier.suffix.train()(*features).sum().backward()
    assert len(calls) == 3, "control: training computes the block once more for the backward pass"


def test_load_weights_restores_gathered_weights() -> None:
    classifier, engine = toy_classifier(), engine_of("fp32")
    strategy, _ = make_strategy(classifier)
    state = strategy.gather_weights()
    assert state.keys() == dict(classifier.suffix.named_parameters()).keys()
    train_step(engine, uncached_features(classifier.prefix), strategy, one_step())
    assert not any(torch.equal(state[name], value) for name, value in classifier.suffix.named_parameters() if value.ndim > 1)
    strategy.load_weights(state)
    assert all(torch.equal(state[name], value) for name, value in classifier.suffix.named_parameters())


def test_load_state_continues_in_a_new_optimizer() -> None:
    """Compare with torch's AdamW in the same process. Types and devices of the state must be equal too."""
    classifier, engine = toy_classifier(), engine_of("fp32")
    strategy, optimizer = make_strategy(classifier)
    embed = uncached_features(classifier.prefix)
    for _ in range(3):
        train_step(engine, embed, strategy, one_step())
    state = {name: value.clone() for name, value in strategy.gather_state()}
    assert strategy.num_updates == 3
    train_step(engine, embed, strategy, one_step())

    other = toy_classifier()
    torch.nn.init.normal_(other.suffix.out_head.weight)
    resumed, new = make_strategy(other)
    resumed.load_state(state, 3)
    train_step(engine, embed, resumed, one_step())
    for weight, theirs in zip(classifier.suffix.parameters(), other.suffix.parameters(), strict=True):
        assert torch.equal(weight, theirs)
        found, expected = new.state[theirs], optimizer.state[weight]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value)
            assert (found[name].dtype, found[name].device) == (value.dtype, value.device)


def test_load_scaling_continues_counting_clean_steps() -> None:
    classifier, engine = toy_classifier(), engine_of("fp32")
    strategy, _ = make_strategy(classifier, scale=INITIAL_LOSS_SCALE)
    assert strategy.scaling == (INITIAL_LOSS_SCALE, 0)
    strategy.load_scaling(8.0, 1998)  # torch doubles it after 2,000 steps without an overflow
    found = [strategy.scaling]
    for _ in range(2):
        train_step(engine, uncached_features(classifier.prefix), strategy, one_step())
        found.append(strategy.scaling)
    assert found == [(8.0, 1998), (8.0, 1999), (16.0, 0)]


def test_load_scaling_does_nothing_without_fp16() -> None:
    strategy, _ = make_strategy(toy_classifier())
    strategy.load_scaling(8.0, 5)
    assert strategy.scaling == (1.0, 0)


@pytest.mark.parametrize(("num_bytes", "megabytes"), [(28 * 10**6, 4), (2**30, 128), (256 * 2**20, 32), (0, 4)])
def test_bucket_megabytes(num_bytes: int, megabytes: int) -> None:
    assert choose_bucket_megabytes(num_bytes) == megabytes
