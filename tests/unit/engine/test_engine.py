"""The engine on one CPU process: what it refuses, what it chooses, and that nothing but the step scales a gradient."""

import subprocess
import sys

import pytest
import torch
from support.processes import python

from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.device import choose_precision, chooses_cuda
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError


def make(device: str = "cpu") -> Engine:
    return Engine(World(), device=device, precision="auto", allow_tf32=True, timeout_seconds=60)


def test_cpu_runs_in_fp32_by_default():
    engine = make()
    assert (engine.precision, engine.device.type, engine.frozen_dtype) == ("fp32", "cpu", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"engine.device cuda, but torch .* sees no CUDA device.*--engine.device auto"):
        make(device="cuda")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    """Only the answers of the driver are replaced: no machine of the tests has a GPU to count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chooses_cuda(World(rank=1, num_ranks=4, local_rank=1, ranks_per_node=4), "auto")
    with pytest.raises(
        UserError, match=r"\[rank 2/4\] is number 2 on this node, which shows 2 GPU.*Lower --nproc_per_node"
    ):
        chooses_cuda(World(rank=2, num_ranks=4, local_rank=2, ranks_per_node=4), "auto")
    assert not chooses_cuda(World(rank=2, num_ranks=4, local_rank=2, ranks_per_node=4), "cpu")


def test_no_variable_of_accelerate_compiles_or_scales():
    """accelerate lets these win over its own arguments; a loss of slope 1 must have the gradient 1 all the same."""
    code = """if True:
        import torch
        from agnews_dist.engine.engine import Engine
        from agnews_dist.distributed.world import World
        engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        layer = torch.nn.Linear(1, 1)
        wrapped = engine.prepare(layer, torch.optim.SGD(layer.parameters()), max_grad_norm=0.0)
        wrapped.backward(wrapped(torch.ones(1, 1)).sum())
        print(type(wrapped.module).__name__, layer.weight.grad.item())
    """
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "eager"}
    done: subprocess.CompletedProcess[str] = python("-c", code, **variables)
    assert done.stdout == "Linear 1.0\n"


def test_half_precision_on_a_cpu_is_refused_with_the_reason():
    assert [choose_precision(wanted, use_cuda=False) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UserError, match=r"engine.precision fp16 on a CPU: .* less exact. Set --engine.precision fp32"):
        Engine(World(), device="cpu", precision="fp16", allow_tf32=False, timeout_seconds=60)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_precision_of_a_gpu(monkeypatch, has_bf16):
    """Only the driver's answers are replaced."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    assert choose_precision("auto", use_cuda=True) == ("bf16" if has_bf16 else "fp32")
    assert choose_precision("fp16", use_cuda=True) == "fp16"
    if not has_bf16:
        with pytest.raises(
            UserError, match=r"an old GPU has no bf16: .*emulated. Set --engine.precision fp16 \(with loss"
        ):
            choose_precision("bf16", use_cuda=True)


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        UserError, match=r"DeepSpeed is not installed: .*pip install 'agnews_dist\[deepspeed\]', or set"
    ):
        Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60, zero=ZeroOptions(2))


def test_deepspeed_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"DeepSpeed takes it whatever is asked. Hide it with CUDA_VISIBLE_DEVICES=''"):
        Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60, zero=ZeroOptions(2))


@pytest.mark.parametrize(
    ("name", "zero"),
    [("ACCELERATE_USE_DEEPSPEED", None), ("ACCELERATE_USE_FSDP", None), ("ACCELERATE_USE_FSDP", ZeroOptions(2))],
)
def test_another_engine_of_accelerates_own_configuration_is_refused(monkeypatch, name, zero):
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=rf"{name}=true, but engine.backend names another engine: .*--engine.backend"):
        Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60, zero=zero)


ONE_PROCESS = """
import os
import torch
from agnews_dist.engine.engine import Engine
from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed_config import Zero

engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60, zero=Zero(2))
layer = torch.nn.Linear(1, 1)
wrapped = engine.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0), max_grad_norm=0.0)
before = layer.weight.item()
wrapped.accumulating(is_last=True)
wrapped.backward(wrapped(torch.ones(1, 1)).sum())
wrapped.update()
print(round(before - layer.weight.item(), 6), os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]))
"""


def test_deepspeed_in_one_process_without_launcher_and_compiler(tmp_path):
    """It would otherwise ask for MPI, and compile for a minute; the slope of 1 comes through accelerate's variable too."""
    variables = {
        "PATH": "/nowhere",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    done: subprocess.CompletedProcess[str] = python("-c", ONE_PROCESS, **variables)
    assert done.stdout.splitlines()[-1] == "1.0 []"
