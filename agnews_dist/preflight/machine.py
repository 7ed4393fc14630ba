"""Checks that each rank makes alone: device, compiler, memory, data, disks, hub."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.cuda.nccl import version as nccl_version

from agnews_dist.data.corpus import check_source
from agnews_dist.distributed.node_resources import count_devices
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import choose_precision, should_use_cuda
from agnews_dist.engine.memory import Setup, Shape
from agnews_dist.errors import UserError
from agnews_dist.preflight.disks import list_missing_parents, probe_directory
from agnews_dist.preflight.findings import Finding, run_with_timeout
from agnews_dist.preflight.hub_check import check_hub
from agnews_dist.preflight.memory_check import Diagnosis, diagnose

DEVICE_FILES = Path("/dev")
TOKEN_BYTES = 50_000_000
"""Upper bound for the token cache of AG News."""
GPU_SECONDS = 60.0
"""Limit for the first CUDA call, which loads libraries and may read from a slow file system."""
BYTES_PER_SAVED_WEIGHT = 12
"""fp32 bytes of a trainable weight and AdamW's two moments."""
AG_NEWS_TOKENS = 52 * 128_000


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The parts of the configuration that preflight checks."""

    world: World
    """Ranks of the planned run, from this rank's point of view; may differ from the ranks that run the doctor."""
    model_name: str
    revision: str | None
    init: str
    source: str
    device: str
    precision: str
    compile: str
    run_dir: Path
    cache_dir: Path
    num_checkpoints: int
    feature_bytes: int
    """Limit of the feature cache on disk; 0: not on disk."""
    settings: Mapping[str, object]
    """Settings that must be equal on all ranks."""
    check_engine: Callable[[], None]
    """Raises a UserError if the engine cannot start here."""
    read_memory_setup: Callable[[], tuple[Shape, Setup]]
    """Reads the model's config; raises a UserError if it cannot."""


@dataclass(frozen=True)
class DeviceInfo:
    """Device type and precision of a rank: equal on all ranks, or they cannot train together."""

    device: str
    """cuda, cpu, or unusable."""
    precision: str
    name: str
    """GPU model."""


@dataclass(frozen=True)
class RankReport:
    """Results of one rank's own checks."""

    findings: list[Finding]
    diagnosis: Diagnosis | None
    """None: the model's config cannot be read."""
    device: DeviceInfo
    created: list[Path]
    """Directories that the disk checks created."""


UNUSABLE = DeviceInfo("unusable", "", "")


def check_rank(planned: PlannedRun, world: World) -> RankReport:
    """Run all checks that need no other rank; `world`: the ranks that run the doctor."""
    # Before any other read from the hub: it switches to offline mode if the hub does not answer.
    hub = check_hub(planned.model_name, planned.revision, planned.init, planned.source)
    device, info = check_device(planned)
    memory, diagnosis, sizes = check_memory(planned)
    # The ranks of a node see the same disks.
    disks, created = check_disks(planned, sizes) if world.local_rank == 0 else ([], [])
    compiler, data = check_compiler(planned.compile), check_data(planned.source)
    # A missing device is reported once, not again by the memory check.
    memory_rows = [memory] if memory.found != device.found else []
    return RankReport([device, compiler, *memory_rows, data, *disks, hub], diagnosis, info, created)


def check_device(planned: PlannedRun) -> tuple[Finding, DeviceInfo]:
    """Check device, driver, precision, and that the engine can start."""
    world = planned.world
    try:
        planned.check_engine()
        use_cuda = should_use_cuda(world, planned.device)
        precision = choose_precision(planned.precision, use_cuda=use_cuda)
    except UserError as error:
        return Finding(check="device", verdict="fail", found=str(error)), UNUSABLE
    if not use_cuda:
        return _check_cpu(planned.device, precision), DeviceInfo("cpu", precision, "")
    outcome = run_with_timeout(GPU_SECONDS, lambda: _multiply_on_gpu(world.local_rank))
    if outcome.value is None:
        found = f"GPU {world.local_rank} fails: {outcome.error}"
        remedy = "Look for another program on it with nvidia-smi, or exclude this node (sbatch --exclude)"
        return Finding(check="device", verdict="fail", found=found, remedy=remedy), UNUSABLE
    name, found = outcome.value
    found += f", runs in {precision}, CUDA {torch.version.cuda}"
    info, num_visible = DeviceInfo("cuda", precision, name), torch.cuda.device_count()
    if num_visible > world.ranks_per_node:
        remedy = "Start one rank per GPU: --nproc_per_node, or NPROC"
        found += f"; {world.ranks_per_node} of {num_visible} GPUs used"
        return Finding(check="device", verdict="warn", found=found, remedy=remedy), info
    return Finding(check="device", verdict="ok", found=found), info


def _check_cpu(wanted: str, precision: str) -> Finding:
    """Check that running on the CPU is intended: the job may have GPUs that torch does not see."""
    # A job or a user may hide all GPUs on purpose. Without such a variable, the device files count.
    is_stated = not {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"}.isdisjoint(os.environ)
    num_gpus = count_devices(os.environ) if is_stated else len(list(DEVICE_FILES.glob("nvidia[0-9]*")))
    if wanted == "cpu" or not num_gpus:
        return Finding(check="device", verdict="ok", found=f"CPU, {precision}, no GPU is used")
    found = f"torch {torch.__version__} sees no GPU, though {num_gpus} are here: the job would run on the CPU"
    remedy = (
        "Check nvidia-smi, the container's GPU option (apptainer --nv) and that torch is a CUDA build for this driver; "
        "or set --engine.device cpu"
    )
    return Finding(check="device", verdict="fail", found=found, remedy=remedy)


def _multiply_on_gpu(index: int) -> tuple[str, str]:
    """Return (name, description) of a GPU after a matrix product with a known result."""
    torch.cuda.set_device(index)
    numbers = torch.ones(1024, 1024, device=torch.device("cuda", index))
    if (total := int((numbers @ numbers).sum())) != 1024**3:
        raise RuntimeError(f"a product sums up to {total} instead of {1024**3}")
    properties = torch.cuda.get_device_properties(index)
    has_bf16 = "has bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "has no bf16"
    nccl = ".".join(map(str, nccl_version()))
    return properties.name, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {has_bf16}, NCCL {nccl}"


def check_compiler(compile_setting: str) -> Finding:
    """Check for a C++ compiler, which torch.compile needs on a CPU."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is not None:
        return Finding(check="C++ compiler", verdict="ok", found=compiler)
    remedy = "Install one (Debian and Ubuntu: apt install g++), load its module, or set --engine.compile never"
    verdict = "fail" if compile_setting == "always" else "warn"
    return Finding(check="C++ compiler", verdict=verdict, found="none: torch.compile is not available", remedy=remedy)


def check_data(source: str) -> Finding:
    """Check that a path exists. Reads no rows."""
    try:
        check_source(source)
    except UserError as error:
        return Finding(check="data", verdict="fail", found=str(error))
    return Finding(check="data", verdict="ok", found=source)


def check_memory(planned: PlannedRun) -> tuple[Finding, Diagnosis | None, tuple[Shape, Setup] | None]:
    """Check that the run fits into memory. Returns (finding, diagnosis, sizes); None if the model's config cannot be read."""
    try:
        sizes = planned.read_memory_setup()
        diagnosis = diagnose(planned.model_name, *sizes, planned.world)
    except UserError as error:
        return Finding(check="model", verdict="fail", found=str(error)), None, None
    except RuntimeError as error:  # from the GPU driver
        return Finding(check="memory", verdict="fail", found=str(error).splitlines()[0]), None, None
    if diagnosis.problem is not None:
        return Finding(check="memory", verdict="fail", found=diagnosis.problem), diagnosis, sizes
    needed = max(diagnosis.estimate.device_bytes, diagnosis.estimate.host_bytes)
    found = f"about {needed / 1e9:.1f} GB per rank: it fits"
    return Finding(check="memory", verdict="ok", found=found), diagnosis, sizes


def check_disks(planned: PlannedRun, sizes: tuple[Shape, Setup] | None) -> tuple[list[Finding], list[Path]]:
    """Write to every directory that the run writes to. Returns (findings, directories created)."""
    checkpoints = model = features = 0
    if sizes is not None:
        shape, setup = sizes
        trained = shape.count_trainable(setup.trainable_blocks, setup.num_classes)
        checkpoints = BYTES_PER_SAVED_WEIGHT * trained * (planned.num_checkpoints + 2)
        model = 4 * (trained + shape.count_frozen(setup.trainable_blocks))
        features = min(planned.feature_bytes, 4 * AG_NEWS_TOKENS * shape.width)
    findings: list[Finding] = []
    created: list[Path] = []
    for name, directory, needed_bytes, optional_bytes in (
        ("run.dir", planned.run_dir, checkpoints + model, 0),
        ("data.cache_dir", planned.cache_dir, TOKEN_BYTES, features),
        ("temporary", Path(tempfile.gettempdir()), 1_000_000, 0),
    ):
        path = directory.absolute()
        created.extend(list_missing_parents(path))
        findings.append(probe_directory(name, path, needed_bytes, optional_bytes=optional_bytes))
    return findings, created
