"""Engine in one CPU process: device, precision and refused settings; nothing but the step scales gradients."""

import subprocess
import sys

import pytest
import torch
from support.fork_server import run_python
from support.processes import python

from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.device import choose_precision, should_use_cuda
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError


def start_engine(device: str = "cpu", precision: str = "fp32", zero: ZeroOptions | None = None) -> Engine:
    return Engine(World(), device=device, precision=precision, allow_tf32=False, timeout_seconds=60, zero=zero)


def test_a_cpu_runs_in_fp32_by_default():
    engine = start_engine(precision="auto")
    assert (engine.precision, engine.device.type, engine.frozen_dtype) == ("fp32", "cpu", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_refused():
    with pytest.raises(UserError, match=r"engine.device cuda: torch .* sees no CUDA device.*--engine.device auto"):
        start_engine(device="cuda")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    """Replace the driver's answers: test machines may have no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert should_use_cuda(World(rank=1, num_ranks=4, local_rank=1, ranks_per_node=4), "auto")
    with pytest.raises(UserError, match=r"\[rank 2/4\] has local rank 2, but this node has 2 GPU.*Lower --nproc_per_node"):
        should_use_cuda(World(rank=2, num_ranks=4, local_rank=2, ranks_per_node=4), "auto")
    assert not should_use_cuda(World(rank=2, num_ranks=4, local_rank=2, ranks_per_node=4), "cpu")


@pytest.mark.slow
def test_accelerate_variables_neither_compile_nor_scale():
    """Check that a loss of slope 1 has the gradient 1. accelerate's variables override its arguments."""
    code = """if True:
        import torch
        from agnews_dist.engine.engine import Engine
        from agnews_dist.distributed.world import World
        engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        layer = torch.nn.Linear(1, 1)
        strategy = engine.prepare(layer, torch.optim.SGD(layer.parameters()), max_grad_norm=0.0)
        strategy.backward(strategy(torch.ones(1, 1)).sum())
        print(type(strategy.module).__name__, layer.weight.grad.item())
    """
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "eager"}
    done: subprocess.CompletedProcess[str] = run_python("-c", code, **variables)
    assert done.stdout == "Linear 1.0\n"


def test_fp16_on_a_cpu_is_refused():
    assert [choose_precision(wanted, use_cuda=False) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UserError, match=r"engine.precision fp16: on a CPU .* less exact. Set --engine.precision fp32"):
        start_engine(precision="fp16")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_choose_precision_on_a_gpu(monkeypatch, has_bf16):
    """Replace the driver's answers."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    assert choose_precision("auto", use_cuda=True) == ("bf16" if has_bf16 else "fp32")
    assert choose_precision("fp16", use_cuda=True) == "fp16"
    if not has_bf16:
        with pytest.raises(UserError, match=r"engine.precision bf16: an old GPU has no bf16 .*Set --engine.precision fp16"):
            choose_precision("bf16", use_cuda=True)


def test_missing_deepspeed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"DeepSpeed is not installed. .*pip install 'agnews_dist\[deepspeed\]', or set"):
        start_engine(zero=ZeroOptions(2))


def test_deepspeed_on_a_cpu_next_to_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"DeepSpeed uses a GPU wherever it finds one. Hide it with CUDA_VISIBLE_DEVICES=''"):
        start_engine(zero=ZeroOptions(2))


@pytest.mark.parametrize(
    ("name", "zero"),
    [("ACCELERATE_USE_DEEPSPEED", None), ("ACCELERATE_USE_FSDP", None), ("ACCELERATE_USE_FSDP", ZeroOptions(2))],
)
def test_an_engine_set_by_accelerate_is_refused(monkeypatch, name, zero):
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=rf"{name}=true: engine.backend names another engine. Set --engine.backend"):
        start_engine(zero=zero)


ONE_PROCESS = """
import os
import torch
from agnews_dist.engine.engine import Engine
from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed_config import ZeroOptions

engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60, zero=ZeroOptions(2))
layer = torch.nn.Linear(1, 1)
strategy = engine.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0), max_grad_norm=0.0)
before = layer.weight.item()
strategy.accumulate(is_last=True)
strategy.backward(strategy(torch.ones(1, 1)).sum())
strategy.update()
print(round(before - layer.weight.item(), 6), os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]))
"""


@pytest.mark.slow
def test_deepspeed_needs_neither_launcher_nor_compiler(tmp_path):
    """Check one process without MPI or compiler. accelerate's variable must not scale the gradient."""
    variables = {"PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": str(tmp_path), "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    # Started cold: the import of DeepSpeed, too, must need no compiler.
    done: subprocess.CompletedProcess[str] = python("-c", ONE_PROCESS, **variables)
    assert done.stdout.splitlines()[-1] == "1.0 []"
