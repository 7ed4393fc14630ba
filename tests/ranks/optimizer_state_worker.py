"""Run under torchrun by test_optimizer_state.py: what every engine gives to a checkpoint, and what it makes of another's."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from engine_worker import ALL_OF_IT, ENGINES, facts_of, held_of_all, make_loader, start
from safetensors.torch import load_file, save_file
from support.toy import toy_classifier
from torch import Tensor

from agnews_dist.data.batching.loader import StepBatches
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World, detect_world
from agnews_dist.engine import engine as engine_module
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import UserError
from agnews_dist.model.dropout import step_key
from agnews_dist.model.prefix import FeatureSource, uncached_features
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import train_step

HALF = 4
KINDS = ("weight", "exp_avg", "exp_avg_sq")
# What stage 3 updates, cut into several pieces; what is small it keeps whole on every rank, as it does by default.
ENGINES["zero3-pieces"] = {"zero": ZeroOptions(3, settings={"zero_optimization": {"sub_group_size": 2000}})}
ENGINES["zero2-dealt"] = {"zero": ZeroOptions(2, settings={"zero_optimization": {"round_robin_gradients": True}})}
assert ALL_OF_IT["zero_optimization"] == {"stage3_param_persistence_threshold": 0}, (
    "the other engines keep nothing whole"
)


class Run:
    """An engine around the toy, and the steps that it makes."""

    def __init__(self, world: World, told: dict, name: str, *, precision: str = "fp32", is_other: bool = False) -> None:
        """`is_other`: with other first weights than the toy's, and on every rank others."""
        self.world, self.engine = world, start(world, name, precision)
        self.classifier = toy_classifier(told["trainable_blocks"], told["dropout"])
        place_classifier(self.classifier, self.engine, fast_path=True)
        suffix = self.classifier.suffix.train()
        self.shapes = {name: weight.shape for name, weight in suffix.named_parameters()}
        if is_other:
            generator = torch.Generator().manual_seed(100 + world.rank)
            for weight in suffix.parameters():
                torch.nn.init.normal_(weight, generator=generator)
        optimizer = build_optimizer(suffix, lr=told["lr"], weight_decay=told["weight_decay"])
        self.wrapped: Strategy = self.engine.prepare(suffix, optimizer, max_grad_norm=1.0)
        self.embed: FeatureSource = uncached_features(self.classifier.prefix)
        loader = make_loader(self.engine, told, told["max_tokens"])
        self.batches: list[StepBatches] = [batches for epoch in range(2) for batches in loader.steps(epoch)]
        assert len(self.batches) == 2 * HALF
        assert any(len(batches.micro_batches) > 1 for batches in self.batches)

    def train(self, begin: int, end: int) -> list[float]:
        """Steps `begin` to `end`; their losses."""
        losses = []
        for step in range(begin, end):
            # As in a training: all that is random is a function of the step.
            torch.manual_seed(1000 * step + self.world.rank)
            batches = self.batches[step % len(self.batches)]
            losses.append(
                train_step(self.engine, self.embed, self.wrapped, batches, dropout_key=step_key(3, step)).loss
            )
        return losses

    def state(self) -> dict[str, Tensor]:
        """A copy, as a checkpoint makes it; empty but on rank 0."""
        whole = {key: value.clone() for key, value in self.wrapped.gather_state()}
        return whole if self.world.is_main else {}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Bit for bit. Fails on all ranks together, so that none drowns the reason in complaints about a lost peer."""
    assert found.keys() == expected.keys(), where
    wrong = collectives.all_gather([key for key, value in found.items() if not torch.equal(value, expected[key])])
    assert not any(wrong), f"{where}: other bits in {wrong}"


def check_held(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    """All that a rank holds, its parts of moments and the optimizer's own copies of weights among it."""
    assert len(found) == len(expected), name
    # At the end of a part of stage 3 there may be memory that nobody has ever set.
    assert name.startswith("zero3") or all(map(torch.equal, found, expected)), f"{name}: a rank holds other bits"


def check_form(run: Run, state: dict[str, Tensor], where: str) -> None:
    assert list(state) == [f"{kind}.{name}" for kind in KINDS for name in run.shapes], where
    for key, value in state.items():
        assert (value.shape, value.dtype) == (run.shapes[key.partition(".")[2]], torch.float32), f"{where}: {key}"
        assert not value.requires_grad, f"{where}: {key}"


def check_resuming(world: World, told: dict, name: str, output: Path) -> None:
    """Trained through, read on the way, and gone on from what was read in a new engine: the same bits."""
    unread = Run(world, told, name)
    losses = unread.train(0, 2 * HALF)
    held = held_of_all(unread.wrapped)
    del unread

    run = Run(world, told, name)
    assert run.wrapped.num_updates == 0
    fresh = run.state()
    first_losses = run.train(0, HALF)
    assert run.wrapped.num_updates == HALF
    half, weights = run.state(), run.wrapped.gather_weights()
    facts = facts_of(run.wrapped, run.engine)
    if world.is_main:
        check_form(run, fresh, f"{name}, before the first step")
        assert not any(value.any() for key, value in fresh.items() if not key.startswith("weight.")), name
        check_form(run, half, name)
        assert all(value.any() for value in half.values()), f"{name}: the control: there are moments"
    check_equal({key: half[key] for key in half if key.startswith("weight.")}, under("weight", weights), name)
    assert first_losses + run.train(HALF, 2 * HALF) == losses, f"{name}: reading changed what comes after it"
    check_held(name, held_of_all(run.wrapped), held)
    done = run.state()
    assert run.wrapped.num_updates == 2 * HALF
    assert run.wrapped.scaling == (1.0, 0)
    del run

    resumed = Run(world, told, name, is_other=True)
    resumed.wrapped.load_state(half, HALF)
    resumed.wrapped.load_scaling(4.0, 2)
    assert resumed.wrapped.scaling == (1.0, 0), "without fp16 there is none"
    check_equal(resumed.state(), half, f"{name}, loaded")
    assert resumed.wrapped.num_updates == HALF
    assert resumed.train(HALF, 2 * HALF) == losses[HALF:], f"{name}: other losses after loading"
    check_equal(resumed.state(), done, f"{name}, gone on from what was loaded")
    check_held(name, held_of_all(resumed.wrapped), held)
    assert resumed.wrapped.num_updates == 2 * HALF
    assert facts_of(resumed.wrapped, resumed.engine) == facts, f"{name}: it is divided as before"
    # Into an engine that has moments, and what was read before the first step.
    resumed.wrapped.load_state(fresh, 0)
    check_equal(resumed.state(), fresh, f"{name}, loaded back")
    assert resumed.wrapped.num_updates == 0
    if world.num_ranks < 3 or name != "ddp":  # its buckets are no longer those of a first step
        assert resumed.train(0, HALF) == first_losses, f"{name}: other losses after loading back"
        check_equal(resumed.state(), half, f"{name}, gone on from the beginning")
    if world.is_main:
        save_file(half, output / f"{name}-half.safetensors")
        save_file(done, output / f"{name}-done.safetensors")
        (output / f"{name}.json").write_text(json.dumps(facts | {"losses": losses}))


def under(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for name, value in state.items()}


def go_on(world: World, told: dict, name: str, source: Path, output: Path) -> None:
    """From another engine's state, perhaps of another number of ranks, to the end."""
    run = Run(world, told, name, is_other=True)
    state = load_file(source) if world.is_main else {}
    run.wrapped.load_state(state, HALF)
    check_equal(run.state(), state, f"{source.stem} in {name}")
    losses = run.train(HALF, 2 * HALF)
    assert run.wrapped.num_updates == 2 * HALF
    done = run.state()
    if world.is_main:
        save_file(done, output.with_suffix(".safetensors"))
        output.with_suffix(".json").write_text(json.dumps({"losses": losses}))


def scales(world: World, told: dict, name: str) -> dict:
    """fp16: the loss scale after every step; raised after 3 clean steps, so that it rises and falls on the way."""

    def make(*, is_other: bool) -> Run:
        run = Run(world, told, name, precision="fp16", is_other=is_other)
        if run.engine.zero is None:
            assert run.wrapped._scaler.get_growth_interval() == 2000
            run.wrapped._scaler.set_growth_interval(3)
        else:
            scaler = run.wrapped.module.optimizer.loss_scaler
            assert scaler.scale_window == 2000
            scaler.scale_window = 3
        return run

    def train(run: Run, begin: int, end: int) -> list[tuple[float, int]]:
        found = []
        for step in range(begin, end):
            run.train(step, step + 1)
            found.append(run.wrapped.scaling)
        return found

    num_steps = 26
    run = make(is_other=False)
    found = [run.wrapped.scaling]
    run.wrapped.load_scaling(2.0**24, 1)
    found += [run.wrapped.scaling, *train(run, 0, num_steps)]
    updates, state, scaling = run.wrapped.num_updates, run.state(), run.wrapped.scaling
    rest = train(run, num_steps, num_steps + 2 * HALF)
    resumed = make(is_other=True)
    resumed.wrapped.load_state(state, updates)
    resumed.wrapped.load_scaling(*scaling)
    assert resumed.wrapped.scaling == scaling
    assert train(resumed, num_steps, num_steps + 2 * HALF) == rest, f"{name}: another scale after loading"
    check_equal(resumed.state(), run.state(), f"{name} in fp16")
    assert resumed.wrapped.num_updates == run.wrapped.num_updates > updates
    return {"first": found, "rest": rest, "updates": updates, "steps": num_steps}


def main() -> None:
    # DeepSpeed's, of its own hooks and of names of collectives that torch calls old.
    warnings.simplefilter("ignore")
    output, told = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    world = detect_world(os.environ)
    for name in told["resumed"]:
        check_resuming(world, told, name, output)
    for name, source, target in told["crossed"]:
        go_on(world, told | {"dropout": 0.0}, name, Path(source), output / target)
    if told["refusals"]:
        with pytest.raises(UserError) as refused:
            Run(world, told, "zero2-dealt")
        if world.is_main:
            (output / "refused.json").write_text(json.dumps({"message": str(refused.value)}))
    if told["scales"]:
        # On a CPU fp16 is slow, and refused, but it computes.
        engine_module.choose_precision = lambda precision, *, use_cuda: precision
        found = {name: scales(world, told, name) for name in told["scales"]}
        if world.is_main:
            (output / "scales.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    # Not inside: what is wrapped must be gone before its process group is (see collectives.close).
    collectives.close()
