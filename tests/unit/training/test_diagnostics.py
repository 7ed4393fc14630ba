"""The dry run of the largest step: it leaves no trace, and finds a step that does not fit before any work is lost."""

import weakref

import numpy as np
import pytest
import torch
from support.fork_server import run_python
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.model.prefix import uncached_features
from agnews_dist.training.diagnostics import dry_run
from agnews_dist.training.step import train_step

LENGTHS = np.random.default_rng(3).integers(1, 31, 40).tolist()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)


def make_loader(engine: Engine) -> TrainLoader:
    table = TokenTable(toy_split(LENGTHS), pad_id=0, device=engine.device)
    return TrainLoader(table, engine.world, PlanSettings(global_batch_size=12), max_tokens_per_rank=100, quadratic=0.0)


def train_epoch(engine: Engine, *, with_dry_run: bool) -> dict[str, torch.Tensor]:
    """Return the weights after an epoch with dropout, which draws from the global random state."""
    torch.manual_seed(0)
    classifier, loader = toy_classifier(dropout=0.3), make_loader(engine)
    if with_dry_run:
        dry_run(classifier, loader.largest_step(0), engine)
        assert all(parameter.grad is None for parameter in classifier.suffix.parameters())
        assert not classifier.suffix.training
    optimizer = torch.optim.SGD(classifier.suffix.parameters(), lr=0.1)
    strategy = engine.prepare(classifier.suffix.train(), optimizer, max_grad_norm=0.0)
    for batches in loader.steps(0):
        train_step(engine, uncached_features(classifier.prefix), strategy, batches)
    return {name: value.detach() for name, value in classifier.suffix.named_parameters()}


def test_dry_run_changes_nothing(engine):
    with_it, without = train_epoch(engine, with_dry_run=True), train_epoch(engine, with_dry_run=False)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], value) for name, value in without.items())


def test_dry_run_takes_every_micro_batch_forward_and_backward(engine):
    classifier, batches = toy_classifier(), make_loader(engine).largest_step(0)
    forward, backward = [], []
    classifier.suffix.register_forward_hook(lambda module, args, output: forward.append(args[1].tolist()))
    classifier.suffix.out_head.register_full_backward_hook(lambda module, grad_in, grad_out: backward.append(len(grad_out[0])))
    dry_run(classifier, batches, engine)
    assert len(batches.micro_batches) > 1
    assert forward == [batch.lengths_B.tolist() for batch in batches.micro_batches]
    assert backward == [len(batch.labels_B) for batch in batches.micro_batches]


def test_dry_run_allocates_the_moments_of_every_parameter(engine, monkeypatch):
    # They are allocated while the backward pass needs the most memory.
    classifier, held, at_backward, make = toy_classifier(), [], [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda like: held.append(weakref.ref(tensor := make(like))) or tensor)

    def during_backward(module, grad_in, grad_out):
        at_backward.append(sum(ref().numel() for ref in held if ref() is not None))

    classifier.suffix.out_head.register_full_backward_hook(during_backward)
    dry_run(classifier, make_loader(engine).largest_step(0), engine)
    assert at_backward[0] == 2 * sum(parameter.numel() for parameter in classifier.suffix.parameters())
    assert all(ref() is None for ref in held)


IN_BF16 = """
from test_diagnostics import make_loader
import torch
from support.toy import toy_classifier
from agnews_dist.engine.engine import Engine
from agnews_dist.training.diagnostics import dry_run
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.distributed.world import World

engine = Engine(World(), device="cpu", precision="bf16", allow_tf32=False, timeout_seconds=60)
classifier, kinds = toy_classifier(), set()
place_classifier(classifier, engine, fast_path=True)
block = next(iter(classifier.suffix.h.values()))
block.mlp.c_fc.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
dry_run(classifier, make_loader(engine).largest_step(0), engine)
print(kinds)
"""


@pytest.mark.slow
def test_dry_run_computes_in_the_precision_of_training():
    assert run_python("-c", IN_BF16, PYTHONPATH="tests/unit/training:tests:tests/ranks:.").stdout == "{torch.bfloat16}\n"


OUT_OF_MEMORY = """
import resource
import numpy as np
import torch
from support.toy import toy_classifier, toy_split
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.training.diagnostics import dry_run
from agnews_dist.distributed.world import World

engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
table = TokenTable(toy_split([32] * 20_000), pad_id=0, device=engine.device)
settings = PlanSettings(global_batch_size=20_000)
batches = TrainLoader(table, World(), settings, max_tokens_per_rank=10**6, quadratic=0.0).largest_step(0)
classifier = toy_classifier()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
try:
    dry_run(classifier, batches, engine)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_dry_run_reports_a_step_that_does_not_fit():
    done = run_python("-c", OUT_OF_MEMORY, PYTHONPATH="tests:tests/ranks:.")
    assert "largest step (20000 x 32 tokens at once): out of memory." in done.stdout
    assert "Lower batch.max_tokens_per_rank" in done.stdout


CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:129] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [RuntimeError(CPU_ALLOCATOR), RuntimeError("std::bad_alloc"), MemoryError()])
def test_dry_run_knows_every_error_without_memory(engine, error):
    def fail(*_: object) -> None:
        raise error

    classifier = toy_classifier()
    classifier.suffix.out_head.register_forward_hook(fail)
    with pytest.raises(UserError, match=r"tokens at once\): out of memory"):
        dry_run(classifier, make_loader(engine).largest_step(0), engine)


def test_dry_run_passes_other_errors_on(engine):
    classifier = toy_classifier()
    classifier.suffix.out_head = torch.nn.Linear(5, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dry_run(classifier, make_loader(engine).largest_step(0), engine)
