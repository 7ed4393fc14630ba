"""The arguments of the memory estimate: the model's shape, and how a rank of this run uses it."""

import math
from typing import Any

import psutil
import torch
from transformers import GPT2Config

from agnews_dist.config.schema import Config
from agnews_dist.data.batching.loader import EVALUATION_TOKENS
from agnews_dist.data.classes import read_class_names
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import choose_precision, should_use_cuda
from agnews_dist.engine.memory import Setup, Shape
from agnews_dist.model.prefix import CALL_TOKENS
from agnews_dist.run.model_setup import read_model_files


def build_shape(gpt2: GPT2Config) -> Shape:
    """Return the sizes of a GPT-2 that its memory depends on."""
    return Shape(
        num_blocks=gpt2.n_layer,
        width=gpt2.n_embd,
        inner=gpt2.n_inner or 4 * gpt2.n_embd,
        num_heads=gpt2.n_head,
        num_rows=gpt2.vocab_size + 1,
        num_positions=gpt2.n_positions,
    )


def build_memory_setup(config: Config, world: World, gpt2: GPT2Config | None = None) -> tuple[Shape, Setup]:
    """Return the two arguments of the memory estimate, for this rank on this machine. `gpt2`: the model's, if it is read.

    The data is not read for it: the classes are those of `data.class_names`, or else the fewest that a classifier has.

    Raises:
        UserError: the model cannot be read, or the device or precision is not available here.
    """
    gpt2 = gpt2 or read_model_files(config.model, config.data).config
    engine, blocks = config.engine, config.model.trainable_blocks
    use_cuda = should_use_cuda(world, engine.device)
    half = choose_precision(engine.precision, use_cuda=use_cuda) != "fp32"
    stored = str(gpt2.dtype or "float32").removeprefix("torch.")
    setup = Setup(
        trainable_blocks=gpt2.n_layer if blocks == "all" else min(blocks, gpt2.n_layer),
        train_embeddings=config.model.train_embeddings,
        num_ranks=world.num_ranks,
        ranks_per_node=world.ranks_per_node,
        backend=engine.backend,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        max_length=config.data.max_length,
        **describe_steps(config, world, use_cuda=use_cuda),
        num_threads=torch.get_num_threads(),
        device="cuda" if use_cuda else "cpu",
        half=half,
        # Weights used in the type they are stored in stay memory-mapped: the ranks of a node share those pages.
        shares_frozen=not (use_cuda or half) and config.model.init == "pretrained" and stored == "float32",
        fast_path=engine.fast_path,
        pooling=config.model.pooling,
        activation_checkpointing=engine.activation_checkpointing,
        num_classes=len(read_class_names(config.data.class_names) or range(2)),
        compress_gradients=engine.gradient_compression == "bf16",
        runtime_bytes=psutil.Process().memory_info().rss,
        call_tokens=CALL_TOKENS["cuda" if use_cuda else "cpu"],
        evaluation_tokens=EVALUATION_TOKENS,
    )
    return build_shape(gpt2), setup


def describe_steps(config: Config, world: World, *, use_cuda: bool) -> dict[str, Any]:
    """Return the fields of `Setup` that members of a sweep with the same features may differ in."""
    return {
        "max_tokens_per_rank": config.batch.max_tokens_per_rank,
        "texts_per_rank": count_texts_per_rank(config, world, use_cuda=use_cuda),
        "num_passes": 2 if config.optim.r_drop else 1,
        "has_average": config.optim.average != "none",
    }


def count_texts_per_rank(config: Config, world: World, *, use_cuda: bool) -> int | None:
    """Return the most texts of a global batch that one rank takes. With a token budget, every text counts as full length."""
    batch, num_ranks = config.batch, world.num_ranks
    texts = batch.global_batch_size
    if batch.global_token_budget is not None:
        texts = math.ceil(batch.global_token_budget / config.data.max_length)
    share = math.ceil(texts / num_ranks)
    if use_cuda and num_ranks > 1:
        # With features sharded over GPUs a rank takes the texts whose features it holds: a random number, mean + 4 deviations.
        share = min(texts, share + math.ceil(4 * math.sqrt(share)))
    return share
