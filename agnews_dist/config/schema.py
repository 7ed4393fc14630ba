"""Every setting, written once: type, default, limits, help, and its meaning for resuming, sweeps and the short `--help`.

Parsing, checks, `--help`, completion, docs/settings.md and resuming follow from these frozen pydantic models. Only `commands`
and `run` read a `Config`; other parts take plain arguments.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from agnews_dist.storage.directories import check_directory_name, expand_path

Resume = Literal["must match", "may be accepted", "ignored"]
"""A resumed run refuses another value; refuses it unless `--accept` names the setting; does not compare it."""
Sweep = Literal["free", "changes features", "not sweepable", "decides scored rows", "ignored"]
"""Members of a sweep may differ in it; each value needs a feature cache of its own; they may not differ; their scores could not
be compared; it has no effect on them."""
Level = Literal["basic", "advanced"]
"""Shown by `--help`; shown by `--help all` only."""


def setting(default: Any, resume: Resume, sweep: Sweep, level: Level = "advanced") -> Any:
    """Return the field of a setting. The docstring under it is its help, and the first sentence alone its short help."""
    return Field(default, json_schema_extra={"resume": resume, "sweep": sweep, "level": level})


Name = Annotated[str, Field(min_length=1)]
DirectoryName = Annotated[str, AfterValidator(check_directory_name)]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
ClassWeights = Annotated[tuple[Annotated[float, Field(ge=1e-6, le=1_000_000)], ...], Field(min_length=1)]
FreezeSchedule = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Minutes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]
"""A path, or a word that the setting takes instead of one: a hub id, `auto`."""


class Section(BaseModel):
    """Base of the sections: immutable, without conversions. Its validator is built when it is first used."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class SplitsConfig(Section):
    """Names of the splits in the source, where they are not the usual ones; none leaves a split out."""

    train: Name | None = setting(None, "ignored", "decides scored rows")
    """Name of the training split. A split of the hub, or a word in the names of files or folders. null: train, training."""
    validation: Name | None = setting(None, "ignored", "decides scored rows")
    """Name of the validation split. null: validation, valid, val, dev. 'none': rows of train are held out."""
    test: Name | None = setting(None, "ignored", "decides scored rows")
    """Name of the test split. null: test, testing. 'none': nothing is scored at the end."""


class DataConfig(Section):
    """Data set and tokens."""

    source: PathText = setting("fancyzhx/ag_news", "ignored", "decides scored rows", "basic")
    """Hub id, folder or file. Files are csv, tsv, jsonl, json, parquet or arrow, also compressed. 'synthetic': generated
    headlines, without a network."""
    revision: Name | None = setting(None, "ignored", "decides scored rows")
    """Commit or tag of the data set on the hub. null: the newest."""
    subset: Name | None = setting(None, "ignored", "decides scored rows")
    """Subset of the data set (configuration on the hub). In a directory, one that its README.md names, or a folder."""
    splits: SplitsConfig = Field(default_factory=SplitsConfig)
    text_column: Names | None = setting(None, "ignored", "decides scored rows")
    """Column of the text. Several are joined: title,description. null: text, sentence, content, utterance or
    title,description, if only one of these is there."""
    text_separator: str = setting(" ", "ignored", "decides scored rows")
    """Text between the joined columns. An empty or missing column is left out."""
    label_column: Name | None = setting(None, "ignored", "decides scored rows")
    """Column of the label. null: label, labels, class, category, intent or target, if only one of these is there."""
    class_names: Names | None = setting(None, "ignored", "decides scored rows")
    """Names of the classes, in index order. A list, or a file with one name per line. null: from the data, sorted by name."""
    max_length: Count = setting(256, "must match", "changes features", "basic")
    """Tokens per text, at most. Longer texts are truncated and counted. AG News: mean 52, longest about 323."""
    pad_token: Literal["new", "eos"] = setting("new", "must match", "changes features")
    """Token for padding. 'new' keeps one that no text can contain, or adds [PAD] as a frozen row of the embedding; 'eos' reuses
    <|endoftext|>. The logits do not depend on it."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = setting(0.05, "must match", "decides scored rows")
    """Share of training rows to hold out. They are stratified by label, and held out only if the source has no validation
    split."""
    limit_train: Count | None = setting(None, "must match", "changes features", "basic")
    """Use only this many training rows. They are a seeded and stratified sample; null: all."""
    limit_validation: Count | None = setting(None, "must match", "decides scored rows")
    """Use only this many validation rows. null: all."""
    limit_test: Count | None = setting(None, "must match", "decides scored rows")
    """Use only this many test rows. null: all."""
    exclude: PathText | None = setting(None, "ignored", "changes features")
    """File that names training rows to leave out. An edited label_errors.csv, or lines like 'train.csv row 17'. Held-out
    rows, limits and the rows of other splits are the same without it."""
    seed: Annotated[int, Field(ge=0)] = setting(0, "must match", "decides scored rows")
    """Seed of the rows in use. It decides the synthetic text, the held-out rows and the limits. It is not run.seed: runs with
    different seeds use the same examples."""
    cache_dir: PathText | None = setting(None, "ignored", "not sweepable")
    """Directory of tokens and features kept on disk. null: $XDG_CACHE_HOME/agnews_dist."""


class ModelConfig(Section):
    """GPT-2 checkpoint and its trainable part."""

    name: PathText = setting("gpt2", "ignored", "changes features", "basic")
    """Hub id or directory of a GPT-2. The directory is a GPT2Model, GPT2LMHeadModel or GPT2ForSequenceClassification checkpoint
    or a run. 'embedded': a small tokenizer and model, generated without files."""
    revision: Name | None = setting(None, "ignored", "changes features")
    """Commit or tag of the model on the hub. null: the newest."""
    init: Literal["pretrained", "random"] = setting("pretrained", "must match", "changes features")
    """Start of the weights. 'random' takes only the shape and draws the weights with run.seed, for tests and baselines."""
    trainable_blocks: Annotated[int, Field(ge=0)] | Literal["all"] = setting(1, "must match", "changes features", "basic")
    """Train the last k blocks. The final norm and out_head are trained too; 0: only these. The embeddings stay frozen, unless
    train_embeddings is true."""
    freeze_schedule: FreezeSchedule | None = setting(None, "must match", "free")
    """Numbers of trained blocks, one per epoch. The last one repeats: 2,1 trains two blocks in epoch 1, and then the upper one
    only. The lower ones keep their weights from there on, and their output is kept as the features are. The first number is
    trainable_blocks. null: trainable_blocks throughout."""
    train_embeddings: bool = setting(False, "must match", "changes features")
    """Train the embeddings of tokens and positions too. This is full fine-tuning, so nothing is computed once and kept; needs
    trainable_blocks all."""
    pooling: Literal["last", "mean"] = setting("last", "must match", "changes features")
    """Row of a text that out_head classifies: last or mean. 'last': the last real token's. 'mean': the mean of the final norm's
    output over all real tokens; the last block then runs for all of them."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = setting(None, "may be accepted", "free")
    """Dropout rate of the trainable part. It holds for attention weights, attention output and MLP output, and for embeddings
    that are trained; the exported config keeps the model's own rates. null: those. Without effect with trainable_blocks 0."""

    standardize: bool = setting(False, "must match", "free")
    """Standardise the inputs of out_head. To mean 0 and variance 1 over the training rows, before the first step; needs
    trainable_blocks 0. The export folds this into out_head and the final norm."""


class BatchConfig(Section):
    """Grouping of examples into batches."""

    global_batch_size: Count = setting(32, "must match", "free", "basic")
    """Examples per step, over all ranks. The number of ranks does not change which examples."""
    global_token_budget: Count | None = setting(None, "must match", "free")
    """Real tokens per step, at most. Replaces global_batch_size: a step has any number of examples."""
    max_tokens_per_rank: Count = setting(16384, "ignored", "not sweepable", "basic")
    """Padded tokens of a micro-batch. A larger share of a rank is split (gradient accumulation)."""
    bucket_window: Count | Literal["epoch"] = setting(256, "must match", "free")
    """Global batches sorted by length together. 1 gives random batches, more means less padding, 'epoch' sorts all examples."""
    longest_first: bool = setting(False, "ignored", "ignored")
    """Run the largest step first, as a trial. It is the largest step of the first epoch; its result is discarded. The run fails
    early if memory is too small."""


class OptimConfig(Section):
    """AdamW and its schedule, or L-BFGS for out_head alone."""

    solver: Literal["adamw", "lbfgs"] = setting("adamw", "must match", "free")
    """Optimizer: adamw or lbfgs. 'lbfgs' solves out_head alone to convergence on all training rows, and evaluates once; needs
    trainable_blocks 0. It minimises the mean loss plus weight_decay / 2 times the sum of out_head's squared weights, without
    its bias. lr, epochs, warm-up, schedule, clipping, batches and seed have no effect then."""
    lr: NonNegative = setting(1e-3, "may be accepted", "free", "basic")
    """Peak learning rate. Best of 3e-4, 1e-3 and 3e-3 on a 6-block GPT-2 (tests/bench/RESULTS.md); larger ones not measured."""
    epochs: Count = setting(3, "may be accepted", "free", "basic")
    """Passes over the training rows. Without effect if max_steps is set."""
    max_steps: Count | None = setting(None, "may be accepted", "free")
    """Steps of the run, in place of epochs. The last epoch may be cut, and there may be more epochs than optim.epochs. Warm-up
    and decay follow these steps. null: epochs decide."""
    weight_decay: NonNegative = setting(0.01, "may be accepted", "free")
    """Decoupled weight decay. Per step and unit of learning rate, for matrices only (not for biases and norms)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = setting(1.0, "may be accepted", "free")
    """Factor on the learning rate per layer, from the top. Final norm and out_head have lr, the last block lr x layer_decay,
    the next one lr x layer_decay^2. 1: the same rate everywhere."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = setting(0.0, "may be accepted", "free", "basic")
    """Warm-up, as a share of the steps. The learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine"] = setting("linear", "may be accepted", "free")
    """Decay from the peak to 0 after the warm-up."""
    max_grad_norm: NonNegative = setting(1.0, "may be accepted", "free")
    """Clip the global gradient norm to this value. 0: no clipping."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, "may be accepted", "free")
    """Share of each label that is spread over all classes. As in torch's cross_entropy, also together with class_weights. The
    losses of evaluations are plain cross-entropies, without smoothing and weights."""
    class_weights: Literal["none", "balanced"] | ClassWeights = setting("none", "may be accepted", "free")
    """Weights of the classes in the loss: none, balanced, or a list. 'balanced': rows / (classes x rows of the class), over the
    training rows; 1 for a class without rows. A list has one weight per class, in their order. The loss of a step is divided by
    the weights of its labels, over all ranks."""
    r_drop: NonNegative = setting(0.0, "may be accepted", "free")
    """Weight of R-Drop: two passes with different dropout should agree. The loss is the mean of both cross-entropies + r_drop x
    the mean of KL(1 || 2) and KL(2 || 1). It doubles time and activations of the trainable part. 0: one pass."""
    average: Literal["none", "ema", "swa"] = setting("none", "may be accepted", "free")
    """Average of the weights of late steps: none, ema or swa. Once it has begun, evaluations and the exported model use it, and
    training continues with the weights themselves. 'swa': the equal mean of the weights after each step. 'ema': an exponential
    moving average."""
    average_start: Annotated[float, Field(ge=0, lt=1)] = setting(0.5, "may be accepted", "free")
    """Share of the steps after which averaging begins. Later than half, the decayed learning rate leaves little to average."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = setting(0.99, "may be accepted", "free")
    """Share of the average that 'ema' keeps at a step. After n averaged steps it is at most (1 + n) / (10 + n), so that a short
    run forgets its first weights."""
    best_metric: Literal["accuracy", "macro_f1", "loss"] = setting("accuracy", "may be accepted", "not sweepable")
    """Validation score that chooses the exported weights. The lowest loss, or the highest of the others. Ties go to the lower
    loss, then to the earlier evaluation."""
    evaluate_every: Count | Literal["epoch"] = setting("epoch", "may be accepted", "free")
    """Steps between evaluations, or epoch: after every epoch. Steps count over the whole run. The end of the training is always
    evaluated."""
    patience: Count | None = setting(None, "may be accepted", "free")
    """Stop after this many evaluations in a row that are not better. Better is what best_metric says. The counter survives
    restarts, and the schedule is still that of all steps. null: never stop early."""
    nonfinite: Literal["stop", "skip"] = setting("stop", "ignored", "not sweepable")
    """Action at a NaN or infinite loss or gradient. All ranks end the run, or skip that update. The examples are written to
    events.jsonl in both cases."""


class EngineConfig(Section):
    """Devices, parallelism and precision."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "ignored", "not sweepable", "basic")
    """Device of the model. 'auto' is CUDA if there is a GPU."""
    backend: Literal["ddp", "fsdp", "deepspeed"] = setting("ddp", "ignored", "not sweepable", "basic")
    """Engine: ddp, fsdp or deepspeed. 'ddp': every rank holds the whole trainable part. 'fsdp': the ranks shard its weights,
    gradients and optimizer state. 'deepspeed': the ranks shard what zero_stage says. The results are the same."""
    zero_stage: Literal[1, 2, 3] = setting(2, "ignored", "not sweepable")
    """Stage of DeepSpeed's ZeRO. The ranks shard the optimizer state (1), also gradients (2), also weights (3)."""
    offload: Literal["none", "optimizer", "all"] = setting("none", "ignored", "not sweepable")
    """Part of DeepSpeed's state in host memory. 'optimizer': the optimizer state; 'all': the trainable weights too, with stage
    3 only."""
    deepspeed_config: PathText | None = setting(None, "ignored", "not sweepable")
    """JSON file with DeepSpeed's own settings. Bucket sizes and overlap, for example. One that contradicts a setting here is an
    error."""
    gradient_compression: Literal["none", "bf16"] = setting("none", "may be accepted", "ignored")
    """Rounding of exchanged gradients. 'bf16' halves their size; sums within a rank stay fp32."""
    activation_checkpointing: bool = setting(False, "ignored", "not sweepable")
    """Recompute activations in the backward pass. This takes less memory, and a third more time for the trainable blocks."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = setting("auto", "may be accepted", "not sweepable", "basic")
    """Precision: auto, bf16, fp32 or fp16. 'auto' is bf16 on GPUs that have it, else fp32. bf16: autocast with fp32 master
    weights for the trainable part, bf16 weights for the frozen part. fp16: the same with loss scaling, for GPUs without
    bf16."""
    allow_tf32: bool = setting(True, "may be accepted", "not sweepable")
    """Use TF32 for fp32 matrix products on CUDA."""
    fast_path: bool = setting(True, "may be accepted", "not sweepable")
    """Compute the frozen part the fast way. Without padding and autograd, and the last block for the last token only. false:
    Hugging Face's own forward in both parts, the reference, several times slower."""
    feature_cache: Literal["auto", "device", "host", "disk", "off"] = setting("auto", "ignored", "not sweepable")
    """Place of the frozen part's output between epochs. 'device': sharded over the ranks' memory. 'host': shared by the ranks
    of a node. 'disk': in data.cache_dir, also for later runs. 'off': computed at every use. 'auto': an earlier run's on disk,
    else the first place where it fits."""
    feature_cache_gigabytes: Annotated[float, Field(ge=0, le=1e9)] = setting(100.0, "ignored", "not sweepable")
    """Limit of all feature caches on disk. The least recently used are evicted first; 0: nothing on disk."""
    compile: Literal["auto", "always", "never"] = setting("auto", "ignored", "not sweepable")
    """torch.compile for the frozen part. 'auto': only where it saves more time than compiling takes."""
    timeout_seconds: Count = setting(600, "ignored", "not sweepable")
    """Seconds that a rank waits in a collective. Then the job fails."""


class CheckpointConfig(Section):
    """Checkpoints and resuming."""

    max_overhead: Annotated[float, Field(gt=0, le=1)] | None = setting(0.01, "ignored", "ignored")
    """Share of the time that checkpoints may cost. The measured cost decides how often one is made, at most once a second;
    every_steps or every_minutes replace this. The end of every epoch and of the training is always saved."""
    every_steps: Count | None = setting(None, "ignored", "ignored")
    """Save after this many steps. null: see max_overhead."""
    every_minutes: Minutes | None = setting(None, "ignored", "ignored")
    """Save this many minutes after the last checkpoint. null: see max_overhead."""
    keep: Count = setting(2, "ignored", "ignored")
    """Number of checkpoints to keep. The newest ones, besides the best weights."""
    resume: PathText = setting("auto", "ignored", "ignored", "basic")
    """Resume: auto, never, or a path. 'auto' resumes the unfinished run of this name, or without a name that of this job.
    'never' starts from the beginning. A path of a checkpoint or a run starts from there."""


class RunConfig(Section):
    """Output, seed and limits of a run."""

    dir: PathText = setting("runs", "ignored", "not sweepable", "basic")
    """Directory of all runs."""
    name: DirectoryName | None = setting(None, "ignored", "not sweepable", "basic")
    """Name of the run, a directory in run.dir. null: the model's name and the time."""
    # Times the number of ranks, a larger one could exceed what torch's generators take.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = setting(0, "must match", "free", "basic")
    """Seed of weights, batches and dropout."""
    overwrite: bool = setting(False, "ignored", "not sweepable", "basic")
    """Replace an existing run of this name. An unfinished run with the same settings is resumed instead."""
    max_minutes: Minutes | None = setting(None, "ignored", "not sweepable", "basic")
    """Save and stop within this many minutes. null: only before the time limit of a Slurm job."""
    debug: bool = setting(False, "ignored", "not sweepable")
    """Debug the run. Use deterministic algorithms and anomaly detection, print every step, and first overfit one batch as a
    check."""


class ReportConfig(Section):
    """Report and experiment trackers of a run."""

    write: bool = setting(True, "ignored", "not sweepable")
    """Write report.html and report.md. They are written at the end of the run and at a stop. They need agnews_dist[report]."""
    max_seconds: NonNegative = setting(60.0, "ignored", "ignored")
    """Time for baselines and label errors, at most. They take fewer rows, or are left out, where it is too short."""
    trackers: Trackers | None = setting(None, "ignored", "ignored")
    """Experiment trackers that get steps, scores and settings. Each needs its package: pip install agnews_dist[NAME]."""


class Config(Section):
    """All settings, by section."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @model_validator(mode="after")
    def _check_contradictions(self) -> "Config":
        """Refuse settings that contradict each other. All are checked here, so that all are reported together."""
        lines = [*_find_contradictions(self.data, self.batch, self.engine), *_find_recipe_contradictions(self)]
        if lines:
            raise ValueError("\n".join(lines))
        return self


def _find_contradictions(data: DataConfig, batch: BatchConfig, engine: EngineConfig) -> Iterator[str]:
    backend, stage = f"engine.backend {engine.backend}", f"engine.zero_stage {engine.zero_stage}"
    for key, part in (("max_tokens_per_rank", "micro-batch"), ("global_token_budget", "global batch")):
        num_tokens = getattr(batch, key)
        if num_tokens is not None and num_tokens < data.max_length:
            rule = f"a text may not fit into a {part}. Raise the first or lower the second."
            yield f"batch.{key} {num_tokens} is below data.max_length {data.max_length}: {rule}"
    if batch.longest_first and engine.backend != "ddp":
        yield f"batch.longest_first true with {backend}: the trial step does not shard. Leave it out; memory is checked anyway."
    if not engine.fast_path and engine.feature_cache not in ("auto", "off"):
        fix = "Set engine.feature_cache auto, or engine.fast_path true."
        yield f"engine.feature_cache {engine.feature_cache} with engine.fast_path false: the reference path has no cache. {fix}"
    for key in ("zero_stage", "offload", "deepspeed_config"):
        value = getattr(engine, key)
        if engine.backend != "deepspeed" and value != EngineConfig.model_fields[key].default:
            yield f"engine.{key} {value} with {backend}: it is DeepSpeed's. Set engine.backend deepspeed, or leave it out."
    if engine.offload == "all" and engine.zero_stage != 3:
        yield f"engine.offload all with {stage}: only stage 3 offloads weights. Set engine.zero_stage 3, or offload optimizer."
    if engine.precision == "fp16" and engine.backend == "fsdp":
        fix = "Set engine.backend deepspeed with zero_stage 3, or engine.precision fp32."
        yield f"engine.precision fp16 with {backend}: ranks would not agree on overflows. {fix}"


def _find_recipe_contradictions(config: Config) -> Iterator[str]:
    """Yield what contradicts the part of the model that is trained, and the way of training it."""
    model, optim, blocks = config.model, config.optim, f"model.trainable_blocks {config.model.trainable_blocks}"
    if model.standardize and model.trainable_blocks != 0:
        fix = "Set model.trainable_blocks 0, or leave it out."
        yield f"model.standardize true with {blocks}: the inputs of out_head change in training. {fix}"
    if model.train_embeddings and model.trainable_blocks != "all":
        yield f"model.train_embeddings true with {blocks}: it trains the whole model. Set model.trainable_blocks all."
    if model.freeze_schedule is not None:
        numbers, schedule = model.freeze_schedule, f"model.freeze_schedule {','.join(map(str, model.freeze_schedule))}"
        if model.train_embeddings:
            yield f"{schedule} with model.train_embeddings true: all is trained throughout. Leave one of them out."
        elif numbers[0] != model.trainable_blocks:
            yield f"{schedule} with {blocks}: it begins with that number. Set model.trainable_blocks {numbers[0]}."
        if any(later > earlier for earlier, later in pairwise(numbers)):
            yield f"{schedule}: a frozen block stays frozen. List numbers that never rise, such as 3,2,1."
        elif all(number == numbers[0] for number in (numbers if optim.max_steps else numbers[: optim.epochs])):
            yield f"{schedule} with optim.epochs {optim.epochs}: it freezes nothing. List a smaller number, or leave it out."
        if config.engine.backend != "ddp":
            yield f"{schedule} with engine.backend {config.engine.backend}: shards are not frozen. Set engine.backend ddp."
    if optim.solver != "lbfgs":
        return
    if model.trainable_blocks != 0:
        yield f"optim.solver lbfgs with {blocks}: it solves out_head alone. Set model.trainable_blocks 0, or use adamw."
    for key in ("max_steps", "evaluate_every", "patience"):
        value = getattr(optim, key)
        if value != OptimConfig.model_fields[key].default:
            yield f"optim.{key} {value} with optim.solver lbfgs: it runs to convergence and is evaluated once. Leave it out."
    for key in ("average", "layer_decay", "r_drop"):
        value = getattr(optim, key)
        if value != OptimConfig.model_fields[key].default:
            yield f"optim.{key} {value} with optim.solver lbfgs: it is for steps of AdamW. Leave it out."
    if config.engine.backend != "ddp":
        backend = f"engine.backend {config.engine.backend}"
        yield f"{backend} with optim.solver lbfgs: out_head alone is not sharded. Set engine.backend ddp."
    if config.batch.longest_first:
        yield "batch.longest_first true with optim.solver lbfgs: it has no steps to try. Leave it out."
