"""What one rank finds on its own, without any other: devices, cores, compiler, memory, disks, the hub."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.cuda.nccl import version as nccl_version

from agnews_dist.config.schema import Config
from agnews_dist.data.corpus import check_source
from agnews_dist.distributed.node_resources import count_devices
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import choose_precision, chooses_cuda
from agnews_dist.engine.memory import Diagnosis
from agnews_dist.errors import UserError
from agnews_dist.preflight import disks
from agnews_dist.preflight.findings import Finding, within
from agnews_dist.preflight.hub_check import find_hub
from agnews_dist.preflight.memory_check import diagnose, read_shape, setup_of, shape_of
from agnews_dist.run.setup import check_engine
from agnews_dist.storage.locations import cache_root

NUM_CLASSES = 4
DEVICES = Path("/dev")
TOKEN_BYTES = 50_000_000
"""Those of AG News, generously."""
GPU_SECONDS = 60.0
"""CUDA's first call may load for long from a slow file system."""
BYTES_PER_SAVED_WEIGHT = 12
"""A weight that trains, and AdamW's two moments, in fp32."""


@dataclass(frozen=True)
class DeviceInfo:
    """What a rank computes on and in: the same for all, or they cannot train together."""

    device: str
    """cuda or cpu; unusable where it was refused."""
    precision: str
    name: str
    """Of the GPU."""


@dataclass(frozen=True)
class RankReport:
    """All that one rank found on its own."""

    findings: list[Finding]
    diagnosis: Diagnosis | None
    """None: the model cannot be read."""
    error: UserError | None
    """With which it cannot."""
    kind: DeviceInfo
    made: list[Path]
    """Directories that were not there before."""


UNUSABLE = DeviceInfo("unusable", "", "")


def find_engine(config: Config, asked: World) -> tuple[Finding, DeviceInfo]:
    """Device, driver, precision, and whether the engine can start."""
    try:
        check_engine(config, asked)
        use_cuda = chooses_cuda(asked, config.engine.device)
        precision = choose_precision(config.engine.precision, use_cuda=use_cuda)
    except UserError as error:
        return refused("device", error), UNUSABLE
    if not use_cuda:
        return _find_no_gpu(config.engine.device, precision), DeviceInfo("cpu", precision, "")
    tried = within(GPU_SECONDS, lambda: _try_gpu(asked.local_rank))
    if tried.value is None:
        remedy = "Look at nvidia-smi for another program on it, or leave this node out (sbatch --exclude)"
        return Finding(
            check="device", verdict="fail", found=f"GPU {asked.local_rank} fails: {tried.error}", remedy=remedy
        ), UNUSABLE
    name, found = tried.value
    found += f", runs in {precision}; driver {_driver()}, CUDA {torch.version.cuda}"
    kind, shown = DeviceInfo("cuda", precision, name), torch.cuda.device_count()
    if shown > asked.ranks_per_node:
        remedy = "Start one rank per GPU: --nproc_per_node, or NPROC"
        found += f"; {asked.ranks_per_node} of {shown} GPUs used"
        return Finding(check="device", verdict="warn", found=found, remedy=remedy), kind
    return Finding(check="device", verdict="ok", found=found), kind


def _find_no_gpu(wanted: str, precision: str) -> Finding:
    """A CPU, which is not meant where the job has GPUs that torch does not see."""
    found = f"CPU, {precision}, no GPU is used"
    # A job or a user that shows none means it; where nobody says anything, the system does.
    is_said = not {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"}.isdisjoint(os.environ)
    shown = count_devices(os.environ) if is_said else len(list(DEVICES.glob("nvidia[0-9]*")))
    if wanted == "cpu" or not shown:
        return Finding(check="device", verdict="ok", found=found)
    remedy = (
        "See whether nvidia-smi runs here, the container shows GPUs (apptainer --nv) and torch is a CUDA build for this "
        "driver; or set --engine.device cpu"
    )
    found = f"torch {torch.__version__} sees no GPU, though {shown} are here: the job would run on the CPU"
    return Finding(check="device", verdict="fail", found=found, remedy=remedy)


def _try_gpu(index: int) -> tuple[str, str]:
    """(name, what it is) of a GPU that has multiplied something."""
    torch.cuda.set_device(index)
    numbers = torch.ones(1024, 1024, device=torch.device("cuda", index))
    if (total := int((numbers @ numbers).sum())) != 1024**3:
        raise RuntimeError(f"a product sums up to {total} instead of {1024**3}")
    properties = torch.cuda.get_device_properties(index)
    has_bf16 = "has bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "has no bf16"
    nccl = ".".join(map(str, nccl_version()))
    return properties.name, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {has_bf16}, NCCL {nccl}"


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def find_compiler(compile_setting: str) -> Finding:
    """torch.compile needs one on a CPU."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is not None:
        return Finding(check="C++ compiler", verdict="ok", found=compiler)
    remedy = "Install one (Debian and Ubuntu: apt install g++), load its module, or set --engine.compile never"
    verdict = "fail" if compile_setting == "always" else "warn"
    return Finding(check="C++ compiler", verdict=verdict, found="none: nothing can be compiled here", remedy=remedy)


def find_data(source: str) -> Finding:
    """Whether a path leads anywhere; nothing of it is read."""
    try:
        check_source(source)
    except UserError as error:
        return refused("data", error)
    return Finding(check="data", verdict="ok", found=source)


def find_memory(config: Config, asked: World) -> tuple[Finding, Diagnosis | None, UserError | None]:
    """Whether the run fits; None where the model cannot be read, with the error."""
    try:
        found = diagnose(config, asked)
    except UserError as error:
        return refused("model", error), None, error
    except RuntimeError as error:  # a GPU's
        return refused("memory", UserError(str(error).splitlines()[0])), None, None
    if found.problem is not None:
        return Finding(check="memory", verdict="fail", found=found.problem), found, None
    needed = max(found.estimate.device_bytes, found.estimate.host_bytes)
    return Finding(check="memory", verdict="ok", found=f"about {needed / 1e9:.1f} GB per rank: it fits"), found, None


def find_disks(config: Config, asked: World) -> tuple[list[Finding], list[Path]]:
    """(a real write in every directory that the run writes to, and the space there; directories made for that)."""
    checkpoints = model = features = 0
    try:
        gpt2 = read_shape(config.model, config.data)
        shape, setup = shape_of(gpt2), setup_of(config, gpt2, asked)
        trained = shape.trained(setup.trainable_blocks, NUM_CLASSES)
        checkpoints = BYTES_PER_SAVED_WEIGHT * trained * (config.checkpoint.keep + 2)
        model = 4 * (trained + shape.frozen(setup.trainable_blocks))
        if config.engine.feature_cache == "disk":
            features = int(min(config.engine.feature_cache_gigabytes * 1e9, 52 * 128_000 * shape.width * 4))
    except UserError:
        pass  # told by find_memory
    found: list[Finding] = []
    made: list[Path] = []

    def look(what: str, directory: Path, needed_bytes: int, better: int = 0) -> None:
        made.extend(disks.missing_parents(directory.absolute()))
        found.append(disks.probe(what, directory.absolute(), needed_bytes, better=better))

    look("run.dir", Path(config.run.dir), checkpoints + model)
    look("data.cache_dir", cache_root(config.data.cache_dir), TOKEN_BYTES, features)
    look("temporary", Path(tempfile.gettempdir()), 1_000_000)
    return found, made


def refused(check: str, error: UserError) -> Finding:
    """What a story would end with, as a finding."""
    return Finding(check=check, verdict="fail", found=str(error))


def check_rank(config: Config, asked: World, world: World) -> RankReport:
    """All of these; `asked`: the ranks of the training, `world`: those that are here."""
    hub = find_hub(config)  # before anything that asks it
    device, kind = find_engine(config, asked)
    memory, diagnosis, error = find_memory(config, asked)
    # A node's ranks see the same disks.
    written, made = find_disks(config, asked) if world.local_rank == 0 else ([], [])
    compiler, data = find_compiler(config.engine.compile), find_data(config.data.source)
    # A device that is not there keeps the model's memory from being told, which is no fault of the model.
    of_model = [memory] if memory.found != device.found else []
    return RankReport([device, compiler, *of_model, data, *written, hub], diagnosis, error, kind, made)
