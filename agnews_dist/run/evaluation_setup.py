"""The objects of `evaluate` from its configuration: a saved classifier, and the split that it scores."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from agnews_dist.config.schema import DataConfig, ModelConfig
from agnews_dist.data.corpus import Corpus
from agnews_dist.data.rows import hash_corpus
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.errors import DataError
from agnews_dist.events import Emit, Warned
from agnews_dist.model.export import load_classifier
from agnews_dist.model.gpt2 import Classifier, check_max_length
from agnews_dist.run.setup import load_text, open_tokens, pad_id_of
from agnews_dist.training.timing import StageTimer


@dataclass(frozen=True)
class EvaluationInputs:
    """A saved classifier and the split to score, equal on every rank."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    class_names: tuple[str, ...]
    tokens: TokenSplit
    fingerprint: str
    """sha256 of the tokens."""

    @property
    def pad_id(self) -> int:
        """The token id that fills a batch after a text's last token."""
        return pad_id_of(self.tokenizer)


def load_evaluation_inputs(
    data: DataConfig,
    model: ModelConfig,
    *,
    split: str | None,
    max_length: int | None,
    emit: Emit,
    timer: StageTimer,
    world: World,
) -> EvaluationInputs:
    """Load a classifier and one tokenised split.

    `split`: None means test, or the whole of a single file. `max_length`: tokens per text; None: as in training. Another length
    is used, with a warning.

    Raises:
        UserError: no classifier, no such split, classes that do not fit, or any fault of the files.
    """
    classifier, tokenizer, class_names, trained_length = load_classifier(model.name, revision=model.revision)
    if max_length is not None and max_length != trained_length:
        check_max_length(max_length, classifier.config.n_positions)
        message = f"data.max_length {max_length}: the model was saved with {trained_length}, scores may differ"
        emit(Warned(message=message))
    corpus = _load_split(data, split)
    _check_classes(data.source, corpus.class_names, class_names)
    with timer.stage("tokenize"):
        length = max_length or trained_length
        store = open_tokens(corpus, tokenizer, data, max_length=length, emit=emit, world=world)
    [tokens] = store.splits.values()
    return EvaluationInputs(classifier, tokenizer, class_names, tokens, store.fingerprint)


def _load_split(data: DataConfig, split: str | None) -> Corpus:
    """Load a corpus of one split; by default a single file whole, else the test split."""
    corpus = load_text(data, hold_out=False)
    if split in ("train", "validation") and "validation" not in corpus.splits:
        corpus = load_text(data)
    name = split or (next(iter(corpus.splits)) if Path(data.source).expanduser().is_file() else "test")
    if name not in corpus.splits:
        raise DataError(
            f"{data.source} has no {name} split (only {', '.join(corpus.splits)}): there is nothing to score. Choose one of "
            "these with --split; a single file is scored whole without it."
        )
    wanted = {name: corpus.splits[name]}
    return Corpus(wanted, corpus.class_names, hash_corpus(wanted, corpus.class_names))


def _check_classes(source: str, of_data: tuple[str, ...], of_model: tuple[str, ...]) -> None:
    """Check that a label means the same class in the data and in the model."""
    has_names = of_model != tuple(f"LABEL_{i}" for i in range(len(of_model)))
    if len(of_data) != len(of_model) or (has_names and of_data != of_model):
        raise DataError(
            f"{source} has the classes {', '.join(of_data)}, the model {', '.join(of_model)}: labels would not match. Score "
            "the model on data with its own classes, in its own order."
        )
