"""Check that a run fits into this machine: compare its memory estimate with the free memory, before any weight is loaded."""

from dataclasses import asdict

import torch

from agnews_dist.distributed.world import World
from agnews_dist.engine.device import free_device_bytes
from agnews_dist.engine.memory import Setup, Shape, estimate, explain_misfit, format_estimate
from agnews_dist.errors import ModelError
from agnews_dist.preflight.findings import Finding
from agnews_dist.report.result_files import versions
from agnews_dist.storage.capacity import free_host_bytes, gigabytes


def check_memory(model_name: str, shape: Shape, setup: Setup, world: World) -> tuple[Finding, dict[str, object]]:
    """Check that the run fits. Returns (finding, estimate and free bytes for JSON)."""
    found, free_host = estimate(shape, setup), free_host_bytes()
    free_device = free_device_bytes(torch.device(setup.device, world.local_rank), world.ranks_per_node)
    # On a CPU, memory that the process already uses counts as free: the estimate contains it.
    free_device += setup.runtime_bytes if setup.device == "cpu" else 0
    problem = explain_misfit(shape, setup, free_device=free_device, free_host=free_host)
    blocks = f"{setup.trainable_blocks} of {shape.num_blocks} blocks train"
    values: dict[str, object] = {
        "facts": versions(),  # for bug reports
        "setting": f"{model_name}, {blocks}, engine {setup.backend}, {world.num_ranks} rank(s)",
        "estimate": asdict(found),
        "free_device": free_device,
        "free_host": free_host,
        "problem": problem,
        "device_bytes": found.device_bytes,
        "host_bytes": found.host_bytes,
        "fits": problem is None,
    }
    if problem is not None:
        return Finding("memory", "fail", problem), values
    host = f", and {gigabytes(found.host_bytes)} in host memory" if found.host else ""
    return Finding("memory", "ok", f"{format_estimate(found)}{host}; {gigabytes(free_device)} are free: it fits"), values


def check_fits(shape: Shape, setup: Setup, world: World) -> None:
    """Check that the run may fit.

    Raises:
        ModelError: it cannot. The message names settings that fit.
    """
    finding, _ = check_memory("", shape, setup, world)
    if finding.verdict == "fail":
        raise ModelError(finding.found)
