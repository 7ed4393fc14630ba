"""Device and precision of a rank, checked before anything is loaded."""

import os
import sys
import tempfile
import time
from pathlib import Path
from shutil import which

import torch

from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.storage.capacity import free_host_bytes, resident_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(precision: str, *, use_cuda: bool) -> str:
    """Return bf16, fp32 or fp16, or raise UserError. 'auto' is bf16 on GPUs that have it, otherwise fp32."""
    has_bf16 = use_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if use_cuda and precision == "bf16" and not has_bf16:
        raise UserError(
            f"engine.precision bf16: {torch.cuda.get_device_name()} has no bf16 and would emulate it. "
            "Set --engine.precision fp16 or fp32."
        )
    if not use_cuda and precision == "fp16":
        raise UserError("engine.precision fp16: on a CPU it is slower than fp32 and less exact. Set --engine.precision fp32.")
    return precision


def should_use_cuda(world: World, device: str) -> bool:
    """Return True if this rank runs on a GPU. Raise UserError without the CUDA that was set, or with more ranks than GPUs."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            f"engine.device cuda: torch {torch.__version__} sees no CUDA device. "
            "Set --engine.device auto, or install a CUDA build of torch and check nvidia-smi."
        )
    if device == "cpu" or not available:
        return False
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{world.label} has local rank {world.local_rank}, but this node has {torch.cuda.device_count()} GPU(s): NCCL "
            "needs one GPU per rank. Lower --nproc_per_node, or set --engine.device cpu."
        )
    return True


def find_compiler_fault() -> tuple[str, str] | None:
    """Return (why torch.compile cannot work here, what to do); None: it may work.

    TorchInductor needs a C++ compiler on CPUs, and Triton one for its launchers on GPUs. Both load the libraries that it makes.
    """
    # The names that Triton and TorchInductor look for.
    on_gpu = torch.cuda.is_available()
    variable, usual = ("CC", ("gcc", "clang", "cc")) if on_gpu else ("CXX", ("clang++" if sys.platform == "darwin" else "g++",))
    chosen = os.environ.get(variable)
    if not any(map(which, (chosen,) if chosen else usual)):
        reason = f"torch.compile needs a C++ compiler, and {chosen or ' or '.join(usual)} is not found"
        return reason, f"Install one, set {variable} to another"
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    existing = next(path for path in (cache, *cache.absolute().parents) if path.is_dir())
    if os.statvfs(existing).f_flag & os.ST_NOEXEC or not os.access(existing, os.W_OK):
        reason = f"torch.compile loads the libraries that it makes in {cache}, which is noexec or read-only"
        return reason, "Set TORCHINDUCTOR_CACHE_DIR to another directory"
    return None


def check_compiler(wanted: str) -> None:
    """Check before anything is loaded that torch.compile can work here, if `engine.compile` is `always`.

    Raises:
        UserError: it cannot.
    """
    if wanted == "always" and (fault := find_compiler_fault()):
        raise UserError(f"engine.compile always: {fault[0]}. {fault[1]}, or set --engine.compile never.")


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Measure matrix products for about `seconds`; return floating-point operations per second."""
    side = 4096 if device.type == "cuda" else 384
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    torch.get_device_module(device).synchronize(device)
    count, start = 0, time.perf_counter()
    while True:
        for _ in range(8):
            torch.mm(left, right)
        torch.get_device_module(device).synchronize(device)
        count += 8
        if (elapsed := time.perf_counter() - start) >= seconds:
            return count * 2 * side**3 / elapsed


def free_device_bytes(device: torch.device, ranks_per_node: int) -> int:
    """Return the free bytes of this rank's GPU, or on a CPU its share of the free host memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes() // ranks_per_node


def used_bytes(device: torch.device) -> int:
    """Return the memory that this process uses now: torch's allocations on a GPU, resident memory on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
