"""Run under torchrun by test_engines.py: the same 20 updates under every engine, then what each must hold by itself."""

import json
import math
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from support.toy import CLASSES, toy_classifier, toy_split
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
from agnews_dist.evaluation.evaluator import evaluate_split
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features, FeatureSource, uncached_features
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import NonFiniteError, train_step

# Or stage 3 would leave a toy's weights whole on every rank.
ALL_OF_IT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ENGINES: dict[str, dict] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero1": {"zero": ZeroOptions(1)},
    "zero2": {"zero": ZeroOptions(2)},
    "zero3": {"zero": ZeroOptions(3, settings=ALL_OF_IT)},
    "zero2-offload": {"zero": ZeroOptions(2, "optimizer")},
    "zero3-offload": {"zero": ZeroOptions(3, "all", ALL_OF_IT)},
}


def start(world: World, name: str, precision: str = "fp32", **options: bool) -> Engine:
    AcceleratorState._reset_state(True)  # accelerate knows one engine per process
    return Engine(
        world, device="cpu", precision=precision, allow_tf32=False, timeout_seconds=60, **ENGINES[name], **options
    )


def prepare(engine: Engine, told: dict, *, max_grad_norm: float, sgd: bool = False) -> tuple[Classifier, Strategy]:
    classifier = toy_classifier(told["trainable_blocks"])
    before = [weight.data_ptr() for weight in classifier.prefix.parameters()]
    place_classifier(classifier, engine, fast_path=True)
    if engine.precision == "fp32":
        after = [weight.data_ptr() for weight in classifier.prefix.parameters()]
        assert after == before, "what is frozen is not copied: it may be pages of a file that the ranks share"
    suffix = classifier.suffix.eval()
    optimizer = (
        torch.optim.SGD(suffix.parameters(), lr=told["lr"])
        if sgd
        else build_optimizer(suffix, lr=told["lr"], weight_decay=told["weight_decay"])
    )
    return classifier, engine.prepare(suffix, optimizer, max_grad_norm=max_grad_norm)


def make_loader(engine: Engine, told: dict, max_tokens: int) -> TrainLoader:
    table = TokenTable(toy_split(told["lengths"]), pad_id=0, device=engine.device)
    settings = PlanSettings(global_batch_size=told["global_batch_size"])
    return TrainLoader(table, engine.world, settings, max_tokens_per_rank=max_tokens, quadratic=0.0)


def held(tensor: Tensor) -> Tensor:
    """What this rank has of it, as it stands in memory: of a copy of its own nobody else knows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def held_of_all(wrapped: Strategy) -> list[Tensor]:
    """Weights, moments, numbers of updates and the optimizer's own copies of weights."""
    of_optimizer = [weight for group in wrapped._optimizer.param_groups for weight in group["params"]]
    moments = [value for state in wrapped._optimizer.state.values() for value in state.values()]
    tensors = [*wrapped.suffix.parameters(), *of_optimizer, *moments]
    return [held(tensor).detach().clone() for tensor in tensors]


def mean_of_means(batches: StepBatches, num_ranks: int) -> StepBatches:
    """The step in which each rank takes the mean over its own share. The negative control."""
    mine = sum(int((batch.weights_B > 0).sum()) for batch in batches.micro_batches)
    return replace(batches, num_examples=num_ranks * max(1, mine))


def facts_of(wrapped: Strategy, engine: Engine) -> dict:
    """What the engine really is, not what it was told to be."""
    module, state = wrapped.module, {}
    state["kind"] = type(module).__name__
    if engine.zero is not None:
        state |= {
            "stage": int(module.zero_optimization_stage()),
            "accumulation": module.gradient_accumulation_steps(),
            "clipping": module.gradient_clipping(),
            "reduced_in": str(module.communication_data_type),
            "accumulated_in": str(module.get_data_types()[1]),
        }
        assert module.optimizer.optimizer is wrapped._optimizer
    if state["kind"] == "DistributedDataParallel":
        state |= {
            "static_graph": module.static_graph,
            "find_unused_parameters": module.find_unused_parameters,
            "bucket_bytes": module.bucket_bytes_cap,
        }
    state["optimizer"] = type(wrapped._optimizer).__name__
    weights, states = list(wrapped.suffix.parameters()), wrapped._optimizer.state.values()
    moments = [held(of_weight[name]) for of_weight in states for name in ("exp_avg", "exp_avg_sq")]
    num_weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
    state["held_weights"] = sum(held(weight).numel() for weight in weights) / num_weights
    state["held_moments"] = sum(moment.numel() for moment in moments) / (2 * num_weights)
    state["kinds"] = sorted({str(tensor.dtype) for tensor in (*weights, *moments)})
    return state


def train(world: World, told: dict, case: dict, output: Path) -> None:
    """20 updates; weights, losses, norms, evaluation."""
    told = told | case
    engine = start(world, case["engine"])
    classifier, wrapped = prepare(engine, told, max_grad_norm=case["max_grad_norm"], sgd=case["sgd"])
    loader, embed = make_loader(engine, told, case["max_tokens"]), uncached_features(classifier.prefix)
    losses, norms, micro, shares, step = [], [], [], [], 0
    for epoch in range(100):
        for batches in loader.steps(epoch):
            if step == told["num_steps"]:
                break
            told_batches = mean_of_means(batches, world.num_ranks) if case["mean_of_means"] else batches
            result = train_step(engine, embed, wrapped, told_batches)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            micro.append(len(batches.micro_batches))
            mine = sum(int((batch.weights_B > 0).sum()) for batch in batches.micro_batches)
            shares.append(collectives.all_gather(mine))
            step += 1
    table = TokenTable(toy_split(told["evaluation_lengths"]), pad_id=0, device=engine.device)
    scored = evaluate_split(classifier, table, engine, num_classes=CLASSES)
    state = wrapped.gather_weights()
    assert bool(state) == world.is_main, "whole on rank 0, and there alone"
    if world.is_main:
        check_scored_weights(told, state, table, scored.probabilities_NC)
    facts = {
        "losses": losses,
        "norms": norms,
        "micro_batches": micro,
        "shares": shares,
        "predictions": scored.predictions_N.tolist(),
        "loss": scored.scores.loss,
        "confusion": scored.scores.confusion,
        **(facts_of(wrapped, engine) if not case["sgd"] else {}),
    }
    if not engine.is_forward_collective:
        copies = collectives.all_gather([held(weight).detach().clone() for weight in wrapped.suffix.parameters()])
        assert all(all(map(torch.equal, theirs, copies[0])) for theirs in copies), "ranks hold the same weights"
    # Of a mean of means no rank has the global loss.
    shared = ("norms", "predictions", "loss", *(() if case["mean_of_means"] else ("losses",)))
    gathered = collectives.all_gather({key: facts[key] for key in shared})
    assert all(theirs == gathered[0] for theirs in gathered), "ranks know the same numbers"
    if world.is_main:
        save_file(state, output / f"{case['name']}.safetensors")
        (output / f"{case['name']}.json").write_text(json.dumps(facts, default=lambda array: array.tolist()))


def check_scored_weights(told: dict, state: dict[str, Tensor], table: TokenTable, expected_NC: np.ndarray) -> None:
    """What was saved is what was scored: the same probabilities from a model that knows of no engine."""
    classifier = toy_classifier(told["trainable_blocks"])
    classifier.suffix.eval().load_state_dict(state)
    with torch.no_grad():
        logits_NC = classifier.suffix(*uncached_features(classifier.prefix)(table.batch(np.arange(len(table)))))
    np.testing.assert_allclose(logits_NC.double().softmax(dim=1).numpy(), expected_NC, rtol=0, atol=1e-6)


def check_state_comes_back(world: World, told: dict, name: str) -> None:
    """What was saved comes back on all ranks, in the optimizer's own copies too: the next update starts from it."""
    engine = start(world, name)
    classifier, wrapped = prepare(engine, told, max_grad_norm=0.0, sgd=True)
    loader, embed = make_loader(engine, told, 10_000), uncached_features(classifier.prefix)
    first, second, *_ = loader.steps(0)
    before = wrapped.gather_weights()
    train_step(engine, embed, wrapped, first)
    after = wrapped.gather_weights()
    train_step(engine, embed, wrapped, second)
    wrapped.load_weights(before)
    back = wrapped.gather_weights()
    assert all(torch.equal(back[key], value) for key, value in before.items()), name
    train_step(engine, embed, wrapped, first)
    again = wrapped.gather_weights()
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


def check_non_finite(world: World, told: dict, name: str) -> None:
    """A bad loss on the last rank, then a bad gradient on the last rank: all say so, none moves."""
    engine = start(world, name)
    classifier, wrapped = prepare(engine, told, max_grad_norm=1.0)
    (first, batches, good, *_), embed = make_loader(engine, told, 10_000).steps(0), uncached_features(classifier.prefix)
    is_last = world.rank == world.num_ranks - 1

    def poisoned(batch: Batch) -> Features:
        hidden_BTD, lengths_B = embed(batch)
        return Features(hidden_BTD * math.nan if is_last else hidden_BTD, lengths_B)

    def refused(source: FeatureSource, match: str) -> None:
        before, said = held_of_all(wrapped), ""
        try:
            train_step(engine, source, wrapped, batches)
        except NonFiniteError as error:
            said = str(error)
        assert match in said, f"{name}: {said!r}"
        assert all(map(torch.equal, before, held_of_all(wrapped))), f"{name}: something moved"

    # Before it there are no moments to move.
    train_step(engine, embed, wrapped, first)
    refused(poisoned, f"non-finite loss on rank(s) {world.num_ranks - 1}, of examples")
    del wrapped, engine
    engine = start(world, name)
    classifier, wrapped = prepare(engine, told, max_grad_norm=1.0)
    embed, factor = uncached_features(classifier.prefix), [1.0]
    classifier.suffix.out_head.register_forward_hook(
        lambda module, arguments, output: ScaledBackward.apply(output, factor[0])
    )
    train_step(engine, embed, wrapped, first)
    factor[0] = math.inf if is_last else 1.0
    refused(embed, "gradient norm")
    # The bad gradient is gone with the update that was not made.
    factor[0], before = 1.0, held_of_all(wrapped)
    norm = train_step(engine, embed, wrapped, good).grad_norm
    assert norm is not None
    assert math.isfinite(norm), name
    assert not all(map(torch.equal, before, held_of_all(wrapped))), "the control: an update moves something"


def precisions(world: World, told: dict, output: Path) -> None:
    """Loss and norm of one epoch's updates in each precision; fp16's check of the device is all that is left out on a CPU."""
    from agnews_dist.engine import engine as engine_module

    engine_module.choose_precision = lambda precision, *, use_cuda: precision
    found = {}
    for precision in ("bf16", "fp16"):
        for name in ("ddp", "fsdp", "zero2", "zero3"):
            if (precision, name) == ("fp16", "fsdp"):
                continue
            engine = start(world, name, precision)
            classifier, wrapped = prepare(engine, told, max_grad_norm=1.0)
            loader, embed = make_loader(engine, told, 10_000), uncached_features(classifier.prefix)
            results = [train_step(engine, embed, wrapped, batches) for batches in loader.steps(0)]
            found[f"{precision} {name}"] = facts_of(wrapped, engine) | {
                "losses": [result.loss for result in results],
                "norms": [result.grad_norm for result in results],
                "frozen": sorted({str(weight.dtype) for weight in classifier.prefix.parameters()}),
                "scale": wrapped.loss_scale,
            }
    for name, compresses in (("ddp", True), ("zero2", True), ("fsdp", True), ("ddp", False)):
        engine = start(world, name, compress_gradients=compresses)
        classifier, wrapped = prepare(engine, told, max_grad_norm=0.0, sgd=True)
        (batches, *_), before = make_loader(engine, told, 10_000).steps(0), wrapped.gather_weights()
        train_step(engine, uncached_features(classifier.prefix), wrapped, batches)
        after = wrapped.gather_weights()
        if world.is_main:
            kind = "compressed" if compresses else "exact"
            save_file({key: before[key] - after[key] for key in before}, output / f"{kind}-{name}.safetensors")
    if world.is_main:
        (output / "precisions.json").write_text(json.dumps(found))


def check_reductions(world: World, told: dict) -> None:
    """DDP's ranks talk once per update, not once per micro-batch: the numbers would be the same."""
    engine, count = start(world, "ddp"), 0
    classifier, wrapped = prepare(engine, told, max_grad_norm=0.0)

    def counting(group: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal count
        count += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    wrapped.module.register_comm_hook(None, counting)
    counts = []
    for max_tokens in (10_000, 60):
        (batches, *_), count = make_loader(engine, told, max_tokens).steps(0), 0
        train_step(engine, uncached_features(classifier.prefix), wrapped, batches)
        counts.append((len(batches.micro_batches), count))
    (one, buckets), (several, as_often) = counts
    assert one == 1 < several
    assert as_often == buckets > 0, counts


def main() -> None:
    # DeepSpeed's, of its own hooks and of names of collectives that torch calls old.
    warnings.simplefilter("ignore")
    output, told = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    world = detect_world(os.environ)
    for case in told["cases"]:
        train(world, told, case, output)
    for name in told["checked"] or ENGINES:
        check_state_comes_back(world, told | {"trainable_blocks": 2}, name)
        check_non_finite(world, told | {"trainable_blocks": 1}, name)
    if told["reductions"]:
        check_reductions(world, told | {"trainable_blocks": 1})
    if told["precisions"]:
        precisions(world, told | {"trainable_blocks": 1}, output)
    assert not any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir()), "an extension was compiled"


if __name__ == "__main__":
    main()
    # Not inside: what is wrapped must be gone before its process group is (see collectives.close).
    collectives.close()
