"""Output of the predict command: JSON lines, or a table."""

import json
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from agnews_dist.evaluation.predictor import InputText
from agnews_dist.report.formatting import create_output, escape_text
from agnews_dist.storage.atomic import to_json_value

Predictions = Iterable[tuple[InputText, NDArray[np.float64]]]
"""Texts with their class probabilities."""


def print_lines(predictions: Predictions, class_names: Sequence[str]) -> None:
    """Print one JSON object per text. NaN and infinities, also in the id of an input line, become null."""
    for text, probabilities_C in predictions:
        # float32 logits hold no more digits than float32 probabilities.
        digits_C = map(str, probabilities_C.astype("f4"))
        answer = {
            "id": text.id,
            "text": text.text,
            "prediction": class_names[int(probabilities_C.argmax())],
            "probabilities": dict(zip(class_names, map(float, digits_C), strict=True)),
        }
        # ASCII: neither the locale nor a line separator in a text can break a line.
        print(json.dumps(to_json_value(answer), allow_nan=False))


def print_table(predictions: Predictions, class_names: Sequence[str]) -> None:
    """Print a table of the texts, their classes and the probabilities of these."""
    out = create_output(sys.stdout)
    table = Table("id", "text", "prediction", box=box.SIMPLE_HEAD)
    table.add_column("probability", justify="right")
    for text, probabilities_C in predictions:
        best = int(probabilities_C.argmax())
        cells = (str(text.id), text.text, class_names[best], f"{probabilities_C[best]:.1%}")
        # As Text: rich would interpret [brackets] in a string as markup.
        table.add_row(*(Text(escape_text(cell, out.encoding)) for cell in cells))
    out.print(table)
