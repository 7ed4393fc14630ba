"""Worker of test_optimizer_state.py: every engine saves its state, and loads its own and those of other engines."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from engine_worker import ENGINES, SHARD_EVERYTHING, check_scored_weights, inspect_engine, local_tensors, make_loader, start
from safetensors.torch import load_file, save_file
from support.toy import toy_classifier, toy_split
from torch import Tensor

from agnews_dist.data.batching.loader import StepBatches, TokenTable
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World, detect_world
from agnews_dist.engine import engine as engine_module
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import Stopped, UserError
from agnews_dist.evaluation.evaluator import evaluate_split
from agnews_dist.model.dropout import step_key
from agnews_dist.model.prefix import FeatureSource, uncached_features
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.training.optim import averaging_rate, build_optimizer
from agnews_dist.training.step import train_step

HALF = 4
FIRST_AVERAGED = 2
"""Steps done before the first one that is averaged."""
KINDS = ("weight", "exp_avg", "exp_avg_sq", "average")
# Stage 3 with updates in several pieces, and with its default: small weights are whole on every rank.
ENGINES["zero3-pieces"] = {"zero": ZeroOptions(3, settings={"zero_optimization": {"sub_group_size": 2000}})}
ENGINES["zero2-dealt"] = {"zero": ZeroOptions(2, settings={"zero_optimization": {"round_robin_gradients": True}})}
assert SHARD_EVERYTHING["zero_optimization"] == {"stage3_param_persistence_threshold": 0}, (
    "the other engines shard every weight"
)


class Run:
    """The toy under an engine, and its steps."""

    def __init__(self, world: World, settings: dict, name: str, *, precision: str = "fp32", is_other: bool = False) -> None:
        """`is_other`: start from other weights, different on every rank."""
        self.world, self.engine = world, start(world, name, precision)
        self.classifier = toy_classifier(settings["trainable_blocks"], settings["dropout"])
        place_classifier(self.classifier, self.engine, fast_path=True)
        suffix = self.classifier.suffix.train()
        self.shapes = {name: weight.shape for name, weight in suffix.named_parameters()}
        if is_other:
            generator = torch.Generator().manual_seed(100 + world.rank)
            for weight in suffix.parameters():
                torch.nn.init.normal_(weight, generator=generator)
        optimizer = build_optimizer(suffix, lr=settings["lr"], weight_decay=settings["weight_decay"])
        self.strategy: Strategy = self.engine.prepare(suffix, optimizer, max_grad_norm=1.0)
        self.embed: FeatureSource = uncached_features(self.classifier.prefix)
        loader = make_loader(self.engine, settings, settings["max_tokens"])
        self.batches: list[StepBatches] = [batches for epoch in range(2) for batches in loader.steps(epoch)]
        assert len(self.batches) == 2 * HALF
        assert any(len(batches.micro_batches) > 1 for batches in self.batches)

    def train(self, begin: int, end: int) -> list[float]:
        """Make steps `begin` to `end`; return their losses."""
        losses = []
        for step in range(begin, end):
            # As in training, random numbers depend on the step only.
            torch.manual_seed(1000 * step + self.world.rank)
            batches = self.batches[step % len(self.batches)]
            losses.append(train_step(self.engine, self.embed, self.strategy, batches, dropout_key=step_key(3, step)).loss)
            if step >= FIRST_AVERAGED:
                self.strategy.average(averaging_rate(self.strategy.num_averaged, average="swa", ema_decay=0.0))
        return losses

    def check_evaluation_uses_the_average(self, settings: dict) -> None:
        """Score the average of the weights, also in an evaluation that stops; the next steps must not notice."""
        table = TokenTable(toy_split([9, 30, 4, 17, 17]), pad_id=0, device=self.engine.device)
        with pytest.raises(Stopped), self.strategy.averaged():
            raise Stopped
        with self.strategy.averaged():
            scored = evaluate_split(self.classifier, table, self.engine)
        weights = self.strategy.gather_weights()
        if self.world.is_main:
            check_scored_weights(settings, weights, table, scored.probabilities_NK)

    def state(self) -> dict[str, Tensor]:
        """Copy the state, as a checkpoint does; empty except on rank 0."""
        whole = {key: value.clone() for key, value in self.strategy.gather_state()}
        return whole if self.world.is_main else {}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Check equality bit for bit. Fails on all ranks together, so that the reason is not hidden by lost connections."""
    assert found.keys() == expected.keys(), where
    wrong = collectives.all_gather([key for key, value in found.items() if not torch.equal(value, expected[key])])
    assert not any(wrong), f"{where}: other bits in {wrong}"


def check_local(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    """Check everything that a rank holds, including its moments and the optimizer's copies of weights."""
    assert len(found) == len(expected), name
    # The padding of a stage 3 shard is uninitialised memory.
    assert name.startswith("zero3") or all(map(torch.equal, found, expected)), f"{name}: a rank holds other bits"


def check_form(run: Run, state: dict[str, Tensor], where: str, kinds: tuple[str, ...] = KINDS) -> None:
    assert list(state) == [f"{kind}.{name}" for kind in kinds for name in run.shapes], where
    for key, value in state.items():
        assert (value.shape, value.dtype) == (run.shapes[key.partition(".")[2]], torch.float32), f"{where}: {key}"
        assert not value.requires_grad, f"{where}: {key}"


def check_resuming(world: World, settings: dict, name: str, output: Path) -> None:
    """Check for the same bits: trained without saving, saved on the way, and resumed in a new engine."""
    unread = Run(world, settings, name)
    losses = unread.train(0, 2 * HALF)
    local = local_tensors(unread.strategy)
    del unread

    run = Run(world, settings, name)
    assert run.strategy.num_updates == 0
    fresh = run.state()
    first_losses = run.train(0, HALF)
    assert run.strategy.num_updates == HALF
    half, weights = run.state(), run.strategy.gather_weights()
    run.check_evaluation_uses_the_average(settings)
    facts = inspect_engine(run.strategy, run.engine)
    if world.is_main:
        check_form(run, fresh, f"{name}, before the first step", KINDS[:3])
        assert not any(value.any() for key, value in fresh.items() if not key.startswith("weight.")), name
        check_form(run, half, name)
        assert all(value.any() for value in half.values()), f"{name}: control: there are moments"
    check_equal({key: half[key] for key in half if key.startswith("average.")}, under("average", weights), name)
    assert first_losses + run.train(HALF, 2 * HALF) == losses, f"{name}: saving changed the next steps"
    check_local(name, local_tensors(run.strategy), local)
    done = run.state()
    assert run.strategy.num_updates == 2 * HALF
    assert run.strategy.scaling == (1.0, 0)
    del run

    resumed = Run(world, settings, name, is_other=True)
    resumed.strategy.load_state(half, HALF, HALF - FIRST_AVERAGED)
    resumed.strategy.load_scaling(4.0, 2)
    assert resumed.strategy.scaling == (1.0, 0), "no loss scale without fp16"
    check_equal(resumed.state(), half, f"{name}, loaded")
    assert resumed.strategy.num_updates == HALF
    assert resumed.train(HALF, 2 * HALF) == losses[HALF:], f"{name}: other losses after loading"
    check_equal(resumed.state(), done, f"{name}, resumed")
    check_local(name, local_tensors(resumed.strategy), local)
    assert resumed.strategy.num_updates == 2 * HALF
    assert inspect_engine(resumed.strategy, resumed.engine) == facts, f"{name}: sharded as before"
    # Load the initial state into an engine that has moments.
    resumed.strategy.load_state(fresh, 0)
    check_equal(resumed.state(), fresh, f"{name}, loaded back")
    assert resumed.strategy.num_updates == 0
    if world.num_ranks < 3 or name != "ddp":  # DDP's buckets are not those of a first step
        assert resumed.train(0, HALF) == first_losses, f"{name}: other losses after loading back"
        check_equal(resumed.state(), half, f"{name}, restarted")
    if world.is_main:
        save_file(half, output / f"{name}-half.safetensors")
        save_file(done, output / f"{name}-done.safetensors")
        (output / f"{name}.json").write_text(json.dumps(facts | {"losses": losses}))


def under(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": value for name, value in state.items()}


def check_crossed(world: World, settings: dict, name: str, source: Path, output: Path) -> None:
    """Load the state of another engine, perhaps of another number of ranks, and train to the end."""
    run = Run(world, settings, name, is_other=True)
    state = load_file(source) if world.is_main else {}
    run.strategy.load_state(state, HALF, HALF - FIRST_AVERAGED)
    check_equal(run.state(), state, f"{source.stem} in {name}")
    losses = run.train(HALF, 2 * HALF)
    assert run.strategy.num_updates == 2 * HALF
    done = run.state()
    if world.is_main:
        save_file(done, output.with_suffix(".safetensors"))
        output.with_suffix(".json").write_text(json.dumps({"losses": losses}))


def record_scales(world: World, settings: dict, name: str) -> dict:
    """Record the fp16 loss scale after every step. It grows after 3 clean steps, so that it rises and falls."""

    def make(*, is_other: bool) -> Run:
        run = Run(world, settings, name, precision="fp16", is_other=is_other)
        if run.engine.zero is None:
            assert run.strategy._scaler.get_growth_interval() == 2000
            run.strategy._scaler.set_growth_interval(3)
        else:
            scaler = run.strategy.module.optimizer.loss_scaler
            assert scaler.scale_window == 2000
            scaler.scale_window = 3
        return run

    def train(run: Run, begin: int, end: int) -> list[tuple[float, int]]:
        found = []
        for step in range(begin, end):
            run.train(step, step + 1)
            found.append(run.strategy.scaling)
        return found

    num_steps = 26
    run = make(is_other=False)
    found = [run.strategy.scaling]
    run.strategy.load_scaling(2.0**24, 1)
    found += [run.strategy.scaling, *train(run, 0, num_steps)]
    updates, state, scaling = run.strategy.num_updates, run.state(), run.strategy.scaling
    num_averaged = run.strategy.num_averaged
    rest = train(run, num_steps, num_steps + 2 * HALF)
    resumed = make(is_other=True)
    resumed.strategy.load_state(state, updates, num_averaged)
    resumed.strategy.load_scaling(*scaling)
    assert resumed.strategy.scaling == scaling
    assert train(resumed, num_steps, num_steps + 2 * HALF) == rest, f"{name}: another scale after loading"
    check_equal(resumed.state(), run.state(), f"{name} in fp16")
    assert resumed.strategy.num_updates == run.strategy.num_updates > updates
    return {"first": found, "rest": rest, "updates": updates, "steps": num_steps}


def main() -> None:
    # DeepSpeed warns of its hooks and of deprecated collectives.
    warnings.simplefilter("ignore")
    output, settings = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    world = detect_world(os.environ)
    for name in settings["resumed"]:
        check_resuming(world, settings, name, output)
    for name, source, target in settings["crossed"]:
        check_crossed(world, settings | {"dropout": 0.0}, name, Path(source), output / target)
    if settings["refusals"]:
        with pytest.raises(UserError) as refused:
            Run(world, settings, "zero2-dealt")
        if world.is_main:
            (output / "refused.json").write_text(json.dumps({"message": str(refused.value)}))
    if settings["scales"]:
        # fp16 is refused on a CPU, but it works.
        engine_module.choose_precision = lambda precision, *, use_cuda: precision
        found = {name: record_scales(world, settings, name) for name in settings["scales"]}
        if world.is_main:
            (output / "scales.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    # Outside of main(): the strategy must be freed before its process group (see collectives.close).
    collectives.close()
