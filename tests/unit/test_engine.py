"""The engine on one CPU process: what it refuses, what it chooses, and that nothing but the step scales a gradient."""

import subprocess

import pytest
import torch
from launching import python

from agnews_dist.device import chooses_cuda
from agnews_dist.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.world import World


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


def test_no_variable_of_accelerate_scales_the_gradient():
    """accelerate lets this variable win over its own argument; a loss of slope 1 must have the gradient 1 all the same."""
    code = """if True:
        import torch
        from agnews_dist.engine import Engine
        from agnews_dist.world import World
        engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        layer = torch.nn.Linear(1, 1)
        wrapped = engine.prepare(layer, torch.optim.SGD(layer.parameters()), max_grad_norm=0.0)
        wrapped.backward(wrapped(torch.ones(1, 1)).sum())
        print(layer.weight.grad.item())
    """
    done: subprocess.CompletedProcess[str] = python("-c", code, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert float(done.stdout) == 1.0
