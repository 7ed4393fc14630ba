"""A saved classifier in Python: `load("runs/NAME").predict(texts)`. The answers are those of the command `predict`."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from agnews_dist.api.named_settings import NamedSettings
from agnews_dist.config.schema import Config
from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.given_rows import open_texts
from agnews_dist.data.hub_requests import keep_hub_settings
from agnews_dist.data.input_texts import InputTexts
from agnews_dist.distributed.world import LAUNCHER_VARIABLES, World
from agnews_dist.engine.process_state import keep_process_state
from agnews_dist.errors import ConfigError, SharedError, count_noun
from agnews_dist.evaluation.predictor import Predictor, check_finite
from agnews_dist.events import Emit, Event, Warned
from agnews_dist.model.export import SavedClassifier
from agnews_dist.run import engine_setup, hub_inputs, prediction


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one text."""

    label: str
    """Name of the most probable class; of equal ones the first."""
    index: int
    """Number of that class, from 0 in the order of `LoadedModel.class_names`."""
    probability: float
    """Probability of that class, between 0 and 1."""
    probabilities: NDArray[np.float32]
    """Probability of every class, in the order of `LoadedModel.class_names`."""


class LoadedModel:
    """A classifier on this process's device."""

    def __init__(self, saved: SavedClassifier, predictor: Predictor) -> None:
        self._predictor = predictor
        self.class_names: tuple[str, ...] = saved.class_names
        """Names of the classes, in label order."""
        self.max_length: int = saved.max_length
        """Tokens per text, at most. Longer texts are truncated, with a warning."""

    def predict(self, texts: object, batch_size: int | None = None) -> list[Prediction]:
        """Classify texts.

        Args:
            texts: a list, an array or a column of strings.
            batch_size: texts that are tokenised and sorted by length together, at most 10,000; None: as the command. It
                bounds memory; the last bits of probabilities may depend on it.

        Returns:
            One answer per text, in their order.

        Raises:
            DataError: a text is missing, blank or not a string; names the text by its position from 0.
            ConfigError: batch_size is not a whole number of 1 or more.
        """
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ConfigError(f"batch_size={batch_size!r}: it takes a whole number (1 or more) or None. Correct it.")
        table, predictor = open_texts(texts), self._predictor
        if not len(table):
            return []
        source = InputTexts([table], ColumnSettings(), keeps_columns=False)
        source.check()
        found: list[Prediction] = []
        num_truncated = 0
        with keep_process_state():
            predictor.engine.apply_tf32()
            for chunk in source.chunks(batch_size or predictor.texts_per_chunk):
                split = predictor.tokenise(chunk)
                num_truncated += split.num_truncated
                answers = predictor.compute_alone(split)
                check_finite(chunk, answers)
                numbers = (answers.predictions_N.tolist(), answers.best_N.tolist(), answers.probabilities_NK)
                found += [Prediction(self.class_names[i], i, best, each) for i, best, each in zip(*numbers, strict=True)]
        if num_truncated:
            cut = f"{num_truncated} of {count_noun(len(found), 'text')} were truncated to {self.max_length} tokens"
            warnings.warn(f"{cut}. Split them, or train with a larger max_length.", stacklevel=2)
        return found


def load(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    max_length: int | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> LoadedModel:
    """Load a saved classifier.

    Args:
        model: directory of a run or of an exported model, or hub id of a GPT2ForSequenceClassification.
        revision: commit or tag on the hub; None: the newest.
        max_length: tokens per text; None: as in training.
        device: auto, cpu or cuda.
        precision: auto, bf16, fp32 or fp16.

    Raises:
        ConfigError: a wrong argument.
        ModelError: the model is not a classifier, or cannot be read.
    """
    settings = NamedSettings()
    settings.add("model.name", model, "model")
    given: Mapping[str, tuple[str, object]] = {
        "revision": ("model.revision", revision),
        "max_length": ("data.max_length", max_length),
        "device": ("engine.device", device),
        "precision": ("engine.precision", precision),
    }
    for name, (key, value) in given.items():
        if value is not None:
            settings.add(key, value, name)
    config = settings.build()
    notes: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Warned):
            notes.append(event.message)

    try:
        saved, predictor = _load_alone(config, max_length, emit)
    except SharedError as error:
        raise error.original from None
    for note in (*notes, *saved.notes):
        warnings.warn(note, stacklevel=2)
    return LoadedModel(saved, predictor)


def _load_alone(config: Config, max_length: int | None, emit: Emit) -> tuple[SavedClassifier, Predictor]:
    """Load the classifier as the only rank, also where a launcher has started this process as one of several."""
    world = World()
    with keep_process_state(), keep_hub_settings():
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        engine = engine_setup.start_engine(config.engine, world, is_training=False)
        hub_inputs.fetch_inputs(partial(hub_inputs.list_requests, config, has_data=False), world, emit)
        saved = prediction.load_model(config, max_length)
        return saved, prediction.build_predictor(saved, engine, None, fast_path=config.engine.fast_path)
