"""About how long the configured training will take, from the matrix-product rate that was just measured. Pure arithmetic.

The frozen part: two floating-point operations per token and weight of a block (its projections; attention's own are a few
percent at AG News' lengths). What trains: three times that of its forward pass, once per epoch; of the last block the fast
path computes one query per text, and per token 2 D multiply-adds for each head (model/suffix.py). Each step adds the
interpreter's own time, the update of the weights and their gradients' way between ranks. Right within a factor of about two.
"""

from dataclasses import dataclass

from agnews_dist.engine.memory import Shape

MEAN_TOKENS = 52
"""Of an AG News text with GPT-2's tokenizer."""
AG_NEWS_ROWS = {"train": 120_000, "validation": 0, "test": 7_600}
STEP_SECONDS = 0.004
"""Of Python and small kernels per step; measured on a CPU with a tiny model."""
EFFICIENCY = 0.7
"""Of the rate of large products that the model's own reach."""
START_SECONDS = 10.0
"""Imports, loading, meeting."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the time depends on."""

    shape: Shape
    trainable_blocks: int
    num_ranks: int
    epochs: int
    train_texts: int
    scored_texts: int
    """Validation and test together."""
    max_length: int
    global_batch_size: int
    fast_path: bool
    keeps_features: bool


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured here."""

    flops: float
    """Floating-point operations per second of one rank: the slowest, for which the others wait."""
    bytes_per_second: float | None
    """Of an all-reduce; None: one rank."""


def expected_seconds(job: Job, speed: Speed) -> float:
    """The whole job's wall-clock time."""
    shape = job.shape
    tokens = min(MEAN_TOKENS, job.max_length)
    block = 2 * shape.block
    frozen_blocks = shape.num_blocks - job.trainable_blocks
    # With the fast path the last block that trains costs its tokens little.
    full, last = job.trainable_blocks, 0.0
    if job.fast_path and full:
        full, last = full - 1, 4.0 * shape.width * shape.num_heads * tokens + block
    trained = full * block * tokens + last + 2 * shape.width
    texts = job.train_texts + job.scored_texts
    frozen = frozen_blocks * block * tokens
    passes = 1 if job.keeps_features else job.epochs
    work = passes * texts * frozen + job.epochs * (3 * job.train_texts + job.scored_texts) * trained
    steps = job.epochs * -(-job.train_texts // job.global_batch_size)
    weights = shape.trained(job.trainable_blocks, 4)
    per_step = STEP_SECONDS + 20 * weights / (speed.flops * EFFICIENCY)
    if speed.bytes_per_second:
        per_step += 4 * weights / speed.bytes_per_second
    return START_SECONDS + work / (job.num_ranks * speed.flops * EFFICIENCY) + steps * per_step
