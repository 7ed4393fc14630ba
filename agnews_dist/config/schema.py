"""Every setting: frozen dataclasses, one per section, and the rules that their values must obey.

The docstring under a field is its help text. Only `commands` and `run` read a `Config`; other parts take plain arguments.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data set and tokens."""

    source: str = "fancyzhx/ag_news"
    """Hub id, directory or file (parquet, csv or jsonl with 'text' and 'label', or the original csv: class, title,
    description). 'synthetic': generated headlines, without a network."""
    revision: str | None = None
    """Commit or tag of the data set on the hub; null: the newest."""
    max_length: int = 256
    """Tokens per text; longer texts are truncated and counted. AG News: mean 52, longest about 323."""
    pad_token: Literal["new", "eos"] = "new"
    """'new' adds [PAD] as a frozen row of the embedding, 'eos' reuses <|endoftext|>. The logits do not depend on it."""
    validation_fraction: float = 0.05
    """Share of the training rows, stratified by label, to hold out if the source has no validation split."""
    limit_train: int | None = None
    """Use only this many training rows, a seeded and stratified sample; null: all."""
    limit_validation: int | None = None
    """Use only this many validation rows; null: all."""
    limit_test: int | None = None
    """Use only this many test rows; null: all."""
    seed: int = 0
    """Seed of the synthetic text, the held-out rows and the limits. It is not run.seed: runs with different seeds use the same
    examples."""
    cache_dir: str | None = None
    """Directory of the tokens and features kept on disk; null: $XDG_CACHE_HOME/agnews_dist."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """GPT-2 checkpoint and its trainable part."""

    name: str = "gpt2"
    """Hub id, or directory of a GPT2Model, GPT2LMHeadModel or GPT2ForSequenceClassification checkpoint or of a run.
    'embedded': a small tokenizer and model, generated without files."""
    revision: str | None = None
    """Commit or tag of the model on the hub; null: the newest."""
    init: Literal["pretrained", "random"] = "pretrained"
    """'random' takes only the shape and draws the weights with run.seed, for tests and baselines."""
    trainable_blocks: int | Literal["all"] = 1
    """Train the last k blocks, the final norm and out_head; 0: norm and head only. The embeddings stay frozen."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Grouping of examples into batches."""

    global_batch_size: int = 32
    """Examples per optimiser step, over all ranks. The number of ranks does not change which examples."""
    global_token_budget: int | None = None
    """Replaces global_batch_size: at most this many real tokens per optimiser step, with any number of examples."""
    max_tokens_per_rank: int = 16384
    """Padded tokens per micro-batch of a rank; a larger share is split (gradient accumulation)."""
    bucket_window: int | Literal["epoch"] = 256
    """Number of global batches over which examples are sorted by length: 1 gives random batches, more means less padding,
    'epoch' sorts all examples."""
    longest_first: bool = False
    """Before training, run the largest step of the first epoch once and discard it, to fail early if memory is too small."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate. Best of 3e-4, 1e-3 and 3e-3 on a 6-block GPT-2 (tests/bench/RESULTS.md); larger ones not measured."""
    epochs: int = 3
    """Passes over the training rows."""
    weight_decay: float = 0.01
    """Decoupled decay per step and unit of learning rate, for matrices only (not for biases and norms)."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay from the peak to 0 after the warm-up."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this value; 0: no clipping."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Action of all ranks at a NaN or infinite loss or gradient: end the run, or skip that update. The examples are written to
    events.jsonl in both cases."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Devices, parallelism and precision."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' is CUDA if there is a GPU."""
    backend: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """'ddp': every rank holds the whole trainable part. 'fsdp': the ranks shard its weights, gradients and optimizer state.
    'deepspeed': the ranks shard what zero_stage says. The results are the same."""
    zero_stage: Literal[1, 2, 3] = 2
    """With deepspeed, the ranks shard the optimizer state (1), also gradients (2), also weights (3)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """With deepspeed, host memory holds the optimizer state ('optimizer'), also the trainable weights ('all', stage 3 only)."""
    deepspeed_config: str | None = None
    """JSON file with DeepSpeed's own settings (bucket sizes, overlap ...). One that contradicts a setting here is an error."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """'bf16' rounds the gradients that ranks exchange and halves their size; sums within a rank stay fp32."""
    activation_checkpointing: bool = False
    """Recompute the trainable blocks' activations in the backward pass: less memory, a third more time for those blocks."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """'auto' is bf16 on GPUs that have it, else fp32. bf16: autocast with fp32 master weights for the trainable part, bf16
    weights for the frozen part. fp16: the same with loss scaling, for GPUs without bf16."""
    allow_tf32: bool = True
    """Use TF32 for fp32 matrix products on CUDA."""
    fast_path: bool = True
    """Run the frozen part without padding and autograd, and the last block for the last token only. false: Hugging Face's own
    forward in both parts, the reference, several times slower."""
    feature_cache: Literal["auto", "device", "host", "disk", "off"] = "auto"
    """Place of the frozen part's output between epochs. 'device': sharded over the ranks' memory. 'host': shared by the ranks
    of a node. 'disk': in data.cache_dir, also for later runs. 'off': computed at every use. 'auto': an earlier run's on disk,
    else the first place where it fits."""
    feature_cache_gigabytes: float = 100.0
    """Limit of all feature caches on disk together; the least recently used are evicted first."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile for the frozen part's matrix products; 'auto': only where it saves more time than compiling takes."""
    timeout_seconds: int = 600
    """Time that a rank waits in a collective before the job fails."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints and resuming."""

    every_steps: int | None = None
    """Save after this many steps; null: by time alone. The end of every epoch is always saved."""
    every_minutes: float | None = 5.0
    """Save this many minutes after the last checkpoint; null: by steps alone."""
    keep: int = 2
    """Number of the newest checkpoints to keep, besides the best epoch's weights."""
    resume: str = "auto"
    """'auto' resumes the unfinished run of this name, or without a name that of this job. 'never' starts from the beginning. A
    path of a checkpoint or a run starts from there."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Output, seed and limits of a run."""

    dir: str = "runs"
    """Directory of all runs."""
    name: str | None = None
    """Directory of this run in run.dir; null: the model's name and the time."""
    seed: int = 0
    """Seed of weights, batch order and dropout."""
    overwrite: bool = False
    """Replace an existing run of this name, unless it is this run, to be resumed."""
    max_minutes: float | None = None
    """Save and stop before this many minutes have passed; null: only before the time limit of a Slurm job."""
    debug: bool = False
    """Use deterministic algorithms and anomaly detection, print every step, and first overfit one batch as a check."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings, by section."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


def validate(config: Config) -> list[str]:
    """Return one message per rule that the values break; their types were checked when they were read."""
    return [
        *_check_counts(config),
        *_check_data_and_model(config),
        *_check_batch(config),
        *_check_engine(config.engine),
        *_check_optim(config.optim),
        *_check_checkpoint_and_run(config),
    ]


def _check_counts(config: Config) -> Iterator[str]:
    for key in (
        *("data.max_length", "data.limit_train", "data.limit_validation", "data.limit_test", "data.seed"),
        *("batch.global_batch_size", "batch.bucket_window", "optim.epochs", "checkpoint.every_steps", "checkpoint.keep"),
        *("engine.timeout_seconds", "run.seed"),
    ):
        section, name = key.split(".")
        value, least = getattr(getattr(config, section), name), 0 if name == "seed" else 1
        if isinstance(value, int) and value < least:
            yield f"{key} {value}: too small. Set it to {least} or more."


def _check_data_and_model(config: Config) -> Iterator[str]:
    data, model = config.data, config.model
    if not 0 < data.validation_fraction < 1:
        yield f"data.validation_fraction {data.validation_fraction}: both parts need rows. Set it between 0 and 1."
    if model.trainable_blocks != "all" and model.trainable_blocks < 0:
        yield (
            f"model.trainable_blocks {model.trainable_blocks}: too small. Set 0 (final norm and head only), a count, or all."
        )
    if data.source == "" or model.name == "":
        key, embedded = ("data.source", "synthetic") if data.source == "" else ("model.name", "embedded")
        yield f"{key} is empty: there is nothing to load. Set a hub id, a path, or {embedded}."


def _check_batch(config: Config) -> Iterator[str]:
    data, batch, backend = config.data, config.batch, config.engine.backend
    for key, part in (("max_tokens_per_rank", "micro-batch"), ("global_token_budget", "global batch")):
        num_tokens = getattr(batch, key)
        if num_tokens is not None and num_tokens < data.max_length:
            yield (
                f"batch.{key} {num_tokens} is below data.max_length {data.max_length}: a text may not fit into a {part}. "
                "Raise the first or lower the second."
            )
    if batch.longest_first and backend != "ddp":
        yield (
            f"batch.longest_first with engine.backend {backend}: the trial step does not shard. "
            "Leave it out; the memory estimate is checked before anything is loaded."
        )


def _check_engine(engine: EngineConfig) -> Iterator[str]:
    if not engine.fast_path and engine.feature_cache not in ("auto", "off"):
        yield (
            f"engine.feature_cache {engine.feature_cache} with engine.fast_path false: the reference path has no cache. "
            "Set engine.feature_cache auto, or engine.fast_path true."
        )
    for key in ("zero_stage", "offload", "deepspeed_config"):
        value = getattr(engine, key)
        if engine.backend != "deepspeed" and value != getattr(EngineConfig, key):
            yield (
                f"engine.{key} {value} with engine.backend {engine.backend}: it is a setting of DeepSpeed. "
                "Set engine.backend deepspeed, or leave it out."
            )
    if engine.offload == "all" and engine.zero_stage != 3:
        yield (
            f"engine.offload all with engine.zero_stage {engine.zero_stage}: only stage 3 offloads weights. "
            "Set engine.zero_stage 3, or engine.offload optimizer."
        )
    if engine.precision == "fp16" and engine.backend == "fsdp":
        yield (
            "engine.precision fp16 with engine.backend fsdp: ranks would not agree on overflows. "
            "Set engine.backend deepspeed with zero_stage 3, or engine.precision fp32."
        )
    if not 0 <= engine.feature_cache_gigabytes < float("inf"):
        yield (
            f"engine.feature_cache_gigabytes {engine.feature_cache_gigabytes}: must be finite and not negative. "
            "Set 0 (nothing on disk) or more."
        )


def _check_optim(optim: OptimConfig) -> Iterator[str]:
    for key in ("lr", "weight_decay", "max_grad_norm"):
        value = getattr(optim, key)
        if not 0 <= value < float("inf"):
            yield f"optim.{key} {value}: must be finite and not negative. Set it to 0 or more."
    if not 0 <= optim.warmup_ratio <= 1:
        yield f"optim.warmup_ratio {optim.warmup_ratio}: it is a share of the steps. Set it between 0 and 1."


def _check_checkpoint_and_run(config: Config) -> Iterator[str]:
    for key, minutes in (
        ("checkpoint.every_minutes", config.checkpoint.every_minutes),
        ("run.max_minutes", config.run.max_minutes),
    ):
        if minutes is not None and not 0 < minutes < float("inf"):
            yield f"{key} {minutes}: must be finite and above 0. Set a number of minutes, or null."
    if config.checkpoint.resume == "":
        yield "checkpoint.resume is empty: it must say whether to resume. Set auto, never, or a path."
    if config.run.seed >= 2**32:
        # Times the number of ranks, a larger one could exceed what torch's generators take.
        yield f"run.seed {config.run.seed}: too large. Set it to 4294967295 or less."
