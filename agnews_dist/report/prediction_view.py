"""Answers of the predict command on standard output: JSON lines, or tables."""

import json
import os
import sys
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from agnews_dist.data.input_texts import InputChunk
from agnews_dist.evaluation.predictor import Answers
from agnews_dist.report.formatting import create_output, escape_text
from agnews_dist.report.prediction_values import to_json, to_probabilities

Write = Callable[[InputChunk, Answers], bool]
"""Consumer of the answers for a chunk; returns False to stop."""


def create_printer(class_names: Sequence[str], *, is_table: bool) -> Write:
    """Return a function that prints the answers for a chunk; it returns False once nothing reads them."""
    show = print_table if is_table else print_lines

    def write(chunk: InputChunk, answers: Answers) -> bool:
        try:
            show(chunk, answers, class_names)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has closed the pipe (`| head`). Buffered output must not raise again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return False
        return True

    return write


def print_lines(chunk: InputChunk, answers: Answers, class_names: Sequence[str]) -> None:
    """Print one JSON object per text."""
    probabilities = to_probabilities(answers, class_names)
    for i, (key, text) in enumerate(zip(chunk.ids, chunk.texts, strict=True)):
        prediction = class_names[int(answers.predictions_N[i])]
        answer = {"id": to_json(key), "text": text, "prediction": prediction, "probabilities": next(probabilities)}
        # ASCII: neither the locale nor a line separator in a text can break a line.
        print(json.dumps(answer, allow_nan=False))


def print_table(chunk: InputChunk, answers: Answers, class_names: Sequence[str]) -> None:
    """Print a table of the texts, their most probable classes and the probabilities of these."""
    out = create_output(sys.stdout)
    table = Table("id", "text", "prediction", box=box.SIMPLE_HEAD)
    table.add_column("probability", justify="right")
    for key, text, shown in zip(chunk.ids, chunk.texts, to_probabilities(answers, class_names), strict=True):
        cells = (str(key), text, "\n".join(shown), "\n".join(f"{value:.1%}" for value in shown.values()))
        # As Text: rich would interpret [brackets] in a string as markup.
        table.add_row(*(Text(escape_text(cell, out.encoding)) for cell in cells))
    out.print(table)
