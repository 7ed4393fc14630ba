"""Memory estimate per rank, by part, computed from a model's shape and the settings. Needs no torch.

A trainable weight takes 4 bytes, its gradient 4, AdamW's two moments 8; they are whole, or sharded as in ZeRO (Rajbhandari et
al. 2020). Activations were counted on Hugging Face's GPT-2 block with dropout, as tests/unit/engine/test_memory.py does. The
engines' buffers were read from the source of DeepSpeed 0.19 and torch 2.13.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agnews_dist.engine.deepspeed_config import LARGEST_BUCKET
from agnews_dist.storage.capacity import gigabytes

FULL_BLOCK_BYTES = {4: 72, 2: 46}
"""Bytes per matrix product's element (fp32, half) -> bytes kept per token and unit of width by a block of all tokens."""
PLAIN_BLOCK_BYTES = {4: 120, 2: 70}
"""The same without `engine.fast_path`: Hugging Face's GELU keeps every intermediate step."""
SCORES_BYTES = 12
"""Per token, head and attended token, on a CPU: with dropout it keeps three such matrices. CUDA kernels keep none."""
CAST_BYTES = 24
"""Per squared width and block in half precision: autocast copies the 12 width^2 weights."""
LAST_BLOCK_BYTES = 8
"""Per token and unit of width of the last block: its input in fp32, and the normalised input."""
MEAN_TOKENS = 50
"""Tokens of an average text (AG News: 52)."""
TOLERANCE = 0.15
"""Allowed error of the estimate. A run that is too large by less starts. Measured errors: tests/bench/RESULTS.md."""
LIVE_WEIGHTS = 10**9
"""Elements that stage 3 keeps gathered between forward and backward pass (stage3_max_live_parameters)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a GPT-2."""

    num_blocks: int
    width: int
    inner: int
    num_heads: int
    num_rows: int
    """Rows of the token embedding, [PAD] included."""
    num_positions: int

    @property
    def block(self) -> int:
        """Number of weights of one block."""
        return 4 * self.width**2 + 2 * self.width * self.inner + 9 * self.width + self.inner

    @property
    def embeddings(self) -> int:
        """Number of weights of the embeddings."""
        return (self.num_rows + self.num_positions) * self.width

    def count_trainable(self, trainable_blocks: int, num_classes: int, *, train_embeddings: bool = False) -> int:
        # The last blocks, the final norm, `out_head`; its bias as in model/gpt2.py.
        has_bias = 2 * num_classes <= self.width
        above = trainable_blocks * self.block + 2 * self.width + num_classes * (self.width + has_bias)
        return above + train_embeddings * self.embeddings

    def count_frozen(self, trainable_blocks: int, *, train_embeddings: bool = False) -> int:
        return (not train_embeddings) * self.embeddings + (self.num_blocks - trainable_blocks) * self.block


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings and machine that the estimate depends on."""

    trainable_blocks: int
    train_embeddings: bool = False
    num_ranks: int
    ranks_per_node: int
    backend: Literal["ddp", "fsdp", "deepspeed"]
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    max_tokens_per_rank: int
    max_length: int
    texts_per_rank: int | None = None
    """Most texts of a rank's share of a global batch; None: unknown."""
    num_threads: int = 1
    """Calls of the frozen part that run at the same time on a CPU."""
    device: Literal["cpu", "cuda"]
    half: bool
    """bf16 or fp16: frozen weights and trainable products take 2 bytes."""
    shares_frozen: bool = False
    """The ranks of a node share one copy of the frozen weights."""
    fast_path: bool = True
    pooling: Literal["last", "mean"] = "last"
    """mean: the last block runs for all tokens too."""
    activation_checkpointing: bool = False
    compress_gradients: bool = False
    num_passes: int = 1
    """Forward passes of a step over each text."""
    has_average: bool = False
    """The optimizer also keeps the average of each weight over steps."""
    num_classes: int
    """Classes; before the data is read the fewest possible."""
    cache_bytes: int = 0
    """Features cached on this rank's device."""
    call_tokens: int
    """Tokens of one packed call of the frozen part."""
    evaluation_tokens: int
    """Padded tokens of one evaluation batch."""
    runtime_bytes: int = 0
    """Interpreter and libraries, measured before the model is loaded."""


@dataclass(frozen=True)
class Estimate:
    """Peak bytes per rank, by part. On a CPU all of it is device memory."""

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict[str, int])
    """Host memory of rank 0 when it has a GPU: offloaded tensors, copies for the best weights and for a checkpoint."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def estimate(shape: Shape, setup: Setup) -> Estimate:
    """Estimate the memory of rank 0, which needs the most: it also copies the best weights and checkpoints."""
    total = shape.count_trainable(setup.trainable_blocks, setup.num_classes, train_embeddings=setup.train_embeddings)
    embeddings = setup.train_embeddings * shape.embeddings
    shard = -(-total // setup.num_ranks)
    zero = setup.zero_stage if setup.backend == "deepspeed" else 0
    has_sharded_weights = zero == 3 or (setup.backend == "fsdp" and setup.num_ranks > 1)
    # From the second step on, stage 3 keeps gathered weights until the backward pass has used them.
    live = min(total, LIVE_WEIGHTS if zero == 3 else 2 * shape.block + embeddings) if has_sharded_weights else 0
    bucket = 4 * min(total, LARGEST_BUCKET)

    # Two moments of each weight.
    optimizer = (12 if setup.has_average else 8) * (shard if zero or setup.backend == "fsdp" else total)
    buffers = 0
    if zero:
        # An fp32 copy of the shard, and a flat copy of its gradients during the update.
        optimizer += 8 * shard
        # Stage 3: the bucket, its scattered copy and prefetched weights (measured: 3.4 to 4.1 buckets).
        buffers = bucket * (2 if zero < 3 else 4)
    elif setup.backend == "fsdp" and setup.num_ranks > 1:
        buffers = 2 * 4 * min(total, max(shape.block, embeddings))
    elif setup.num_ranks > 1 and setup.compress_gradients:
        buffers = 2 * total
    frozen = (2 if setup.half else 4) * shape.count_frozen(setup.trainable_blocks, train_embeddings=setup.train_embeddings)
    # Adding [PAD] copies the embedding on every rank.
    embedding = 4 * shape.num_rows * shape.width
    if setup.shares_frozen and not setup.train_embeddings:
        frozen = embedding + (frozen - embedding) // setup.ranks_per_node
    device = {
        "frozen weights": frozen,
        "weights that train": 4 * (shard if has_sharded_weights else total) + 4 * live,
        "gradients": 4 * (shard if has_sharded_weights or zero == 2 else total),
        "optimizer": optimizer,
        "engine's buffers": buffers,
        "activations": estimate_activation_bytes(shape, setup),
        "features": setup.cache_bytes,
    }
    # A checkpoint is written from a copy of weights, moments and averages while training continues.
    host = {"best weights": 4 * total, "checkpoint": (16 if setup.has_average else 12) * total}
    if setup.offload != "none":
        # The update also holds its gradients and a second copy of the weights on the host.
        host["optimizer"] = device.pop("optimizer") + 8 * shard
    if setup.offload == "all":
        host["weights that train"] = 4 * shard
        device["weights that train"] = 4 * live
    if setup.device == "cpu":
        for name, num_bytes in host.items():
            device[name] = device.get(name, 0) + num_bytes
        host = {}
        device["libraries"] = setup.runtime_bytes
    return Estimate({name: num_bytes for name, num_bytes in device.items() if num_bytes}, host)


def estimate_members(shape: Shape, setup: Setup, num_members: int) -> Estimate:
    """Estimate the memory of a rank that trains members of a sweep in lock step.

    They write no checkpoints. Gradients exist for one member at a time.

    `setup.runtime_bytes`: on a CPU measured when the model is in memory.
    """
    alone = estimate(shape, setup)
    device, host = dict(alone.device), dict(alone.host)
    on_host = device if setup.device == "cpu" else host
    del on_host["checkpoint"]
    on_host["best weights"] *= num_members
    device["optimizer"] *= num_members
    # Members are copies of the untrained weights, which are part of the model.
    device["weights that train"] *= num_members + (on_host is host)
    if on_host is device:
        device.pop("frozen weights", None)
        device["libraries, model and tokens"] = device.pop("libraries", 0)
    return Estimate(device, host)


def estimate_activation_bytes(shape: Shape, setup: Setup) -> int:
    """Estimate the larger of a training micro-batch, a call of the frozen part and an evaluation batch."""
    width, product = shape.width, 2 if setup.half else 4
    num_tokens = compute_largest_micro_batch(setup)
    call = setup.call_tokens if setup.fast_path else num_tokens
    num_tokens *= setup.num_passes
    scores = SCORES_BYTES * shape.num_heads * setup.max_length if setup.device == "cpu" else 0
    per_block = FULL_BLOCK_BYTES[product] if setup.fast_path else PLAIN_BLOCK_BYTES[product]
    block = num_tokens * (per_block * width + scores) + (CAST_BYTES * width**2 if setup.half else 0)
    has_last = setup.fast_path and setup.pooling == "last"
    num_full = max(0, setup.trainable_blocks - 1) if has_last else setup.trainable_blocks
    # The backward pass of a block adds about two of its widest tensors.
    backward = 4 * num_tokens * (4 * width) * 2 if num_full else 0
    kept = num_full * block
    if setup.activation_checkpointing:
        kept = min(kept, num_full * 4 * width * num_tokens + block)
    last = num_tokens * width * LAST_BLOCK_BYTES
    last += num_tokens // MEAN_TOKENS * width * (16 * shape.num_heads + 24)
    call *= setup.num_threads if setup.fast_path and setup.device == "cpu" else 1
    # Residual stream, normalised input, queries, keys, values, attention output; then the MLP's inner row.
    frozen = call * (6 * width + shape.inner) * product
    # Evaluation keeps no activations. A block of all tokens needs its MLP rows, their activation and the residual stream.
    scored = setup.evaluation_tokens * ((6 * width + 2 * shape.inner) * product if num_full else 4 * width * 4)
    # The mask of their dropout, and a dense gradient of each micro-batch.
    embedded = setup.train_embeddings * (num_tokens * width + 4 * shape.embeddings)
    return max(kept + backward + last + embedded, frozen, scored)


def compute_largest_micro_batch(setup: Setup) -> int:
    """Return the padded tokens of the largest micro-batch: the limit, or less if a rank's share is smaller."""
    limit, texts = setup.max_tokens_per_rank, setup.texts_per_rank
    return limit if texts is None else min(limit, texts * setup.max_length)


def propose_settings(setup: Setup) -> list[tuple[str, Setup]]:
    """Propose settings that need less memory, fastest first: (flags, setup with these flags)."""
    fewer_tokens: dict[str, Any] = {"batch.max_tokens_per_rank": max(setup.max_length, compute_largest_micro_batch(setup) // 4)}
    recompute: dict[str, Any] = {"engine.activation_checkpointing": True}
    both = fewer_tokens | recompute
    proposals = [fewer_tokens, recompute, both]
    if setup.backend == "ddp" and setup.num_ranks > 1:
        proposals.append(both | {"engine.backend": "fsdp"})
    for stage in (2, 3):
        zero = both | {"engine.backend": "deepspeed", "engine.zero_stage": stage, "engine.offload": "none"}
        proposals += [zero, zero | {"engine.offload": "optimizer"}]
    proposals.append(both | {"engine.backend": "deepspeed", "engine.zero_stage": 3, "engine.offload": "all"})
    frozen: dict[str, Any] = {"model.train_embeddings": False} if setup.train_embeddings else {}
    proposals += [frozen, both | frozen] if frozen else []
    for blocks in (setup.trainable_blocks // 2, 1):
        if 0 < blocks < setup.trainable_blocks:
            fewer = frozen | {"model.trainable_blocks": blocks}
            proposals += [fewer, both | fewer]
    found: list[tuple[str, Setup]] = []
    for changes in proposals:
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items() if value != "none")
        found.append((flags, replace(setup, **{name.partition(".")[2]: value for name, value in changes.items()})))
    return found


def format_estimate(found: Estimate) -> str:
    """Format the total and the four largest parts."""
    parts = sorted(found.device.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {gigabytes(num_bytes)}" for name, num_bytes in parts[:4])
    return f"about {gigabytes(found.device_bytes)} per rank: {named}"


def explain_misfit(shape: Shape, setup: Setup, *, free_device: int, free_host: int) -> str | None:
    """Return None if the run may fit, otherwise a message that names settings that fit. `free_host`: bytes of the node."""

    def fits(other: Setup, factor: float) -> bool:
        found = estimate(shape, other)
        # Every rank of the node holds offloaded tensors. Only rank 0 makes the other copies.
        copies = setup.ranks_per_node if other.offload != "none" else 1
        return found.device_bytes * factor <= free_device and found.host_bytes * copies * factor <= free_host

    if fits(setup, 1 - TOLERANCE):
        return None
    fitting = [flags for flags, other in propose_settings(setup) if fits(other, 1.0)]
    if fitting:
        remedy = "Each of these would fit: " + "; ".join(fitting[:3])
    else:
        one_block = replace(setup, trainable_blocks=min(1, setup.trainable_blocks), train_embeddings=False)
        least = estimate(shape, one_block).device_bytes
        remedy = f"Use a smaller model or more memory: with one trainable block it needs {gigabytes(least)}"
    found = estimate(shape, setup)
    if found.device_bytes * (1 - TOLERANCE) > free_device:
        misfit = f"{format_estimate(found)}; {gigabytes(free_device)} are free on this rank's device"
    else:
        needs = gigabytes(found.host_bytes)
        misfit = f"about {needs} per rank in host memory; {gigabytes(free_host)} are free in this node's memory"
    return f"the run needs {misfit}: it would run out of memory. {remedy}."
