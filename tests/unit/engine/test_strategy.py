"""What trains, in one process: in which types it is stored and computed, loss scaling, recomputed activations, its state."""

import math
from collections.abc import Callable

import pytest
import torch
from support.toy import reference_gradients, toy_classifier, toy_split

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.epoch_plan import PlanSettings
from agnews_dist.data.batching.loader import StepBatches, TokenTable, TrainLoader
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import DTYPES
from agnews_dist.engine.engine import FIRST_LOSS_SCALE, Engine, bucket_megabytes
from agnews_dist.engine.strategy import Strategy
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features, computed
from agnews_dist.run.setup import place
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import NonFiniteError, accumulate_gradients, train_step

LENGTHS = [30, 27, 25, 25, 20, 18, 12, 9, 7, 5, 3, 1]


def engine_of(precision: str) -> Engine:
    return Engine(World(), device="cpu", precision=precision, allow_tf32=False, timeout_seconds=60)


def one_step() -> StepBatches:
    """All examples as one global batch of two micro-batches or more."""
    table = TokenTable(toy_split(LENGTHS), pad_id=0, device=torch.device("cpu"))
    settings = PlanSettings(global_batch_size=len(LENGTHS))
    (batches,) = TrainLoader(table, World(), settings, max_tokens_per_rank=120, quadratic=0.0).steps(0)
    assert len(batches.micro_batches) > 1
    return batches


def wrap(
    classifier: Classifier, *, scale: float | None = None, max_grad_norm: float = 0.0, sgd: bool = False
) -> tuple[Strategy, torch.optim.Optimizer]:
    suffix = classifier.suffix
    optimizer = (
        torch.optim.SGD(suffix.parameters(), lr=1.0) if sgd else build_optimizer(suffix, lr=1e-3, weight_decay=0.1)
    )
    wrapped = Strategy(
        World(), suffix, suffix, optimizer, torch.device("cpu"), max_grad_norm=max_grad_norm, first_loss_scale=scale
    )
    return wrapped, optimizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_table_of_precisions(precision: str) -> None:
    """docs/ has the same table for people: stored, computed and reduced in which type."""
    engine, classifier = engine_of(precision), toy_classifier(2)
    place(classifier, engine, fast_path=True)
    low, full = DTYPES[precision], torch.float32
    assert {weight.dtype for weight in classifier.prefix.parameters()} == {low}, "frozen weights"
    batches = one_step()
    features = classifier.prefix.features(batches.micro_batches[0].tokens_BT, batches.micro_batches[0].lengths_B)
    assert features.hidden_BTD.dtype == low, "what is kept of the frozen part"

    products: set[torch.dtype] = set()
    for block in classifier.suffix.h.values():
        block.mlp.c_fc.register_forward_hook(lambda module, args, output: products.add(output.dtype))
    assert classifier.suffix.train()(*features).dtype == full, "logits"
    assert products == {low}, "products of what trains"

    optimizer = build_optimizer(classifier.suffix, lr=1e-3, weight_decay=0.1)
    wrapped = engine.prepare(classifier.suffix, optimizer, max_grad_norm=1.0)
    accumulate_gradients(engine, computed(classifier.prefix), wrapped, batches)
    gradients = [weight.grad for weight in classifier.suffix.parameters()]
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {full}
    assert None not in gradients
    wrapped.update()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(gradients)
    assert {moment.dtype for moment in moments} == {full}
    assert {weight.dtype for weight in classifier.suffix.parameters()} == {full}


def test_scaled_losses_give_the_gradient_of_the_losses() -> None:
    """The scale is gone before clipping: the norm and the update are the reference's."""
    classifier, engine = toy_classifier(), engine_of("fp32")
    classifier.suffix.double()
    classifier.prefix.double()
    before = {name: value.detach().clone() for name, value in classifier.suffix.named_parameters()}
    reference = reference_gradients(LENGTHS)
    norm = math.sqrt(sum(float(value.square().sum()) for value in reference.values()))
    wrapped, _ = wrap(classifier, scale=FIRST_LOSS_SCALE, max_grad_norm=norm / 2, sgd=True)
    result = train_step(engine, computed(classifier.prefix), wrapped, one_step())
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)
    for name, value in classifier.suffix.named_parameters():
        torch.testing.assert_close(before[name] - value.detach(), reference[name] / 2, rtol=1e-5, atol=1e-9)


def overflowing(classifier: Classifier, factor: float) -> Callable[[Batch], Features]:
    """Features whose gradients overflow where the scale is too large, while the loss stays finite."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    classifier.suffix.out_head.register_forward_hook(lambda module, args, output: Overflow.apply(output))
    return computed(classifier.prefix)


def test_a_scale_that_is_too_large_is_halved_and_the_update_left_out() -> None:
    classifier, engine = toy_classifier(), engine_of("fp32")
    embed = overflowing(classifier, 1e37)
    wrapped, optimizer = wrap(classifier, scale=FIRST_LOSS_SCALE)
    before = wrapped.full_state()
    assert wrapped.loss_scale == FIRST_LOSS_SCALE
    result = train_step(engine, embed, wrapped, one_step())
    assert result.grad_norm is None
    assert math.isfinite(result.loss)
    assert wrapped.loss_scale == FIRST_LOSS_SCALE / 2
    assert all(torch.equal(before[name], value) for name, value in wrapped.full_state().items())
    assert not optimizer.state, "no moment, no count of the update that was not"
    assert all(weight.grad is None for weight in classifier.suffix.parameters()), "the next step starts from nothing"


def test_gradients_that_overflow_without_a_scale_stop_the_run() -> None:
    """Else fp16 would leave out every update to the end of the run, in silence."""
    classifier, engine = toy_classifier(), engine_of("fp32")
    embed = overflowing(classifier, math.inf)
    wrapped, _ = wrap(classifier, scale=4.0)
    before = wrapped.full_state()
    assert [train_step(engine, embed, wrapped, one_step()).grad_norm for _ in range(2)] == [None, None]
    assert wrapped.loss_scale == 1.0
    with pytest.raises(
        NonFiniteError,
        match=r"gradient norm (inf|nan) in a global batch of examples 0, 1.*: the update would destroy.*Lower optim.lr",
    ):
        train_step(engine, embed, wrapped, one_step())
    assert all(torch.equal(before[name], value) for name, value in wrapped.full_state().items())


@pytest.mark.parametrize("trainable_blocks", [1, 3])
def test_recomputed_activations_give_the_same_gradients_with_dropout(trainable_blocks: int) -> None:
    """Features need no gradient; the weights must get theirs all the same."""
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
    assert kept[1] < kept[0] / 3, "that is what it is for"


def test_scoring_recomputes_nothing() -> None:
    classifier, calls = toy_classifier(2), []
    classifier.suffix.checkpointing = True
    classifier.suffix.h["1"].register_forward_pre_hook(lambda *_: calls.append(1))
    batch = one_step().micro_batches[0]
    features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    classifier.suffix.eval()(*features).sum().backward()
    assert len(calls) == 1
    classifier.suffix.train()(*features).sum().backward()
    assert len(calls) == 3, "the control: in training, once more for the backward pass"


def test_the_state_is_a_copy_and_comes_back() -> None:
    classifier, engine = toy_classifier(), engine_of("fp32")
    wrapped, _ = wrap(classifier)
    state = wrapped.full_state()
    assert state.keys() == dict(classifier.suffix.named_parameters()).keys()
    train_step(engine, computed(classifier.prefix), wrapped, one_step())
    assert not any(
        torch.equal(state[name], value) for name, value in classifier.suffix.named_parameters() if value.ndim > 1
    )
    wrapped.load(state)
    assert all(torch.equal(state[name], value) for name, value in classifier.suffix.named_parameters())


def test_a_new_optimizer_goes_on_from_moments_and_their_count() -> None:
    """AdamW of torch in the same process is the reference; also the kind of what it would have made itself."""
    classifier, engine = toy_classifier(), engine_of("fp32")
    wrapped, optimizer = wrap(classifier)
    embed = computed(classifier.prefix)
    for _ in range(3):
        train_step(engine, embed, wrapped, one_step())
    state = {name: value.clone() for name, value in wrapped.whole_state()}
    assert wrapped.num_updates == 3
    train_step(engine, embed, wrapped, one_step())

    other = toy_classifier()
    torch.nn.init.normal_(other.suffix.out_head.weight)
    resumed, new = wrap(other)
    resumed.load_state(state, 3)
    train_step(engine, embed, resumed, one_step())
    for weight, theirs in zip(classifier.suffix.parameters(), other.suffix.parameters(), strict=True):
        assert torch.equal(weight, theirs)
        found, expected = new.state[theirs], optimizer.state[weight]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value)
            assert (found[name].dtype, found[name].device) == (value.dtype, value.device)


def test_a_scale_goes_on_rising_where_it_stood() -> None:
    classifier, engine = toy_classifier(), engine_of("fp32")
    wrapped, _ = wrap(classifier, scale=FIRST_LOSS_SCALE)
    assert wrapped.scaling == (FIRST_LOSS_SCALE, 0)
    wrapped.load_scaling(8.0, 1998)  # torch doubles it after 2,000 steps without an overflow
    found = [wrapped.scaling]
    for _ in range(2):
        train_step(engine, computed(classifier.prefix), wrapped, one_step())
        found.append(wrapped.scaling)
    assert found == [(8.0, 1998), (8.0, 1999), (16.0, 0)]


def test_without_a_scale_there_is_none_to_take_over() -> None:
    wrapped, _ = wrap(toy_classifier())
    wrapped.load_scaling(8.0, 5)
    assert wrapped.scaling == (1.0, 0)


@pytest.mark.parametrize(("num_bytes", "megabytes"), [(28 * 10**6, 4), (2**30, 128), (256 * 2**20, 32), (0, 4)])
def test_buckets_fit_what_trains(num_bytes: int, megabytes: int) -> None:
    assert bucket_megabytes(num_bytes) == megabytes
