"""What one rank will need in memory, by part, from a model's shape and the settings alone. Pure arithmetic.

Letters: P weights that train, D width, H heads, T tokens of the longest text, n ranks. What trains is fp32 under every engine:
4 bytes for a weight, 4 for its gradient, 8 for AdamW's two moments (Kingma and Ba 2015), whole or divided by n as in ZeRO
(Rajbhandari et al. 2020). Activations: bytes that autograd keeps per token, counted on Hugging Face's GPT-2 block with dropout
(tests/unit/engine/test_memory.py counts them again). Buffers of the engines: read from DeepSpeed 0.19 and torch 2.13.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from agnews_dist.engine.deepspeed_config import LARGEST_BUCKET
from agnews_dist.storage.capacity import gigabytes

FULL_BLOCK_BYTES = {4: 72, 2: 46}
"""Per token and unit of width, kept by a block that computes all tokens, by the bytes of a product (fp32, half precision)."""
PLAIN_BLOCK_BYTES = {4: 120, 2: 70}
"""The same with `engine.fast_path` off: Hugging Face's step-by-step GELU."""
SCORES_BYTES = 12
"""Per token, head and token attended to: with dropout a CPU keeps three such matrices. CUDA's kernels keep none."""
CAST_BYTES = 24
"""Per squared width of a block in half precision: autocast's copies of its weights, 12 D^2 of them."""
LAST_BLOCK_BYTES = 8
"""Per token and unit of width, of the block that computes one row per text: its input in fp32 and that normalised."""
MEAN_TOKENS = 50
"""Of a text, for what grows with the number of texts (AG News: 52)."""
PACKED_CALL = {"cpu": 512, "cuda": 65536}
"""Tokens of one call of the frozen part (prefix.py)."""
TOLERANCE = 0.15
"""The error that is allowed for: what is too large by less is tried. Measured errors: tests/bench/RESULTS.md."""
LIVE_WEIGHTS = 10**9
"""Elements that stage 3 leaves gathered between forward and backward pass (DeepSpeed's stage3_max_live_parameters)."""
EVALUATION_TOKENS = 8192
"""Padded tokens of one scoring call (scoring.py)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT-2."""

    num_blocks: int
    width: int
    inner: int
    num_heads: int
    num_rows: int
    """Of the token embedding, [PAD] included."""
    num_positions: int

    @property
    def block(self) -> int:
        """Weights of one block."""
        return 4 * self.width**2 + 2 * self.width * self.inner + 9 * self.width + self.inner

    def trained(self, trainable_blocks: int, num_classes: int) -> int:
        """Weights that train: the last blocks, the final norm, `out_head`."""
        return trainable_blocks * self.block + 2 * self.width + num_classes * (self.width + 1)

    def frozen(self, trainable_blocks: int) -> int:
        """Weights that do not: embeddings and the other blocks."""
        embeddings = (self.num_rows + self.num_positions) * self.width
        return embeddings + (self.num_blocks - trainable_blocks) * self.block


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the configuration and the machine decide."""

    trainable_blocks: int
    num_ranks: int
    ranks_per_node: int
    backend: Literal["ddp", "fsdp", "deepspeed"]
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    max_tokens_per_rank: int
    max_length: int
    texts_per_rank: int | None = None
    """A rank's share of a global batch has no more texts; None: not known."""
    num_threads: int = 1
    """On a CPU so many calls of the frozen part run side by side."""
    device: Literal["cpu", "cuda"]
    half: bool
    """bf16 or fp16: what is frozen takes 2 bytes, and so do products of what trains."""
    shares_frozen: bool = False
    """The ranks of a node hold what is frozen once, together."""
    fast_path: bool = True
    checkpointing: bool = False
    compress_gradients: bool = False
    num_classes: int = 4
    cache_bytes: int = 0
    """Features kept on this rank's device."""
    runtime_bytes: int = 0
    """Interpreter and libraries, measured before anything is loaded."""


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank at the worst moment, by part; on a CPU the device is the host."""

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict[str, int])
    """What offloading, the best epoch's copy and a checkpoint's take beside a GPU, on rank 0."""

    @property
    def device_bytes(self) -> int:
        """All of it on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of it in host memory."""
        return sum(self.host.values())


def estimate(shape: Shape, setup: Setup) -> Estimate:
    """What rank 0, which holds the most, needs while it trains, scores and keeps the best epoch."""
    total = shape.trained(setup.trainable_blocks, setup.num_classes)
    part = -(-total // setup.num_ranks)
    is_offloaded, weights_offloaded = setup.offload != "none", setup.offload == "all"
    zero = setup.zero_stage if setup.backend == "deepspeed" else 0
    divides_weights = zero == 3 or (setup.backend == "fsdp" and setup.num_ranks > 1)
    # Stage 3 knows after the first step that the backward pass will want them again, and lets go of none before it.
    live = min(total, LIVE_WEIGHTS if zero == 3 else 2 * shape.block) if divides_weights else 0
    bucket = 4 * min(total, LARGEST_BUCKET)

    weights = {"weights that train": 4 * (part if divides_weights else total) + 4 * live}
    gradients = 4 * (part if divides_weights or zero == 2 else total)
    optimizer = 8 * (part if zero or setup.backend == "fsdp" else total)
    buffers = 0
    if zero:
        # The part's own fp32 copy, and a flat copy of its gradients during the update.
        optimizer += 8 * part
        # Stage 3: its bucket, what is scattered of it, and what is gathered ahead (measured: 3.4 to 4.1 buckets).
        buffers = bucket * (2 if zero < 3 else 4)
    elif setup.backend == "fsdp" and setup.num_ranks > 1:
        buffers = 2 * 4 * min(total, shape.block)
    elif setup.num_ranks > 1 and setup.compress_gradients:
        buffers = 2 * total
    frozen = (2 if setup.half else 4) * shape.frozen(setup.trainable_blocks)
    # The embedding grown by [PAD] is a copy of every rank's own.
    own = 4 * shape.num_rows * shape.width
    shared = own + (frozen - own) // setup.ranks_per_node
    kept = {
        "frozen weights": shared if setup.shares_frozen else frozen,
        **weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "engine's buffers": buffers,
        "activations": activation_bytes(shape, setup),
        "features": setup.cache_bytes,
    }
    # A checkpoint is written from a copy of weights and moments while training goes on.
    host = {"best epoch": 4 * total, "checkpoint": 12 * total}
    if is_offloaded:
        # The update's gradients are there too, and a second copy of the weights on their way back.
        host["optimizer"] = kept.pop("optimizer") + 8 * part
    if weights_offloaded:
        host["weights that train"] = 4 * part
        kept["weights that train"] = 4 * live
    if setup.device == "cpu":
        for name, num_bytes in host.items():
            kept[name] = kept.get(name, 0) + num_bytes
        host = {}
        kept["libraries"] = setup.runtime_bytes
    return Estimate({name: num_bytes for name, num_bytes in kept.items() if num_bytes}, host)


def activation_bytes(shape: Shape, setup: Setup) -> int:
    """The larger of what training keeps of one micro-batch and what one call of the frozen part computes with."""
    width, product = shape.width, 2 if setup.half else 4
    num_tokens = largest_micro_batch(setup)
    scores = SCORES_BYTES * shape.num_heads * setup.max_length if setup.device == "cpu" else 0
    per_block = FULL_BLOCK_BYTES[product] if setup.fast_path else PLAIN_BLOCK_BYTES[product]
    block = num_tokens * (per_block * width + scores) + (CAST_BYTES * width**2 if setup.half else 0)
    num_full = max(0, setup.trainable_blocks - 1) if setup.fast_path else setup.trainable_blocks
    # The backward pass of a block holds what it kept and about as much again as its widest tensors.
    backward = 4 * num_tokens * (4 * width) * 2 if num_full else 0
    inputs = num_full * 4 * width * num_tokens
    kept = num_full * block
    if setup.checkpointing:
        kept = min(kept, inputs + block)
    last = num_tokens * width * LAST_BLOCK_BYTES
    last += num_tokens // MEAN_TOKENS * width * (16 * shape.num_heads + 24)
    call = PACKED_CALL[setup.device] if setup.fast_path else num_tokens
    call *= setup.num_threads if setup.fast_path and setup.device == "cpu" else 1
    # Residual stream, normalised input, queries, keys and values, attended; then the MLP's inner row.
    frozen = call * (6 * width + shape.inner) * product
    # Scoring keeps nothing; of a block that runs in full, the rows of its MLP and their activation, and the residual stream.
    scored = EVALUATION_TOKENS * ((6 * width + 2 * shape.inner) * product if num_full else 4 * width * 4)
    return max(kept + backward + last, frozen, scored)


def largest_micro_batch(setup: Setup) -> int:
    """Padded tokens: the limit, or fewer where a rank's whole share of the longest texts stays below it."""
    if setup.texts_per_rank is None:
        return setup.max_tokens_per_rank
    return min(setup.max_tokens_per_rank, setup.texts_per_rank * setup.max_length)


def candidates(setup: Setup) -> list[tuple[str, Setup]]:
    """Other settings that need less, cheapest in time first: the flags to give, and what they make of the setup."""
    fewer = max(setup.max_length, largest_micro_batch(setup) // 4)
    found = [(f"--batch.max_tokens_per_rank {fewer}", replace(setup, max_tokens_per_rank=fewer))]
    found.append(("--engine.activation_checkpointing true", replace(setup, checkpointing=True)))
    small = replace(setup, max_tokens_per_rank=fewer, checkpointing=True)
    both = f"--batch.max_tokens_per_rank {fewer} --engine.activation_checkpointing true"
    found.append((both, small))
    if setup.backend == "ddp" and setup.num_ranks > 1:
        found.append((f"{both} --engine.backend fsdp", replace(small, backend="fsdp")))
    for stage in (2, 3):
        flags = f"--engine.backend deepspeed --engine.zero_stage {stage}"
        divided = replace(small, backend="deepspeed", zero_stage=stage, offload="none")
        found.append((f"{both} {flags}", divided))
        found.append((f"{both} {flags} --engine.offload optimizer", replace(divided, offload="optimizer")))
    everything = replace(small, backend="deepspeed", zero_stage=3, offload="all")
    found.append((f"{both} --engine.backend deepspeed --engine.zero_stage 3 --engine.offload all", everything))
    for fewer_blocks in (setup.trainable_blocks // 2, 1):
        if 0 < fewer_blocks < setup.trainable_blocks:
            found.append((f"--model.trainable_blocks {fewer_blocks}", replace(setup, trainable_blocks=fewer_blocks)))
            found.append(
                (f"{both} --model.trainable_blocks {fewer_blocks}", replace(small, trainable_blocks=fewer_blocks))
            )
    return found


def summary(found: Estimate) -> str:
    """One line for a run's header, the largest parts first."""
    parts = sorted(found.device.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {gigabytes(num_bytes)}" for name, num_bytes in parts[:4])
    return f"about {gigabytes(found.device_bytes)} per rank: {named}"


def misfit(shape: Shape, setup: Setup, *, free_device: int, free_host: int) -> str | None:
    """None if the run may fit into what is free; else an error's text, with settings that would.

    `free_device`: per rank; `free_host`: of the node, not asked without a GPU.
    """

    def fits(other: Setup, share: float) -> bool:
        found = estimate(shape, other)
        # What is offloaded every rank of the node holds, the copies rank 0 alone.
        copies = setup.ranks_per_node if other.offload != "none" else 1
        return found.device_bytes * share <= free_device and found.host_bytes * copies * share <= free_host

    if fits(setup, 1 - TOLERANCE):
        return None
    fitting = [flags for flags, other in candidates(setup) if fits(other, 1.0)]
    if fitting:
        remedy = "Any of these would fit: " + "; ".join(fitting[:3])
    else:
        least = estimate(shape, replace(setup, trainable_blocks=min(1, setup.trainable_blocks))).device_bytes
        remedy = f"Take a smaller model or more memory: with one trainable block it needs {gigabytes(least)}"
    found = estimate(shape, setup)
    is_device = found.device_bytes * (1 - TOLERANCE) > free_device
    what, free = ("on this rank's device", free_device) if is_device else ("in this node's memory", free_host)
    needs = summary(found) if is_device else f"about {gigabytes(found.host_bytes)} per rank in host memory"
    return f"the run needs {needs}; {gigabytes(free)} are free {what}: it would break off in the middle. {remedy}."
