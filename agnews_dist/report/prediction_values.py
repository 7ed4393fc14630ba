"""Values of answers and of input columns, as JSON and csv hold them."""

import json
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import DataError
from agnews_dist.evaluation.predictor import Answers
from agnews_dist.storage.atomic import to_json_value


def to_digits(values: NDArray[np.float32]) -> list[float]:
    """Return float32 numbers with the fewest digits that tell them apart: float32 logits hold no more."""
    return [float(str(value)) for value in values]


def to_probabilities(answers: Answers, class_names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Yield class name -> probability of each text, for the classes that are kept."""
    for i in range(len(answers)):
        classes_K = range(len(class_names)) if answers.classes_NK is None else answers.classes_NK[i]
        yield dict(zip((class_names[int(k)] for k in classes_K), to_digits(answers.probabilities_NK[i]), strict=True))


def to_json(value: object) -> Any:
    """Convert a value of a file to what strict JSON can hold: dates become ISO text, NaN and infinities null.

    Raises:
        DataError: a value has no JSON form: bytes, for example.
    """
    return to_json_value(value, _to_plain)


def _to_plain(value: object) -> str:
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, timedelta)):
        return str(value)
    raise DataError(
        f"a column holds {type(value).__name__}: it has no text form. Write --output as parquet, or drop the column."
    )


def to_text(value: object) -> str:
    """Convert a value of a file to a csv field: null and NaN are empty, lists and objects JSON.

    >>> to_text(None), to_text("a b"), to_text(True), to_text([1, None])
    ('', 'a b', 'true', '[1, null]')

    Raises:
        DataError: as `to_json`.
    """
    if isinstance(value, str):
        return value
    plain = to_json(value)
    if plain is None or isinstance(plain, str):
        return plain or ""
    return json.dumps(plain, allow_nan=False)
