"""Whether a run fits into this machine: its memory estimate against what is free, before anything is loaded."""

import importlib.util
import math
import shutil

import psutil
import torch
from transformers import GPT2Config

from agnews_dist.config.schema import Config, DataConfig, ModelConfig
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import choose_precision, chooses_cuda, free_device_bytes
from agnews_dist.engine.memory import Diagnosis, Estimate, Setup, Shape, estimate, misfit
from agnews_dist.errors import ModelError
from agnews_dist.model.gpt2 import load_shape
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.report.result_files import versions
from agnews_dist.storage.capacity import free_host_bytes, gigabytes


def shape_of(gpt2: GPT2Config) -> Shape:
    """The sizes that memory depends on."""
    return Shape(
        num_blocks=gpt2.n_layer,
        width=gpt2.n_embd,
        inner=gpt2.n_inner or 4 * gpt2.n_embd,
        num_heads=gpt2.n_head,
        num_rows=gpt2.vocab_size + 1,
        num_positions=gpt2.n_positions,
    )


def setup_of(config: Config, gpt2: GPT2Config, world: World) -> Setup:
    """What the configuration makes of this rank on this machine."""
    engine, blocks = config.engine, config.model.trainable_blocks
    use_cuda = chooses_cuda(world, engine.device)
    half = choose_precision(engine.precision, use_cuda=use_cuda) != "fp32"
    stored = str(gpt2.dtype or "float32").removeprefix("torch.")
    return Setup(
        trainable_blocks=gpt2.n_layer if blocks == "all" else min(blocks, gpt2.n_layer),
        num_ranks=world.num_ranks,
        ranks_per_node=world.ranks_per_node,
        backend=engine.backend,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        max_tokens_per_rank=config.batch.max_tokens_per_rank,
        max_length=config.data.max_length,
        texts_per_rank=texts_per_rank(config, world, use_cuda=use_cuda),
        num_threads=torch.get_num_threads(),
        device="cuda" if use_cuda else "cpu",
        half=half,
        # What is computed in the very form it is stored in stays the file's pages, which the ranks of a node share.
        shares_frozen=not (use_cuda or half) and config.model.init == "pretrained" and stored == "float32",
        fast_path=engine.fast_path,
        checkpointing=engine.activation_checkpointing,
        compress_gradients=engine.gradient_compression == "bf16",
        runtime_bytes=psutil.Process().memory_info().rss,
    )


def texts_per_rank(config: Config, world: World, *, use_cuda: bool) -> int | None:
    """The most texts of a global batch that one rank takes; with a token budget, as if all were of full length."""
    batch, num_ranks = config.batch, world.num_ranks
    texts = batch.global_batch_size
    if batch.global_token_budget is not None:
        texts = math.ceil(batch.global_token_budget / config.data.max_length)
    share = math.ceil(texts / num_ranks)
    if use_cuda and num_ranks > 1:
        # With features divided over the GPUs a rank takes the texts it holds: its share is left to chance (4 deviations).
        share = min(texts, share + math.ceil(4 * math.sqrt(share)))
    return share


def read_shape(model: ModelConfig, data: DataConfig) -> GPT2Config:
    """The model's config, without its weights.

    Raises:
        ModelError: there is none, or it is not GPT-2's.
    """
    tokenizer = load_tokenizer(model.name, revision=model.revision, pad_token=data.pad_token)
    return load_shape(model.name, revision=model.revision, init=model.init, tokenizer=tokenizer)


def check_fits(config: Config, world: World) -> Estimate:
    """The estimate per rank.

    Raises:
        ModelError: there is no such model, or the run cannot fit; then it names settings with which it would.
    """
    gpt2 = read_shape(config.model, config.data)
    shape, setup = shape_of(gpt2), setup_of(config, gpt2, world)
    free_device, free_host = free_bytes(setup, world)
    problem = misfit(shape, setup, free_device=free_device, free_host=free_host)
    if problem is not None:
        raise ModelError(problem)
    return estimate(shape, setup)


def free_bytes(setup: Setup, world: World) -> tuple[int, int]:
    """What is free for this rank on its device, the libraries that are loaded counted as free, and on its node."""
    device = torch.device(setup.device, world.local_rank) if setup.device == "cuda" else torch.device("cpu")
    free = free_device_bytes(device, world.ranks_per_node)
    return free + (setup.runtime_bytes if setup.device == "cpu" else 0), free_host_bytes()


def diagnose(config: Config, world: World) -> Diagnosis:
    """Look at this machine and at the model's config.

    Raises:
        ModelError: there is no such model.
    """
    gpt2 = read_shape(config.model, config.data)
    shape, setup = shape_of(gpt2), setup_of(config, gpt2, world)
    free_device, free_host = free_bytes(setup, world)
    use_cuda = setup.device == "cuda"
    has_compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    facts = {
        **versions(),
        "device": torch.cuda.get_device_name() if use_cuda else f"CPU, {torch.get_num_threads()} threads",
        "GPUs": str(torch.cuda.device_count()),
        "precision": choose_precision(config.engine.precision, use_cuda=use_cuda),
        "DeepSpeed": "installed"
        if importlib.util.find_spec("deepspeed")
        else "not installed: engine.backend ddp or fsdp",
        "C++ compiler": has_compiler or "none: engine.compile never (DeepSpeed needs none here)",
        "features": f"{config.engine.feature_cache}: {shape.width * (2 if setup.half else 4):,} bytes per token, if they fit",
        "free host memory": gigabytes(free_host),
    }
    blocks = f"{setup.trainable_blocks} of {shape.num_blocks} blocks train"
    return Diagnosis(
        facts=facts,
        setting=f"{config.model.name}, {blocks}, engine {setup.backend}, {world.num_ranks} rank(s)",
        estimate=estimate(shape, setup),
        free_device=free_device,
        free_host=free_host,
        problem=misfit(shape, setup, free_device=free_device, free_host=free_host),
    )
