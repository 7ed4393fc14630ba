"""result.json: the figures of a whole run in one object, for people and scripts."""

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import agnews_dist
from agnews_dist.evaluation.metrics import Scores
from agnews_dist.storage.atomic import plain, write_text

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")
OPTIONAL_PACKAGES = ("deepspeed",)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where a run's wall time went, on rank 0."""

    total: float
    setup: float
    """Imports to the first useful work."""
    tokenize: float
    prefix: float
    """In the frozen part of the model."""
    train: float
    eval: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `result.json` holds; a value that does not apply to the run is None (null in the file)."""

    splits: Mapping[str, Scores]
    """Split -> scores of the model that was exported."""
    num_steps: int
    num_ranks: int
    global_batch_size: int | None
    """Examples per optimiser step; None where a token budget decided."""
    global_token_budget: int | None
    padding_efficiency: float | None
    """Real tokens / tokens computed over all ranks, padding included, in the whole training."""
    critical_path_efficiency: float | None
    """Real tokens / (ranks x tokens of the slowest rank at each step): the share of the waiting that was work."""
    rank_balance: float | None
    """Mean padded share / largest padded share; 1 where no rank waits for another."""
    seconds: Seconds
    tokens_per_second: float | None
    """Real tokens per second of training, over all ranks."""
    peak_memory_bytes: int | None
    """The largest over the ranks."""
    feature_cache: str | None
    """Where the frozen part's output was kept: device, host, disk, or off."""
    feature_cache_bytes: int | None
    """What that took, over all ranks."""
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]
    """What the result depends on (config, tokens, backbone ...) -> its hash."""

    def to_dict(self) -> dict[str, object]:
        """The object of `result.json`, keys in the order of the fields."""
        named: dict[str, object] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        named["splits"] = {split: dataclasses.asdict(scores) for split, scores in self.splits.items()}
        named["seconds"] = dataclasses.asdict(self.seconds)
        return named


def versions() -> dict[str, str]:
    """Version of Python, of this package and of the libraries that decide the numbers."""
    found = {"python": platform.python_version(), "agnews_dist": agnews_dist.__version__}
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package in PACKAGES:
                found[package] = "unknown"
    return found


def write_json(path: Path, obj: Mapping[str, object]) -> None:
    """Write `obj` to `path` as strict, indented JSON, whole or not at all; NaN and infinities become null.

    Raises:
        UserError: the file cannot be written.
        TypeError: `obj` holds something without a JSON form.
    """
    write_text(path, [json.dumps(plain(obj), indent=2, allow_nan=False), "\n"])


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
