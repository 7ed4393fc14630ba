"""Check that a run fits into this machine: compare its memory estimate with the free memory, before any weight is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from agnews_dist.distributed.world import World
from agnews_dist.engine.device import free_device_bytes
from agnews_dist.engine.memory import Estimate, Setup, Shape, estimate, explain_misfit
from agnews_dist.errors import ModelError
from agnews_dist.report.result_files import versions
from agnews_dist.storage.capacity import free_host_bytes


@dataclass(frozen=True)
class Diagnosis:
    """Memory estimate of a run, next to the free memory of this machine."""

    facts: Mapping[str, str]
    """Versions, for bug reports."""
    setting: str
    """Model, trainable blocks, engine and ranks of the estimate."""
    estimate: Estimate
    free_device: int
    """Bytes per rank."""
    free_host: int
    """Bytes of the node."""
    problem: str | None
    """Message of the error if the run cannot fit, with settings that fit."""

    def to_dict(self) -> Mapping[str, object]:
        """Return a form for JSON."""
        return asdict(self) | {
            "device_bytes": self.estimate.device_bytes,
            "host_bytes": self.estimate.host_bytes,
            "fits": self.problem is None,
        }


def check_fits(shape: Shape, setup: Setup, world: World) -> Estimate:
    """Return the memory estimate per rank.

    Raises:
        ModelError: the run cannot fit. The message names settings that fit.
    """
    free_device, free_host = free_bytes(setup, world)
    problem = explain_misfit(shape, setup, free_device=free_device, free_host=free_host)
    if problem is not None:
        raise ModelError(problem)
    return estimate(shape, setup)


def diagnose(model_name: str, shape: Shape, setup: Setup, world: World) -> Diagnosis:
    """Return the memory estimate and the free memory, whether or not the run fits."""
    free_device, free_host = free_bytes(setup, world)
    blocks = f"{setup.trainable_blocks} of {shape.num_blocks} blocks train"
    return Diagnosis(
        facts=versions(),
        setting=f"{model_name}, {blocks}, engine {setup.backend}, {world.num_ranks} rank(s)",
        estimate=estimate(shape, setup),
        free_device=free_device,
        free_host=free_host,
        problem=explain_misfit(shape, setup, free_device=free_device, free_host=free_host),
    )


def free_bytes(setup: Setup, world: World) -> tuple[int, int]:
    """Return the free bytes (on this rank's device, on its node). On a CPU, memory the process already uses counts as free."""
    device = torch.device(setup.device, world.local_rank) if setup.device == "cuda" else torch.device("cpu")
    free = free_device_bytes(device, world.ranks_per_node)
    return free + (setup.runtime_bytes if setup.device == "cpu" else 0), free_host_bytes()
