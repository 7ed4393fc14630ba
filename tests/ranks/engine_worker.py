"""Worker of test_engines.py: the same updates under every engine, and checks of each engine."""

import json
import math
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from support.toy import CLASS_WEIGHTS, toy_classifier, toy_split
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import StepBatches, TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World, detect_world
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import SharedError
from agnews_dist.evaluation.evaluator import evaluate_split
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features, FeatureSource, uncached_features
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.training.losses import StepSettings
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import NonFiniteError, train_step

# By default stage 3 keeps small weights whole on every rank.
SHARD_EVERYTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ENGINES: dict[str, dict] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero1": {"zero": ZeroOptions(1)},
    "zero2": {"zero": ZeroOptions(2)},
    "zero3": {"zero": ZeroOptions(3, settings=SHARD_EVERYTHING)},
    "zero2-offload": {"zero": ZeroOptions(2, "optimizer")},
    "zero3-offload": {"zero": ZeroOptions(3, "all", SHARD_EVERYTHING)},
}


def start(world: World, name: str, precision: str = "fp32", **options: bool) -> Engine:
    AcceleratorState._reset_state(True)  # accelerate allows one engine per process
    return Engine(world, device="cpu", precision=precision, allow_tf32=False, timeout_seconds=60, **ENGINES[name], **options)


def prepare(engine: Engine, settings: dict, *, max_grad_norm: float, sgd: bool = False) -> tuple[Classifier, Strategy]:
    classifier = toy_classifier(settings["trainable_blocks"], **settings.get("options", {}))
    before = [weight.data_ptr() for weight in classifier.prefix.parameters()]
    place_classifier(classifier, engine, fast_path=True)
    if engine.precision == "fp32":
        after = [weight.data_ptr() for weight in classifier.prefix.parameters()]
        assert after == before, "frozen weights are not copied: they may be pages of a file that the ranks share"
    suffix = classifier.suffix.eval()
    optimizer = (
        torch.optim.SGD(suffix.parameters(), lr=settings["lr"])
        if sgd
        else build_optimizer(
            suffix, lr=settings["lr"], weight_decay=settings["weight_decay"], layer_decay=settings.get("layer_decay", 1.0)
        )
    )
    return classifier, engine.prepare(suffix, optimizer, max_grad_norm=max_grad_norm)


def make_loader(engine: Engine, settings: dict, max_tokens: int, class_weights_C: np.ndarray | None = None) -> TrainLoader:
    table = TokenTable(toy_split(settings["lengths"]), pad_id=0, device=engine.device)
    settings = PlanSettings(global_batch_size=settings["global_batch_size"])
    return TrainLoader(
        table, engine.world, settings, max_tokens_per_rank=max_tokens, quadratic=0.0, class_weights_C=class_weights_C
    )


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def local_tensors(strategy: Strategy) -> list[Tensor]:
    """Copy this rank's weights, moments, numbers of updates and the optimizer's copies of weights, as bytes.

    DeepSpeed pads the last rank's shards with memory that it does not set: it may hold NaN, which does not equal itself.
    """
    of_optimizer = [weight for group in strategy._optimizer.param_groups for weight in group["params"]]
    moments = [value for state in strategy._optimizer.state.values() for value in state.values()]
    tensors = [*strategy.suffix.parameters(), *of_optimizer, *moments]
    return [local_shard(tensor).detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def mean_of_means(batches: StepBatches, num_ranks: int) -> StepBatches:
    """Return a step in which each rank takes the mean over its own share. The negative control."""
    mine = sum(int((batch.weights_B > 0).sum()) for batch in batches.micro_batches)
    return replace(batches, loss_divisor=num_ranks * max(1, mine))


def inspect_engine(strategy: Strategy, engine: Engine) -> dict:
    """Read the engine's actual settings, types and shard sizes."""
    module, state = strategy.module, {}
    state["kind"] = type(module).__name__
    if engine.zero is not None:
        state |= {
            "stage": int(module.zero_optimization_stage()),
            "accumulation": module.gradient_accumulation_steps(),
            "clipping": module.gradient_clipping(),
            "reduced_in": str(module.communication_data_type),
            "accumulated_in": str(module.get_data_types()[1]),
        }
        assert module.optimizer.optimizer is strategy._optimizer
    if state["kind"] == "DistributedDataParallel":
        state |= {
            "static_graph": module.static_graph,
            "find_unused_parameters": module.find_unused_parameters,
            "bucket_bytes": module.bucket_bytes_cap,
        }
    state["optimizer"] = type(strategy._optimizer).__name__
    weights, states = list(strategy.suffix.parameters()), strategy._optimizer.state.values()
    moments = [local_shard(of_weight[name]) for of_weight in states for name in ("exp_avg", "exp_avg_sq")]
    num_weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
    state["local_weights"] = sum(local_shard(weight).numel() for weight in weights) / num_weights
    state["local_moments"] = sum(moment.numel() for moment in moments) / (2 * num_weights)
    state["kinds"] = sorted({str(tensor.dtype) for tensor in (*weights, *moments)})
    return state


def train(world: World, settings: dict, case: dict, output: Path) -> None:
    """Make all updates; save weights, losses, norms and evaluation."""
    settings = settings | case
    engine = start(world, case["engine"])
    classifier, strategy = prepare(engine, settings, max_grad_norm=case["max_grad_norm"], sgd=case["sgd"])
    # The cases with SGD have the whole loss.
    weights_C = np.array(CLASS_WEIGHTS) if case["sgd"] else None
    loss = StepSettings(label_smoothing=0.1, class_weights_C=torch.from_numpy(weights_C)) if case["sgd"] else StepSettings()
    loader, embed = make_loader(engine, settings, case["max_tokens"], weights_C), uncached_features(classifier.prefix)
    losses, norms, micro, shares, step = [], [], [], [], 0
    for epoch in range(100):
        for batches in loader.steps(epoch):
            if step == settings["num_steps"]:
                break
            step_batches = mean_of_means(batches, world.num_ranks) if case["mean_of_means"] else batches
            result = train_step(engine, embed, strategy, step_batches, settings=loss)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            micro.append(len(batches.micro_batches))
            mine = sum(int((batch.weights_B > 0).sum()) for batch in batches.micro_batches)
            shares.append(collectives.all_gather(mine))
            step += 1
    table = TokenTable(toy_split(settings["evaluation_lengths"]), pad_id=0, device=engine.device)
    scored = evaluate_split(classifier, table, engine)
    state = strategy.gather_weights()
    assert bool(state) == world.is_main, "whole on rank 0 only"
    if world.is_main:
        check_scored_weights(settings, state, table, scored.probabilities_NK)
    facts = {
        "losses": losses,
        "norms": norms,
        "micro_batches": micro,
        "shares": shares,
        "predictions": scored.predictions_N.tolist(),
        "loss": scored.scores.loss,
        "confusion": scored.scores.confusion,
        **(inspect_engine(strategy, engine) if not case["sgd"] else {}),
    }
    strategy.check_replicas(step)
    if not engine.is_forward_collective and world.num_ranks > 1:
        check_flipped_bit_is_found(world, strategy)
    # With a mean of means no rank has the global loss.
    shared = ("norms", "predictions", "loss", *(() if case["mean_of_means"] else ("losses",)))
    gathered = collectives.all_gather({key: facts[key] for key in shared})
    assert all(theirs == gathered[0] for theirs in gathered), "all ranks have the same numbers"
    if world.is_main:
        save_file(state, output / f"{case['name']}.safetensors")
        (output / f"{case['name']}.json").write_text(json.dumps(facts, default=lambda array: array.tolist()))


def check_flipped_bit_is_found(world: World, strategy: Strategy) -> None:
    """Check that all ranks name the last rank after one bit of one of its weights has flipped."""
    content = [*strategy.suffix.parameters()][-1].detach().view(-1).view(torch.uint8)
    is_last = world.rank == world.num_ranks - 1
    content[0] ^= is_last
    with pytest.raises(SharedError, match=rf"^weights after step 7 on rank {world.num_ranks - 1}: other bits than on rank 0\."):
        strategy.check_replicas(7)
    content[0] ^= is_last
    strategy.check_replicas(7)


def check_scored_weights(settings: dict, state: dict[str, Tensor], table: TokenTable, expected_NC: np.ndarray) -> None:
    """Check that the saved weights give the same probabilities in a model without an engine."""
    classifier = toy_classifier(settings["trainable_blocks"], **settings.get("options", {}))
    classifier.suffix.eval().load_state_dict(state)
    with torch.no_grad():
        logits_NC = classifier.suffix(*uncached_features(classifier.prefix)(table.batch(np.arange(len(table)))))
    np.testing.assert_allclose(logits_NC.double().softmax(dim=1).numpy(), expected_NC, rtol=0, atol=1e-6)


def check_weights_are_restored(world: World, settings: dict, name: str) -> None:
    """Check that saved weights are restored on all ranks, also in the optimizer's copies: the next update uses them."""
    engine = start(world, name)
    classifier, strategy = prepare(engine, settings, max_grad_norm=0.0, sgd=True)
    loader, embed = make_loader(engine, settings, 10_000), uncached_features(classifier.prefix)
    first, second, *_ = loader.steps(0)
    before = strategy.gather_weights()
    train_step(engine, embed, strategy, first)
    after = strategy.gather_weights()
    train_step(engine, embed, strategy, second)
    strategy.load_weights(before)
    restored = strategy.gather_weights()
    assert all(torch.equal(restored[key], value) for key, value in before.items()), name
    train_step(engine, embed, strategy, first)
    again = strategy.gather_weights()
    for key, value in after.items():
        assert not torch.equal(before[key], value) or key.endswith("c_attn.bias"), key
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6, msg=lambda text: f"{name} {key}: {text}")  # noqa: B023


class ScaledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, factor):
        ctx.factor = factor
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def check_non_finite(world: World, settings: dict, name: str) -> None:
    """Check a bad loss, then a bad gradient, on the last rank: all ranks raise, no weight changes."""
    engine = start(world, name)
    classifier, strategy = prepare(engine, settings, max_grad_norm=1.0)
    (first, batches, good, *_), embed = (make_loader(engine, settings, 10_000).steps(0), uncached_features(classifier.prefix))
    is_last = world.rank == world.num_ranks - 1

    def poisoned(batch: Batch) -> Features:
        hidden_BTD, lengths_B = embed(batch)
        return Features(hidden_BTD * math.nan if is_last else hidden_BTD, lengths_B)

    def check_refused(source: FeatureSource, match: str) -> None:
        before, message = local_tensors(strategy), ""
        try:
            train_step(engine, source, strategy, batches)
        except NonFiniteError as error:
            message = str(error)
        assert match in message, f"{name}: {message!r}"
        assert all(map(torch.equal, before, local_tensors(strategy))), f"{name}: a tensor changed"

    # The first step creates the moments.
    train_step(engine, embed, strategy, first)
    check_refused(poisoned, f"non-finite loss on rank(s) {world.num_ranks - 1}, of examples")
    del strategy, engine
    engine = start(world, name)
    classifier, strategy = prepare(engine, settings, max_grad_norm=1.0)
    embed, factor = uncached_features(classifier.prefix), [1.0]
    classifier.suffix.out_head.register_forward_hook(lambda module, arguments, output: ScaledBackward.apply(output, factor[0]))
    train_step(engine, embed, strategy, first)
    factor[0] = math.inf if is_last else 1.0
    check_refused(embed, "gradient norm")
    # The bad gradient is cleared with the skipped update.
    factor[0], before = 1.0, local_tensors(strategy)
    norm = train_step(engine, embed, strategy, good).grad_norm
    assert norm is not None
    assert math.isfinite(norm), name
    assert not all(map(torch.equal, before, local_tensors(strategy))), "control: an update changes tensors"


def check_precisions(world: World, settings: dict, output: Path) -> None:
    """Save losses and norms of one epoch in each precision. fp16 is refused on a CPU, so that check is disabled."""
    from agnews_dist.engine import engine as engine_module

    engine_module.choose_precision = lambda precision, *, use_cuda: precision
    found = {}
    for precision in ("bf16", "fp16"):
        for name in ("ddp", "fsdp", "zero2", "zero3"):
            if (precision, name) == ("fp16", "fsdp"):
                continue
            engine = start(world, name, precision)
            classifier, strategy = prepare(engine, settings, max_grad_norm=1.0)
            loader, embed = make_loader(engine, settings, 10_000), uncached_features(classifier.prefix)
            results = [train_step(engine, embed, strategy, batches) for batches in loader.steps(0)]
            found[f"{precision} {name}"] = inspect_engine(strategy, engine) | {
                "losses": [result.loss for result in results],
                "norms": [result.grad_norm for result in results],
                "frozen": sorted({str(weight.dtype) for weight in classifier.prefix.parameters()}),
                "scale": strategy.loss_scale,
            }
    for name, compresses in (("ddp", True), ("zero2", True), ("fsdp", True), ("ddp", False)):
        engine = start(world, name, compress_gradients=compresses)
        classifier, strategy = prepare(engine, settings, max_grad_norm=0.0, sgd=True)
        (batches, *_), before = make_loader(engine, settings, 10_000).steps(0), strategy.gather_weights()
        train_step(engine, uncached_features(classifier.prefix), strategy, batches)
        after = strategy.gather_weights()
        if world.is_main:
            kind = "compressed" if compresses else "exact"
            save_file({key: before[key] - after[key] for key in before}, output / f"{kind}-{name}.safetensors")
    if world.is_main:
        (output / "precisions.json").write_text(json.dumps(found))


def check_reductions(world: World, settings: dict) -> None:
    """Check that DDP reduces once per update, not once per micro-batch. The results would be the same."""
    engine, count = start(world, "ddp"), 0
    classifier, strategy = prepare(engine, settings, max_grad_norm=0.0)

    def counting(group: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal count
        count += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    strategy.module.register_comm_hook(None, counting)
    counts = []
    for max_tokens in (10_000, 60):
        (batches, *_), count = make_loader(engine, settings, max_tokens).steps(0), 0
        train_step(engine, uncached_features(classifier.prefix), strategy, batches)
        counts.append((len(batches.micro_batches), count))
    (one, buckets), (several, same_count) = counts
    assert one == 1 < several
    assert same_count == buckets > 0, counts


def main() -> None:
    # DeepSpeed warns of its hooks and of deprecated collectives.
    warnings.simplefilter("ignore")
    output, settings = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    world = detect_world(os.environ)
    for case in settings["cases"]:
        train(world, settings, case, output)
    for name in settings["checked"]:
        check_weights_are_restored(world, settings | {"trainable_blocks": 2}, name)
        check_non_finite(world, settings | {"trainable_blocks": 1}, name)
    if settings["reductions"]:
        check_reductions(world, settings | {"trainable_blocks": 1})
    if settings["precisions"]:
        check_precisions(world, settings | {"trainable_blocks": 1}, output)
    assert not any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir()), "an extension was compiled"


if __name__ == "__main__":
    main()
    # Outside of main(): the strategy must be freed before its process group (see collectives.close).
    collectives.close()
