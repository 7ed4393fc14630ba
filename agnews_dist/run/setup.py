"""A run's objects from its configuration: model and tokens, loader, features, trainer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from agnews_dist.config.schema import BatchConfig, Config, DataConfig
from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import quadratic_weight
from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.corpus import ReadRows, Source, load_corpus
from agnews_dist.data.rows import NUM_SHOWN, Corpus, Ints, hash_corpus, list_first
from agnews_dist.data.tokens import TRAINING_ENCODING, TextEncoding, TokenSplit, TokenStore, open_or_build
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import find_compiler_fault
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import DataError
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
from agnews_dist.events import Emit, Warned, begin_phase
from agnews_dist.features.manager import CacheSettings, FeatureCache
from agnews_dist.features.placement import RequestedPlace
from agnews_dist.model.export import check_room, limit_length, load_classifier
from agnews_dist.model.gpt2 import Classifier, explain_new_head, load_backbone
from agnews_dist.model.tokenizer_files import check_export
from agnews_dist.model.weight_files import WeightFiles, copy_weights
from agnews_dist.run.disk_setup import estimate_run_bytes, reserve_run_bytes
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.run.fingerprints import run_fingerprints
from agnews_dist.run.hub_inputs import split_settings
from agnews_dist.run.model_setup import ModelFiles, build_classifier, count_trained, read_model_files
from agnews_dist.storage.directories import cache_root
from agnews_dist.training.class_weights import check_class_weights, compute_class_weights
from agnews_dist.training.diagnostics import dry_run, overfit_one_batch
from agnews_dist.training.lbfgs import HeadSolver
from agnews_dist.training.loop import Monitors, Trainer
from agnews_dist.training.losses import StepSettings
from agnews_dist.training.timing import StageTimer
from agnews_dist.training.trainer_settings import TrainerSettings

Loader = TypeVar("Loader", bound=TrainLoader)


@dataclass(frozen=True)
class TrainingInputs:
    """Everything a training starts from, equal on every rank."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    store: TokenStore
    fingerprints: Mapping[str, str]
    parameters: Mapping[str, tuple[int, int]]
    """Part of the model -> (trainable, frozen) parameters."""
    data_facts: Mapping[str, str]
    """Label -> value about the data, for the header."""
    weight_files: WeightFiles

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in label order."""
        return self.store.class_names


@dataclass(frozen=True)
class EvaluationInputs:
    """A saved classifier and the split to score, equal on every rank."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    class_names: tuple[str, ...]
    tokens: TokenSplit
    fingerprint: str
    """sha256 of the tokens."""
    data_facts: Mapping[str, str]
    """Label -> value about the data, for the header."""


def pad_id_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the token id that fills a batch after a text's last token."""
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    return pad_id


def column_settings(data: DataConfig) -> ColumnSettings:
    """Return which columns hold texts and labels."""
    return ColumnSettings(data.text_column, data.label_column, data.text_separator)


def load_text(
    data: DataConfig, *, hold_out: bool = True, model_classes: tuple[str, ...] | None = None, read_given: ReadRows | None = None
) -> Corpus:
    """Load the rows of `data.source`.

    `hold_out`: for a training: make a validation split if there is none, and take data without names of splits for train, not
    for test. `model_classes`: the classes that labels are to mean; with them nothing is trained, and no row is left out.
    `read_given`: reads rows given in Python instead.
    """
    is_training = hold_out and model_classes is None
    source = Source(
        data.source,
        revision=data.revision,
        splits=split_settings(data, hold_out=hold_out),
        columns=column_settings(data),
        class_names=data.class_names,
        cache_dir=cache_root(data.cache_dir),
        exclude=Path(data.exclude) if data.exclude is not None and is_training else None,
        read_given=read_given,
    )
    return load_corpus(
        source,
        validation_fraction=data.validation_fraction,
        limits={"train": data.limit_train, "validation": data.limit_validation, "test": data.limit_test},
        seed=data.seed,
        hold_out=hold_out,
        model_classes=model_classes,
    )


def open_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    data: DataConfig,
    *,
    max_length: int,
    emit: Emit,
    world: World,
    encoding: TextEncoding = TRAINING_ENCODING,
) -> TokenStore:
    """Open the token cache of `corpus`. If there is none, one process per node builds it while the others wait at a lock."""
    return open_or_build(
        corpus,
        tokenizer,
        max_length=max_length,
        cache_dir=cache_root(data.cache_dir),
        emit=emit,
        builds_first=world.local_rank == 0,
        encoding=encoding,
    )


def load_training_inputs(
    config: Config,
    world: World,
    emit: Emit,
    timer: StageTimer,
    files: ModelFiles | None = None,
    *,
    has_checked_export: bool = False,
    read_given: ReadRows | None = None,
    exports: bool = True,
) -> TrainingInputs:
    """Load weights and tokens. The model comes first: it fails fast, and tokenising may take minutes.

    `has_checked_export`: an earlier start of this run has checked the tokenizer's export, which takes a second. `read_given`:
    see `load_text`. `exports`: the model will be written, so tokenizer and disk are checked for that.

    Raises:
        UserError: any fault of the model's or the data's files.
    """
    data, model, seed = config.data, config.model, config.run.seed
    emit(begin_phase(f"load {model.name}"))
    files = files or read_model_files(model, data)
    if world.is_main and exports and not has_checked_export:
        # Rank 0 alone exports. Before training, as a faulty export would lose it.
        check_export(files.tokenizer, data.max_length, name=model.name)
    backbone = load_backbone(
        model.name, revision=model.revision, init=model.init, seed=seed, tokenizer=files.tokenizer, config=files.config
    )
    for note in backbone.notes:
        emit(Warned(message=note))
    emit(begin_phase(f"load {data.source}"))
    corpus = load_text(data, read_given=read_given)
    for note in corpus.notes:
        emit(Warned(message=note))
    names = corpus.class_names
    check_class_weights(config.optim.class_weights, names)
    if reason := explain_new_head(backbone, names, model.pooling):
        emit(Warned(message=f"model {model.name!r}: {reason}. Its head is not used, and a new one is drawn."))
    classifier = build_classifier(config, backbone, names)
    weight_files = copy_weights(classifier, world.ranks_per_node)
    parameters = count_trained(config, classifier)
    with timer.stage("tokenize"):
        store = open_tokens(corpus, files.tokenizer, data, max_length=data.max_length, emit=emit, world=world)
    if world.is_main and exports:
        # After the tokens: the other ranks wait for them, and they may take space on the same disk.
        check_room(Path(config.run.dir), estimate_run_bytes(config, parameters, corpus.splits, len(names)))
    emit(begin_phase("hash the weights"))
    fingerprints = run_fingerprints(config, classifier, files.tokenizer, tokens=store.fingerprint)
    fingerprints["rows"] = corpus.fingerprint
    return TrainingInputs(classifier, files.tokenizer, store, fingerprints, parameters, corpus.facts, weight_files)


def load_evaluation_inputs(
    config: Config, *, split: str | None, max_length: int | None, emit: Emit, timer: StageTimer, world: World
) -> EvaluationInputs:
    """Load a classifier and one tokenised split.

    `split`: None means test, which a single file is. `max_length`: tokens per text; None: as in training. Another length
    is used, with a warning.

    Raises:
        UserError: no classifier, no such split, classes that do not fit, or any fault of the files.
    """
    data, model = config.data, config.model
    emit(begin_phase(f"load {model.name}"))
    trained = load_classifier(model.name, revision=model.revision)
    saved = trained if max_length is None else limit_length(trained, max_length)
    classifier, tokenizer, class_names, length, encoding, notes = saved
    copy_weights(classifier, world.ranks_per_node)
    for note in notes:
        emit(Warned(message=note))
    if length != trained.max_length:
        message = f"data.max_length {length}: the model was saved with {trained.max_length}, scores may differ"
        emit(Warned(message=message))
    emit(begin_phase(f"load {data.source}"))
    corpus = _load_split(data, split, class_names)
    with timer.stage("tokenize"):
        store = open_tokens(corpus, tokenizer, data, max_length=length, emit=emit, world=world, encoding=encoding)
    [tokens] = store.splits.values()
    return EvaluationInputs(classifier, tokenizer, corpus.class_names, tokens, store.fingerprint, corpus.facts)


def _load_split(data: DataConfig, split: str | None, class_names: tuple[str, ...]) -> Corpus:
    """Load a corpus of one split, by default test, with the model's classes."""
    corpus = load_text(data, hold_out=False, model_classes=class_names)
    if split in ("train", "validation") and "validation" not in corpus.splits:
        corpus = load_text(data, model_classes=class_names)
    _check_classes(data.source, corpus.class_names, class_names)
    name = split or "test"
    if name not in corpus.splits:
        raise DataError(
            f"{data.source} has no {name} split (only {', '.join(corpus.splits)}): there is nothing to score. Choose one of "
            "these with --split."
        )
    wanted = {name: corpus.splits[name]}
    return replace(corpus, splits=wanted, fingerprint=hash_corpus(wanted, corpus.class_names))


def _check_classes(source: str, of_data: tuple[str, ...], of_model: tuple[str, ...]) -> None:
    """Check that a label means the same class in the data and in the model."""
    has_names = of_model != tuple(f"LABEL_{i}" for i in range(len(of_model)))
    if len(of_data) != len(of_model) or (has_names and of_data != of_model):
        first = next((i for i, pair in enumerate(zip(of_data, of_model, strict=False)) if pair[0] != pair[1]), 0)
        # Of many classes, begin with the first that differs.
        begin = first if first >= NUM_SHOWN else 0
        data, model = (f"{'..., ' * (begin > 0)}{list_first(names[begin:], str)}" for names in (of_data, of_model))
        raise DataError(
            f"{source} has the classes {data}, the model {model}: labels would not match. Score "
            "the model on data with its own classes, in its own order."
        )


def place_inputs(config: Config, inputs: TrainingInputs, engine: Engine) -> dict[str, TokenTable]:
    """Move model and tokens to the device; return the splits' token tables."""
    place_classifier(
        inputs.classifier, engine, fast_path=config.engine.fast_path, checkpointing=config.engine.activation_checkpointing
    )
    if not engine.world.is_main:
        # Only rank 0 exports. Elsewhere this would be a second copy of the model in the node's memory.
        inputs.classifier.frozen_state.clear()
    pad_id = pad_id_of(inputs.tokenizer)
    return {name: TokenTable(tokens, pad_id=pad_id, device=engine.device) for name, tokens in inputs.store.splits.items()}


def plan_settings(batch: BatchConfig, seed: int) -> PlanSettings:
    """Return the settings that define the global batches."""
    return PlanSettings(
        global_batch_size=batch.global_batch_size,
        global_token_budget=batch.global_token_budget,
        bucket_window=batch.bucket_window,
        seed=seed,
    )


def build_loader(
    config: Config, classifier: Classifier, table: TokenTable, world: World, *, loader_type: type[Loader] = TrainLoader
) -> Loader:
    """Build this rank's loader of the training split."""
    num_classes = classifier.suffix.out_head.out_features
    return loader_type(
        table,
        world,
        plan_settings(config.batch, config.run.seed),
        max_tokens_per_rank=config.batch.max_tokens_per_rank,
        quadratic=quadratic_weight(classifier.config.n_embd),
        max_length=config.data.max_length,
        class_weights_C=compute_class_weights(config.optim.class_weights, table.labels_N, num_classes=num_classes),
    )


def estimate_epochs(config: Config, lengths_N: Ints) -> int:
    """Return the epochs of a run, begun ones included; with a token budget and `optim.max_steps`, about as many."""
    max_steps, budget = config.optim.max_steps, config.batch.global_token_budget
    if max_steps is None:
        return config.optim.epochs
    if budget is not None:
        return math.ceil(max_steps * budget / int(lengths_N.sum()))
    return math.ceil(max_steps / math.ceil(len(lengths_N) / config.batch.global_batch_size))


def open_features(
    config: Config,
    inputs: TrainingInputs,
    tables: Mapping[str, TokenTable],
    engine: Engine,
    *,
    requested: RequestedPlace,
    num_trainings: int = 1,
    shards: bool = True,
) -> FeatureCache:
    """Decide where the frozen part's output is kept, without computing it yet. Collective.

    `shards`: several ranks may hold a part each, on their devices.
    """
    num_tokens = sum(int(table.lengths_N.sum()) for table in tables.values())
    wanted = config.engine.compile if config.engine.compile == "always" or find_compiler_fault() is None else "never"
    inputs.classifier.prefix.choose_compiling(num_tokens=num_tokens, wanted=wanted)
    settings = CacheSettings(
        requested=requested,
        num_epochs=num_trainings * estimate_epochs(config, tables["train"].lengths_N),
        directory=cache_root(config.data.cache_dir) / "features",
        limit_bytes=int(config.engine.feature_cache_gigabytes * 1e9),
        reserved_bytes=reserve_run_bytes(config, inputs.parameters, inputs.store.splits, len(inputs.class_names)),
        frozen_weights=inputs.fingerprints["frozen_weights"],
        model_name=config.model.name,
        excluded=frozenset() if shards or engine.world.num_ranks == 1 else frozenset({"device"}),
    )
    return FeatureCache(inputs.classifier, tables, engine, settings)


def build_features(features: FeatureCache, loader: TrainLoader, monitors: Monitors) -> None:
    """Compute the features, or open those on disk, and shard the loader's batches as they are sharded. Collective."""
    monitors.timer.end_setup()
    with monitors.timer.stage("prefix"):
        features.build(monitors.emit)
    # Where device memory was too small after all, the features are elsewhere and no rank owns texts any more.
    loader.owner_N = features.owner_N


def build_evaluation(
    inputs: TrainingInputs, tables: Mapping[str, TokenTable], engine: Engine, features: FeatureCache, monitors: Monitors
) -> Callable[[str], SplitScores]:
    """Return a function that scores a split by its name. Collective; it raises `Stopped` when the run must stop."""

    def evaluate(split: str) -> SplitScores:
        # At every epoch, and cheap: two numbers of a file.
        inputs.weight_files.check(monitors.emit)
        with monitors.timer.stage("eval"):
            return evaluate_split(
                inputs.classifier,
                tables[split],
                engine,
                features=features.source(split),
                emit=monitors.emit,
                is_stopping=lambda: monitors.preemption.is_stopping,
            )

    return evaluate


def check_first_step(
    config: Config, classifier: Classifier, table: TokenTable, loader: TrainLoader, engine: Engine, emit: Emit
) -> None:
    """Run the checks that the configuration asks for before the first step: overfit one batch, dry-run the largest step."""
    if config.run.debug:
        emit(begin_phase("overfit one batch"))
        emit(overfit_one_batch(classifier, table, engine, lr=config.optim.lr))
    if config.batch.longest_first:
        dry_run(classifier, loader.largest_step(0), engine, emit, settings=StepSettings(r_drop=config.optim.r_drop))


def build_trainer(config: Config, inputs: TrainingInputs, engine: Engine, loader: TrainLoader, monitors: Monitors) -> Trainer:
    """Build the training loop, which hands the trainable part to the engine. Collective."""
    monitors.emit(begin_phase(f"start engine {config.engine.backend}"))
    optim = config.optim.model_dump(exclude={"class_weights"})  # the loader has them as numbers
    settings = TrainerSettings(
        **optim,
        freeze_schedule=config.model.freeze_schedule,
        standardize=config.model.standardize,
        seed=config.run.seed,
        class_names=inputs.class_names,
    )
    kind = HeadSolver if settings.solver == "lbfgs" else Trainer
    return kind(inputs.classifier, engine, loader, settings, monitors)
