"""What a rank may run on: GPU or CPU, and in which precision."""

import torch

from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.storage.capacity import free_host_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(precision: str, *, use_cuda: bool) -> str:
    """bf16, fp32 or fp16; 'auto' is the best that the device has.

    Raises:
        UserError: bf16 on a GPU without it, fp16 on a CPU.
    """
    has_bf16 = use_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if use_cuda and precision == "bf16" and not has_bf16:
        raise UserError(
            f"engine.precision bf16, but {torch.cuda.get_device_name()} has no bf16: every product would be emulated. "
            "Set --engine.precision fp16 (with loss scaling) or fp32."
        )
    if not use_cuda and precision == "fp16":
        raise UserError(
            "engine.precision fp16 on a CPU: its products are computed in fp32 and rounded, slower than fp32 and less exact. "
            "Set --engine.precision fp32."
        )
    return precision


def chooses_cuda(world: World, device: str) -> bool:
    """Whether this rank runs on a GPU; the stories ask before they load anything.

    Raises:
        UserError: CUDA asked for but absent, or more ranks than GPUs on this node.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            f"engine.device cuda, but torch {torch.__version__} sees no CUDA device: the job would run on the CPU, many times "
            "slower. Use --engine.device auto, or install a CUDA build of torch and check nvidia-smi."
        )
    if device == "cpu" or not available:
        return False
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{world.label} is number {world.local_rank} on this node, which shows {torch.cuda.device_count()} GPU(s): NCCL "
            "refuses two ranks on one GPU. Lower --nproc_per_node, or use --engine.device cpu."
        )
    return True


def free_device_bytes(device: torch.device, ranks_per_node: int) -> int:
    """Free memory of this rank's GPU; without one, this rank's part of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes() // ranks_per_node
