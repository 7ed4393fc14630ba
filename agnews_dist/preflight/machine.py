"""Checks that each rank makes alone: device, memory, data, disks, hub."""

import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.cuda.nccl import version as nccl_version

from agnews_dist.data.corpus import check_source
from agnews_dist.data.hub_files import Request
from agnews_dist.distributed import collectives
from agnews_dist.distributed.node_resources import Cores, count_devices, find_cores
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import choose_precision, should_use_cuda
from agnews_dist.engine.memory import Setup, Shape
from agnews_dist.errors import UserError
from agnews_dist.preflight.disks import probe_directory
from agnews_dist.preflight.findings import Finding, first_line, run_with_timeout
from agnews_dist.preflight.memory_check import check_memory
from agnews_dist.report.result_files import versions

DEVICE_FILES = Path("/dev")
CACHE_BYTES_PER_TOKEN = 8
"""Upper bound: two or four bytes of the id, and a text's offset and label."""
BYTES_PER_TOKEN = 4
"""Bytes of a file that hold a token; English text has 4.4."""
GPU_SECONDS = 60.0
"""Limit for the first CUDA call, which loads libraries and may read from a slow file system."""
BYTES_PER_SAVED_WEIGHT = 12
"""fp32 bytes of a trainable weight and AdamW's two moments."""
AG_NEWS_TOKENS = 52 * 128_000
"""Estimate for data that is not a local file."""
UNUSABLE = {"device": "unusable"}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The parts of the configuration that preflight checks."""

    world: World
    """Ranks of the planned run, from this rank's point of view; may differ from the ranks that run the doctor."""
    model_name: str
    source: str
    device: str
    precision: str
    run_dir: Path
    cache_dir: Path
    num_checkpoints: int
    feature_bytes: int
    """Limit of the feature cache on disk; 0: not on disk."""
    settings: Mapping[str, object]
    """Settings that must be equal on all ranks."""
    list_requests: Callable[[], Sequence[Request]]
    """Returns the requests to the hub; raises a UserError for a wrong path."""
    list_config_requests: Callable[[], Sequence[Request]]
    """The same, for the model's config and tokenizer."""
    check_engine: Callable[[], None]
    """Raises a UserError if the engine cannot start here."""
    read_memory_setup: Callable[[], tuple[Shape, Setup]]
    """Reads the model's config; raises a UserError if it cannot."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Results of one rank's own checks, and facts that are compared with other ranks."""

    host: str
    device: Mapping[str, str]
    """Type (cuda, cpu or unusable), precision and, of a GPU, model."""
    cores: Cores
    threads: int
    versions: Mapping[str, str]
    settings: Mapping[str, object]
    findings: list[Finding]
    memory: Mapping[str, object]
    """Memory estimate, for JSON."""


def check_rank(planned: PlannedRun, world: World, hub: Sequence[Finding]) -> RankReport:
    """Run all checks that need no other rank; `world`: the ranks that run the doctor. `hub`: of the first rank of a node."""
    device, info = check_device(planned)
    sizes, values = None, {"fits": False}
    try:
        sizes = planned.read_memory_setup()
        memory, values = check_memory(planned.model_name, *sizes, planned.world)
    except UserError as error:
        memory = Finding("model", "fail", str(error))
    except RuntimeError as error:  # from the GPU driver
        memory = Finding("memory", "fail", first_line(error))
    # A missing device is reported once, not again by the memory check.
    memory_rows = [memory] if memory.found != device.found else []
    no_data = collectives.catch(partial(check_source, planned.source))
    data = Finding("data", "fail", str(no_data)) if no_data is not None else Finding("data", "ok", planned.source)
    # The ranks of a node see the same disks.
    disks = check_disks(planned, sizes) if world.local_rank == 0 else []
    return RankReport(
        host=socket.gethostname(),
        device=info,
        cores=find_cores(os.environ),
        threads=torch.get_num_threads(),
        versions=versions(),
        settings=planned.settings,
        # A model that is not there fails the next check, too.
        findings=[device, *hub, *memory_rows, data, *disks],
        memory=values,
    )


def check_device(planned: PlannedRun) -> tuple[Finding, dict[str, str]]:
    """Check device, driver, precision, and that the engine can start. Returns the device's facts as well."""
    world = planned.world
    try:
        planned.check_engine()
        use_cuda = should_use_cuda(world, planned.device)
        precision = choose_precision(planned.precision, use_cuda=use_cuda)
    except UserError as error:
        return Finding("device", "fail", str(error)), UNUSABLE
    if not use_cuda:
        return _check_cpu(planned.device, precision), {"device": "cpu", "precision": precision}
    described, error = run_with_timeout(GPU_SECONDS, lambda: _multiply_on_gpu(world.local_rank))
    if described is None:
        remedy = "Look for another program on it with nvidia-smi, or exclude this node (sbatch --exclude)"
        return Finding("device", "fail", f"GPU {world.local_rank} fails: {error}", remedy), UNUSABLE
    name, found = described
    found += f", runs in {precision}, CUDA {torch.version.cuda}"
    info, num_visible = {"device": "cuda", "precision": precision, "GPU": name}, torch.cuda.device_count()
    if num_visible > world.ranks_per_node:
        remedy = "Start one rank per GPU: --nproc_per_node, or NPROC"
        found += f"; {world.ranks_per_node} of {num_visible} GPUs used"
        return Finding("device", "warn", found, remedy), info
    return Finding("device", "ok", found), info


def _check_cpu(wanted: str, precision: str) -> Finding:
    """Check that running on the CPU is intended: the job may have GPUs that torch does not see."""
    # A job or a user may hide all GPUs on purpose. Without such a variable, the device files count.
    is_stated = not {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"}.isdisjoint(os.environ)
    num_gpus = count_devices(os.environ) if is_stated else len(list(DEVICE_FILES.glob("nvidia[0-9]*")))
    if wanted == "cpu" or not num_gpus:
        return Finding("device", "ok", f"CPU, {precision}, no GPU is used")
    found = f"torch {torch.__version__} sees no GPU, though {num_gpus} are here: the job would run on the CPU"
    remedy = (
        "Check nvidia-smi, the container's GPU option (apptainer --nv) and that torch is a CUDA build for this driver; "
        "or set --engine.device cpu"
    )
    return Finding("device", "fail", found, remedy)


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


def check_disks(planned: PlannedRun, sizes: tuple[Shape, Setup] | None) -> list[Finding]:
    """Write to every directory that the run writes to."""
    checkpoints = model = features = 0
    num_tokens = _estimate_tokens(Path(planned.source))
    if sizes is not None:
        shape, setup = sizes
        trained = shape.count_trainable(setup.trainable_blocks, setup.num_classes)
        checkpoints = BYTES_PER_SAVED_WEIGHT * trained * (planned.num_checkpoints + 2)
        model = 4 * (trained + shape.count_frozen(setup.trainable_blocks))
        features = min(planned.feature_bytes, 4 * num_tokens * shape.width)
    return [
        probe_directory("run.dir", planned.run_dir, checkpoints + model),
        probe_directory("data.cache_dir", planned.cache_dir, CACHE_BYTES_PER_TOKEN * num_tokens, optional_bytes=features),
        probe_directory("temporary", Path(tempfile.gettempdir()), 1_000_000),
    ]


def _estimate_tokens(source: Path) -> int:
    """Estimate the tokens of the data from the size of its files; a compressed file may hold some times as many."""
    try:
        files = source.rglob("*") if source.is_dir() else [source]
        num_bytes = sum(path.stat().st_size for path in files if path.is_file())
    except OSError:  # another check says why it cannot be read
        num_bytes = 0
    return num_bytes // BYTES_PER_TOKEN if num_bytes else AG_NEWS_TOKENS
