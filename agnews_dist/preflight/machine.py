"""What one rank finds on its own, without any other: devices, cores, compiler, memory, disks, the hub."""

import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch.cuda.nccl import version as nccl_version

from agnews_dist.config import Config
from agnews_dist.data.corpus import SYNTHETIC
from agnews_dist.data.tokens import cache_root
from agnews_dist.device import choose_precision, chooses_cuda
from agnews_dist.errors import UserError
from agnews_dist.fitting import diagnose, read_shape, setup_of, shape_of
from agnews_dist.memory import Diagnosis
from agnews_dist.model.hub import EMBEDDED
from agnews_dist.node_cache import choose_node_cache, is_memory
from agnews_dist.preflight import disks
from agnews_dist.preflight.findings import Finding
from agnews_dist.sources import check_engine
from agnews_dist.world import World

NUM_CLASSES = 4
TOKEN_BYTES = 50_000_000
"""Those of AG News, generously."""
HUB_SECONDS = 5.0
BYTES_PER_SAVED_WEIGHT = 12
"""A weight that trains, and AdamW's two moments, in fp32."""


def find_engine(config: Config, asked: World) -> Finding:
    """Device, driver, precision, and whether the engine can start."""
    try:
        check_engine(config, asked)
        use_cuda = chooses_cuda(asked, config.engine.device)
        precision = choose_precision(config.engine.precision, use_cuda=use_cuda)
    except UserError as error:
        return refused("device", error)
    if not use_cuda:
        return Finding(check="device", verdict="ok", found=f"CPU, {precision}, no GPU is used")
    properties = torch.cuda.get_device_properties(asked.local_rank)
    has_bf16 = "has bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "has no bf16"
    nccl = ".".join(map(str, nccl_version()))
    found = (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {has_bf16}, runs in {precision}; driver {_driver()}, "
        f"CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    shown, asked_for = torch.cuda.device_count(), asked.ranks_per_node
    if shown > asked_for:
        remedy = "Start one rank per GPU: --nproc_per_node, or NPROC"
        return Finding(
            check="device", verdict="warn", found=f"{found}; {asked_for} of {shown} GPUs used", remedy=remedy
        )
    return Finding(check="device", verdict="ok", found=found)


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


def find_memory(config: Config, asked: World) -> tuple[Finding, Diagnosis | None, UserError | None]:
    """Whether the run fits; None where the model cannot be read, with the error."""
    try:
        found = diagnose(config, asked)
    except UserError as error:
        return refused("model", error), None, error
    if found.problem is not None:
        return Finding(check="memory", verdict="fail", found=found.problem), found, None
    needed = max(found.estimate.device_bytes, found.estimate.host_bytes)
    return Finding(check="memory", verdict="ok", found=f"about {needed / 1e9:.1f} GB per rank: it fits"), found, None


def find_disks(config: Config, asked: World, node_cache_wanted: str) -> list[Finding]:
    """A real write in every directory that the run writes to, and the space there."""
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
    found = [
        disks.probe("run.dir", Path(config.run.dir).absolute(), checkpoints + model),
        disks.probe("data.cache_dir", cache_root(config.data.cache_dir).absolute(), TOKEN_BYTES + features),
        disks.probe("temporary", Path(tempfile.gettempdir()), 1_000_000),
    ]
    try:
        node_dir = choose_node_cache(node_cache_wanted, os.environ)
    except UserError as error:
        return [*found, refused("disk: node cache", error)]
    if node_dir is None:
        return found
    copied = TOKEN_BYTES + (0 if is_memory(node_dir) else features)
    return [*found, disks.probe("node cache", node_dir.absolute(), copied)]


def find_hub(config: Config) -> Finding:
    """Whether what the hub has to give is cached, or the hub can be reached."""
    wanted: list[str] = []
    if config.model.name != EMBEDDED and not Path(config.model.name).expanduser().exists():
        wanted.append(f"models--{config.model.name.replace('/', '--')}")
    if config.data.source != SYNTHETIC and not Path(config.data.source).expanduser().exists():
        wanted.append(f"datasets--{config.data.source.replace('/', '--')}")
    if not wanted:
        return Finding(check="hub", verdict="ok", found="not needed: model and data are local")
    from huggingface_hub import constants

    absent = [name for name in wanted if not (Path(constants.HF_HUB_CACHE) / name / "snapshots").is_dir()]
    if not absent:
        return Finding(check="hub", verdict="ok", found=f"cached below {constants.HF_HOME}")
    names = ", ".join(name.partition("--")[2].replace("--", "/") for name in absent)
    remedy = "Run python -m agnews_dist.prepare where there is a network, with the same HF_HOME; or set local paths"
    if constants.HF_HUB_OFFLINE:
        found = f"{names}: not below {constants.HF_HOME}, and HF_HUB_OFFLINE is set"
        return Finding(check="hub", verdict="fail", found=found, remedy=remedy)
    reason = _unreachable(constants.ENDPOINT)
    if reason is not None:
        found = f"{names}: not below {constants.HF_HOME}, and {constants.ENDPOINT} cannot be reached ({reason})"
        return Finding(check="hub", verdict="fail", found=found, remedy=remedy)
    return Finding(check="hub", verdict="ok", found=f"{names} will be downloaded: {constants.ENDPOINT} answers")


def _unreachable(url: str) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def refused(check: str, error: UserError) -> Finding:
    """What a story would end with, as a finding."""
    return Finding(check=check, verdict="fail", found=str(error))


def look_here(
    config: Config, asked: World, node_cache_wanted: str
) -> tuple[list[Finding], Diagnosis | None, UserError | None]:
    """All of these; the error with which the model cannot be read comes along."""
    memory, diagnosis, error = find_memory(config, asked)
    findings = [find_engine(config, asked), find_compiler(config.engine.compile), memory]
    return [*findings, *find_disks(config, asked, node_cache_wanted), find_hub(config)], diagnosis, error
