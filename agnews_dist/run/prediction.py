"""Model and texts of the predict command, from the configuration and the command's options."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from agnews_dist.config.schema import Config
from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.input_texts import STREAM, InputTexts, open_texts
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.data.tokens import encode
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ConfigError
from agnews_dist.evaluation.predictor import Predictor
from agnews_dist.model.export import SavedClassifier, limit_length, load_classifier
from agnews_dist.run.engine_setup import place_classifier

MAX_SHOWN_CLASSES = 256
"""Classes of which JSON lines show all probabilities without --top_k."""
NUM_SHOWN_CLASSES = 5
"""Most probable classes that they show if there are more."""


def load_model(config: Config, max_length: int | None) -> SavedClassifier:
    """Load the model; `max_length`: None: as in training.

    Raises:
        ModelError: it is not a classifier, or `max_length` is too large for it.
    """
    saved = load_classifier(config.model.name, revision=config.model.revision)
    return saved if max_length is None else limit_length(saved, max_length)


def build_predictor(saved: SavedClassifier, engine: Engine, num_best: int | None, *, fast_path: bool) -> Predictor:
    """Move the model to this rank's device."""
    place_classifier(saved.classifier, engine, fast_path=fast_path)
    encoder = partial(encode, saved.tokenizer, max_length=saved.max_length, encoding=saved.encoding)
    return Predictor(saved.classifier, encoder, cast(int, saved.tokenizer.pad_token_id), engine, num_best)


def open_input(config: Config, options: Mapping[str, Any]) -> InputTexts:
    """Open the texts that the options name; see `open_texts`."""
    data, splits = config.data, config.data.splits
    if not options["text"] and options["file"] in (None, STREAM) and sys.stdin.isatty():
        print("Reading texts from the terminal, one per line; end with Ctrl-D.", file=sys.stderr, flush=True)
    return open_texts(
        options["text"],
        options["file"],
        sys.stdin.buffer,
        input_format=options["input_format"],
        columns=ColumnSettings(data.text_column, data.label_column, data.text_separator),
        splits=SplitSettings(data.subset, {"train": splits.train, "validation": splits.validation, "test": splits.test}),
        keeps_columns=options["output"] is not None,
    )


def choose_num_best(options: Mapping[str, Any], num_classes: int, *, is_table: bool) -> int | None:
    """Return the number of classes whose probabilities are shown; None: all, in their order.

    Raises:
        ConfigError: `--top_k` is more than the model has.
    """
    top_k = options["top_k"]
    if isinstance(top_k, int) and top_k > num_classes:
        raise ConfigError(f"--top_k {top_k}: the model has {num_classes} classes. Set it to at most {num_classes}, or to all.")
    if top_k is not None:
        return None if top_k == "all" else int(top_k)
    if options["output"] is not None or is_table:
        return 1
    return None if num_classes <= MAX_SHOWN_CLASSES else NUM_SHOWN_CLASSES
