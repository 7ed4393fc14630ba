"""predictions-<split>.jsonl: one line per example, in file order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnews_dist.storage.atomic import write_text


def write_predictions(
    path: Path,
    ids_N: NDArray[np.integer[Any]],
    labels_N: NDArray[np.integer[Any]] | None,
    predictions_N: NDArray[np.integer[Any]],
    probabilities_NC: NDArray[np.floating[Any]],
) -> None:
    """Write `{"id", "label", "prediction", "probabilities"}` per row, whole or not at all; labels None become null.

    Probabilities are written as the shortest text of their float32 value (further digits would be rounding noise of the
    float32 logits), a non-finite one as null.

    Raises:
        ValueError: the arrays differ in length, or the ids do not ascend, as row numbers in file order do.
        UserError: the file cannot be written.
    """
    lengths = [len(ids_N), len(predictions_N), len(probabilities_NC)] + ([] if labels_N is None else [len(labels_N)])
    if len(set(lengths)) > 1 or probabilities_NC.ndim != 2:
        raise ValueError(
            f"arrays of lengths {lengths}, probabilities of shape {probabilities_NC.shape}: not one row each"
        )
    if bool(np.any(np.diff(ids_N) <= 0)):
        raise ValueError("the ids do not ascend: the rows are not in file order")
    write_text(path, _lines(ids_N, labels_N, predictions_N, probabilities_NC))


def _lines(
    ids_N: NDArray[np.integer[Any]],
    labels_N: NDArray[np.integer[Any]] | None,
    predictions_N: NDArray[np.integer[Any]],
    probabilities_NC: NDArray[np.floating[Any]],
) -> Iterator[str]:
    # numpy makes all the texts at once: several times faster than json.dumps on every row of a large split.
    texts_NC = probabilities_NC.astype(np.float32).astype(np.str_)
    texts_NC[~np.isfinite(probabilities_NC)] = "null"
    labels = ["null"] * len(ids_N) if labels_N is None else labels_N.tolist()
    for row, label, prediction, texts_C in zip(
        ids_N.tolist(), labels, predictions_N.tolist(), texts_NC.tolist(), strict=True
    ):
        shares = ", ".join(texts_C)
        yield f'{{"id": {row}, "label": {label}, "prediction": {prediction}, "probabilities": [{shares}]}}\n'
