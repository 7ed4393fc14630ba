"""Everything a user can set: frozen dataclasses, one section per stage of the journey.

The docstring under a field is its help text. Nothing changes a config after `cli.load` built it; library functions take
plain arguments, the stories unpack the sections.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "fancyzhx/ag_news"
    """Hub id, directory or file (parquet, csv, jsonl with 'text' and 'label'; or the original csv: class, title,
    description), or 'synthetic': an embedded generator that needs no network."""
    revision: str | None = None
    """Commit or tag of the data set on the hub; null: the newest."""
    max_length: int = 256
    """Tokens per text, the rest is cut off and counted. AG News: mean 52, longest about 323."""
    pad_token: Literal["new", "eos"] = "new"
    """'new' adds [PAD] as one frozen embedding row; 'eos' reuses <|endoftext|>. Logits do not depend on it."""
    validation_fraction: float = 0.05
    """Share of the training rows held out (stratified by label) when the source has no validation split."""
    limit_train: int | None = None
    """Use only this many training rows (a seeded, stratified choice); null: all."""
    limit_validation: int | None = None
    """Use only this many validation rows; null: all."""
    limit_test: int | None = None
    """Use only this many test rows; null: all."""
    seed: int = 0
    """Seed of the synthetic text, the held-out part and the limits. Apart from run.seed, so that runs with different seeds
    are compared on the same examples."""
    cache_dir: str | None = None
    """Directory of the tokenised data, shared by the ranks of a node; null: $XDG_CACHE_HOME/agnews_dist."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which GPT-2, and how much of it trains."""

    name: str = "gpt2"
    """Hub id, directory (a GPT2Model, GPT2LMHeadModel or GPT2ForSequenceClassification checkpoint, or a run's directory),
    or 'embedded': a small tokenizer and model made on the spot."""
    revision: str | None = None
    """Commit or tag of the model on the hub; null: the newest."""
    init: Literal["pretrained", "random"] = "pretrained"
    """'random' takes only the shape and draws the weights from run.seed (for tests and baselines)."""
    trainable_blocks: int | Literal["all"] = 1
    """Train the last k blocks with the final norm and out_head; 0: norm and head only. Embeddings stay frozen."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How examples are grouped."""

    global_batch_size: int = 32
    """Examples per optimiser step over all ranks; the same examples for every number of ranks."""
    global_token_budget: int | None = None
    """Replaces global_batch_size: at most so many real tokens per optimiser step, whatever the number of examples."""
    max_tokens_per_rank: int = 16384
    """Padded tokens a rank computes at once; a larger share is split into micro-batches (gradient accumulation)."""
    bucket_window: int | Literal["epoch"] = 256
    """Global batches within which examples are sorted by length: 1 is random batches, larger means less padding, 'epoch'
    sorts all."""
    longest_first: bool = False
    """Before training, run the largest step of the first epoch forward and backward and forget it: what does not fit into
    memory shows at once."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate. Best of 3e-4, 1e-3, 3e-3 on a 6-block GPT-2 (tests/bench/RESULTS.md); not measured on larger ones."""
    epochs: int = 3
    """Passes over the training rows."""
    weight_decay: float = 0.01
    """Decoupled decay per step and unit of learning rate, on matrices only (not on biases and norms)."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay from the peak to 0 after the warm-up."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this value; 0: do not clip."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What all ranks do when a loss or gradient is NaN or infinite: end the run, or leave that update out and go on. The
    examples are written to events.jsonl in both cases."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the ranks run on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes CUDA where there is one."""
    backend: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """'ddp': every rank holds all that trains. 'fsdp': torch divides weights, gradients and the optimizer's state over the
    ranks. 'deepspeed': ZeRO divides what zero_stage says. The results are the same."""
    zero_stage: Literal[1, 2, 3] = 2
    """With deepspeed, what is divided: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """With deepspeed, kept in host memory: 'optimizer' its state and the update, 'all' (stage 3) the weights that train too."""
    deepspeed_config: str | None = None
    """JSON file with DeepSpeed's own settings (bucket sizes, overlap ...), merged with what the settings here decide; a
    contradiction is an error."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """'bf16' halves what the ranks send each other for the gradients, and rounds it; sums stay fp32 within a rank."""
    activation_checkpointing: bool = False
    """Compute the trainable blocks' activations a second time in the backward pass instead of keeping them: less memory, a
    third more time for those blocks."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """'auto' is bf16 on GPUs that have it, else fp32. bf16: autocast with fp32 master weights for what trains, bf16 storage
    for what is frozen. fp16: the same in half precision with loss scaling, for GPUs without bf16."""
    allow_tf32: bool = True
    """TF32 matrix products on CUDA for what is fp32 there."""
    fast_path: bool = True
    """The frozen part without padding and without autograd, the last block for the last token only. false: Hugging Face's own
    forward in both parts, the reference, several times slower."""
    feature_cache: Literal["auto", "device", "host", "disk", "off"] = "auto"
    """Where the frozen part's output is kept between epochs: 'device' divides it over the ranks' memory, 'host' shares it among
    the ranks of a node, 'disk' keeps it in data.cache_dir for later runs too, 'off' computes it at every use. 'auto' takes what
    a former run left on disk, else the first place where it fits, and says why."""
    feature_cache_gigabytes: float = 100.0
    """What all feature caches on disk may take together; those longest unused go first."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile for the frozen part's dense work; 'auto': where there is so much of it that compiling pays."""
    timeout_seconds: int = 600
    """How long a rank waits in a collective before the job fails."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run that is stopped or killed goes on from."""

    every_steps: int | None = None
    """Save after every so many steps; null: by the clock alone. The end of every epoch is saved in any case."""
    every_minutes: float | None = 5.0
    """Save after so many minutes since the last time; null: by the steps alone."""
    keep: int = 2
    """So many checkpoints, the newest, and the best epoch's weights stay on disk."""
    resume: str = "auto"
    """'auto' goes on where the run of this name, or if it has none the run of this job, was stopped; 'never' starts anew; the
    path of a checkpoint or of a run starts from there."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: where it writes, and how loud it is."""

    dir: str = "runs"
    """Directory of all runs."""
    name: str | None = None
    """Directory of this run inside run.dir; null: made from the model's name and the time."""
    seed: int = 0
    """Seed of weights, batch order and dropout."""
    overwrite: bool = False
    """Replace an existing run of this name, unless it is this one, stopped before its end."""
    max_minutes: float | None = None
    """Save and stop before so many minutes have passed; null: no limit but the job's own, which Slurm tells."""
    debug: bool = False
    """Deterministic algorithms, anomaly detection, every step printed, and first a check that one batch can be overfitted."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


def validate(config: Config) -> list[str]:
    """What each field's type cannot say: values out of range and fields that exclude each other, one message each."""
    data, model, batch, optim, engine = config.data, config.model, config.batch, config.optim, config.engine
    found: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    for key, value, least in (
        ("data.max_length", data.max_length, 1),
        ("data.limit_train", data.limit_train, 1),
        ("data.limit_validation", data.limit_validation, 1),
        ("data.limit_test", data.limit_test, 1),
        ("batch.global_batch_size", batch.global_batch_size, 1),
        ("batch.bucket_window", batch.bucket_window if batch.bucket_window != "epoch" else None, 1),
        ("optim.epochs", optim.epochs, 1),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("engine.timeout_seconds", engine.timeout_seconds, 1),
        ("run.seed", config.run.seed, 0),
        ("data.seed", data.seed, 0),
    ):
        require(
            value is None or value >= least,
            f"{key} {value}: a count below {least} has no meaning. Set it to {least} or more.",
        )
    require(
        config.run.seed < 2**32,
        f"run.seed {config.run.seed} is above 4294967295: times the number of ranks it could exceed what torch's generators "
        "take. Set a smaller one.",
    )
    require(
        0 < data.validation_fraction < 1,
        f"data.validation_fraction {data.validation_fraction}: model selection needs a part of the rows and training the "
        "rest. Set it between 0 and 1, 0.05 for example.",
    )
    require(
        model.trainable_blocks == "all" or model.trainable_blocks >= 0,
        f"model.trainable_blocks {model.trainable_blocks}: fewer than no blocks cannot train. Set 0 (final norm and head "
        "only), a count, or all.",
    )
    require(
        batch.max_tokens_per_rank >= data.max_length,
        f"batch.max_tokens_per_rank {batch.max_tokens_per_rank} is below data.max_length {data.max_length}: a text of full "
        "length would fit into no micro-batch. Raise the first or lower the second.",
    )
    require(
        batch.global_token_budget is None or batch.global_token_budget >= data.max_length,
        f"batch.global_token_budget {batch.global_token_budget} is below data.max_length {data.max_length}: a text of full "
        "length would fit into no global batch. Raise the first or lower the second.",
    )
    require(
        engine.fast_path or engine.feature_cache in ("auto", "off"),
        f"engine.feature_cache {engine.feature_cache} with engine.fast_path false: the plain path is the reference and "
        "computes everything at every step. Leave feature_cache at auto, or the fast path on.",
    )
    defaults = EngineConfig()
    for key in ("zero_stage", "offload", "deepspeed_config"):
        value = getattr(engine, key)
        require(
            engine.backend == "deepspeed" or value == getattr(defaults, key),
            f"engine.{key} {value} with engine.backend {engine.backend}: only DeepSpeed knows it, so it would do nothing. Set "
            "engine.backend deepspeed, or leave it out.",
        )
    require(
        engine.offload != "all" or engine.zero_stage == 3,
        f"engine.offload all with engine.zero_stage {engine.zero_stage}: only stage 3 can take the weights out of the device. "
        "Set engine.zero_stage 3, or engine.offload optimizer.",
    )
    require(
        engine.precision != "fp16" or engine.backend != "fsdp",
        "engine.precision fp16 with engine.backend fsdp: every rank would see overflows in its own part only, and scale its "
        "losses alone. Set engine.backend deepspeed with zero_stage 3, or engine.precision fp32.",
    )
    require(
        engine.backend == "ddp" or not batch.longest_first,
        f"batch.longest_first with engine.backend {engine.backend}: the rehearsal would hold undivided what the ranks divide. "
        "Leave it out; the memory estimate is checked before anything is loaded.",
    )
    require(
        0 <= engine.feature_cache_gigabytes < float("inf"),
        f"engine.feature_cache_gigabytes {engine.feature_cache_gigabytes}: it is a size. Set 0 (nothing on disk) or more.",
    )
    for key, rate in (
        ("optim.lr", optim.lr),
        ("optim.weight_decay", optim.weight_decay),
        ("optim.max_grad_norm", optim.max_grad_norm),
    ):
        require(
            0 <= rate < float("inf"),
            f"{key} {rate}: the update would point uphill or be undefined. Set a finite number of at least 0.",
        )
    require(
        0 <= optim.warmup_ratio <= 1,
        f"optim.warmup_ratio {optim.warmup_ratio}: it is a share of the steps. Set it between 0 and 1.",
    )
    for key, minutes in (
        ("checkpoint.every_minutes", config.checkpoint.every_minutes),
        ("run.max_minutes", config.run.max_minutes),
    ):
        require(
            minutes is None or 0 < minutes < float("inf"),
            f"{key} {minutes}: it is a time. Set a number of minutes above 0, or null.",
        )
    require(
        config.checkpoint.resume != "",
        "checkpoint.resume is empty: it could mean both to go on and to start anew. Set auto, never, or a path.",
    )
    require(
        data.source != "" and model.name != "",
        "data.source or model.name is empty: there is nothing to load. Give a hub id, a path, or synthetic / embedded.",
    )
    return found
