"""What a run starts from: classifier, tokenizer and tokenised data, loaded before the ranks meet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from agnews_dist.config.schema import BatchConfig, Config, DataConfig, EngineConfig, ModelConfig
from agnews_dist.data.batching.epoch_plan import PlanSettings
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.corpus import Corpus, load_corpus
from agnews_dist.data.rows import fingerprint
from agnews_dist.data.tokens import TokenSplit, TokenStore, open_or_build
from agnews_dist.distributed.world import World
from agnews_dist.engine.deepspeed import require_deepspeed
from agnews_dist.engine.deepspeed_config import ZeroOptions, deepspeed_dictionary, read_settings
from agnews_dist.engine.device import choose_precision, chooses_cuda
from agnews_dist.engine.engine import Engine, refuse_foreign_settings
from agnews_dist.errors import DataError
from agnews_dist.events import Emit, Progress, Warned
from agnews_dist.features.manager import FeatureCache
from agnews_dist.features.placement import Wanted
from agnews_dist.model.export import load_classifier
from agnews_dist.model.gpt2 import Classifier, check_max_length, load_backbone, split
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.storage.locations import cache_root
from agnews_dist.training.timing import StageTimer


@dataclass(frozen=True)
class TrainingInputs:
    """Equal on every rank."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    store: TokenStore

    @property
    def pad_id(self) -> int:
        """What fills a batch behind a text's last token."""
        return _pad_id(self.tokenizer)


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    return pad_id


def plan_settings(batch: BatchConfig, seed: int) -> PlanSettings:
    """What decides the global batches."""
    return PlanSettings(
        global_batch_size=batch.global_batch_size,
        global_token_budget=batch.global_token_budget,
        bucket_window=batch.bucket_window,
        seed=seed,
    )


def zero_of(engine: EngineConfig) -> ZeroOptions | None:
    """How DeepSpeed is to divide what trains, with the user's own settings read; None: another engine.

    Raises:
        ConfigError: the user's DeepSpeed JSON cannot be read.
    """
    if engine.backend != "deepspeed":
        return None
    own = read_settings(engine.deepspeed_config) if engine.deepspeed_config is not None else {}
    return ZeroOptions(stage=engine.zero_stage, offload=engine.offload, settings=own)


def check_engine(config: Config, world: World) -> None:
    """All that can be said of the engine before anything is loaded.

    Raises:
        UserError: no such device or precision, DeepSpeed not installed, or settings of its own that contradict ours.
    """
    engine = config.engine
    choose_precision(engine.precision, use_cuda=chooses_cuda(world, engine.device))
    zero = zero_of(engine)
    refuse_foreign_settings(zero)
    if zero is not None:
        require_deepspeed()
        deepspeed_dictionary(
            zero,
            num_ranks=world.num_ranks,
            num_parameters=1,
            max_grad_norm=config.optim.max_grad_norm,
            compress_gradients=engine.gradient_compression == "bf16",
            pin_memory=False,
        )


def start_engine(engine: EngineConfig, world: World, *, trains: bool = True) -> Engine:
    """Device, precision and process group. What only scores (`trains` false) has nothing for DeepSpeed to divide.

    Raises:
        UserError: see `Engine`.
    """
    return Engine(
        world,
        device=engine.device,
        precision=engine.precision,
        allow_tf32=engine.allow_tf32,
        timeout_seconds=engine.timeout_seconds,
        zero=zero_of(engine) if trains else None,
        fsdp=trains and engine.backend == "fsdp",
        compress_gradients=engine.gradient_compression == "bf16",
    )


def place(classifier: Classifier, engine: Engine, *, fast_path: bool, checkpointing: bool = False) -> None:
    """Put both halves where they compute: the frozen one in its own type, what trains in fp32."""
    classifier.use_fast_path(fast_path)
    classifier.prefix.to(engine.device, engine.frozen_dtype)
    classifier.suffix.autocast_dtype = engine.autocast_dtype
    classifier.suffix.checkpointing = checkpointing
    if not engine.divides_weights:
        classifier.suffix.to(engine.device)


def open_features(
    config: Config,
    sources: TrainingInputs,
    tables: Mapping[str, TokenTable],
    engine: Engine,
    *,
    frozen_weights: str,
    wanted: Wanted,
) -> FeatureCache:
    """Where the frozen part's output is kept; decided, not yet computed. Collective. `frozen_weights`: their fingerprint."""
    num_tokens = sum(int(table.lengths_N.sum()) for table in tables.values())
    sources.classifier.prefix.choose_compiling(num_tokens=num_tokens, wanted=config.engine.compile)
    return FeatureCache(
        sources.classifier,
        tables,
        engine,
        wanted=wanted,
        num_epochs=config.optim.epochs,
        directory=cache_root(config.data.cache_dir) / "features",
        limit_bytes=int(config.engine.feature_cache_gigabytes * 1e9),
        frozen_weights=frozen_weights,
        model_name=config.model.name,
    )


def load_text(data: DataConfig, *, hold_out: bool = True) -> Corpus:
    """The rows that `data` names.

    Raises:
        DataError: they cannot be had, or are not what they should be.
    """
    return load_corpus(
        data.source,
        revision=data.revision,
        validation_fraction=data.validation_fraction,
        limits={"train": data.limit_train, "validation": data.limit_validation, "test": data.limit_test},
        seed=data.seed,
        hold_out=hold_out,
    )


def open_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    data: DataConfig,
    *,
    max_length: int,
    emit: Emit,
    world: World,
) -> TokenStore:
    """The tokens of `corpus`, from the cache or made now by one process per node while the others wait at a file lock."""
    return open_or_build(
        corpus,
        tokenizer,
        max_length=max_length,
        cache_dir=cache_root(data.cache_dir),
        emit=emit,
        builds_first=world.local_rank == 0,
    )


def load_sources(
    data: DataConfig,
    model: ModelConfig,
    *,
    seed: int,
    emit: Emit,
    timer: StageTimer,
    world: World,
) -> TrainingInputs:
    """Model first: it is quick to fail, and tokenising may take minutes.

    Raises:
        UserError: any fault of the model's or the data's files.
    """
    emit(Progress(task=f"load {model.name}", done=0, total=0))
    tokenizer = load_tokenizer(model.name, revision=model.revision, pad_token=data.pad_token)
    backbone = load_backbone(model.name, revision=model.revision, init=model.init, seed=seed, tokenizer=tokenizer)
    check_max_length(data.max_length, backbone.model.config.n_positions)
    emit(Progress(task=f"load {data.source}", done=0, total=0))
    corpus = load_text(data)
    classifier = split(
        backbone, trainable_blocks=model.trainable_blocks, num_classes=len(corpus.class_names), seed=seed
    )
    with timer.stage("tokenize"):
        store = open_tokens(corpus, tokenizer, data, max_length=data.max_length, emit=emit, world=world)
    return TrainingInputs(classifier, tokenizer, store)


@dataclass(frozen=True)
class EvaluationInputs:
    """A saved classifier and the split it is to score; equal on every rank."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    class_names: tuple[str, ...]
    tokens: TokenSplit
    fingerprint: str
    """Of the tokens."""

    @property
    def pad_id(self) -> int:
        """What fills a batch behind a text's last token."""
        return _pad_id(self.tokenizer)


def load_scored(
    data: DataConfig,
    model: ModelConfig,
    *,
    split: str | None,
    max_length: int | None,
    emit: Emit,
    timer: StageTimer,
    world: World,
) -> EvaluationInputs:
    """A classifier and one tokenised split. `split` None: test, or the whole of a single file.

    `max_length` None takes the length the model was trained with; another one is obeyed, with a warning.

    Raises:
        UserError: no classifier, no such split, classes that do not fit, or any fault of the files.
    """
    classifier, tokenizer, class_names, trained_length = load_classifier(model.name, revision=model.revision)
    if max_length is not None and max_length != trained_length:
        check_max_length(max_length, classifier.config.n_positions)
        emit(
            Warned(
                message=f"data.max_length {max_length}: the model was saved with {trained_length}, scores may differ"
            )
        )
    corpus = load_text(data, hold_out=False)
    if split in ("train", "validation") and "validation" not in corpus.splits:
        corpus = load_text(data)
    name = split or _only_split(data.source, corpus)
    if name not in corpus.splits:
        raise DataError(
            f"{data.source} has no {name} split (only {', '.join(corpus.splits)}): there is nothing to score. Choose one of "
            "these with --split; a single file is scored whole without it."
        )
    has_names = class_names != tuple(f"LABEL_{i}" for i in range(len(class_names)))
    if len(corpus.class_names) != len(class_names) or (has_names and corpus.class_names != class_names):
        raise DataError(
            f"{data.source} has the classes {', '.join(corpus.class_names)}, the model {', '.join(class_names)}: a label would "
            "not mean the same class. Score the model on data with its own classes, in its own order."
        )
    wanted = {name: corpus.splits[name]}
    corpus = Corpus(wanted, corpus.class_names, fingerprint(wanted, corpus.class_names))
    with timer.stage("tokenize"):
        length = max_length or trained_length
        store = open_tokens(corpus, tokenizer, data, max_length=length, emit=emit, world=world)
    return EvaluationInputs(classifier, tokenizer, class_names, store.splits[name], store.fingerprint)


def _only_split(source: str, corpus: Corpus) -> str:
    """What to score when nothing was said: a single file whole, else the test split."""
    return next(iter(corpus.splits)) if Path(source).expanduser().is_file() else "test"
