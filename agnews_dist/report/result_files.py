"""Result files of a run: result.json and predictions-<split>.jsonl."""

import json
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import agnews_dist
from agnews_dist.events import Scores
from agnews_dist.storage.atomic import to_json_value, write_text

if TYPE_CHECKING:
    from agnews_dist.evaluation.evaluator import SplitScores

ROWS_AT_ONCE = 1000
"""Rows formatted at once: the text of a number takes 128 bytes while it is in an array."""
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall time of a run by stage, on rank 0."""

    total: float
    setup: float
    """From the imports to the first training step or evaluation."""
    tokenize: float
    prefix: float
    """Computing features with the frozen part."""
    train: float
    eval: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Content of result.json. A value that does not apply is None (null)."""

    splits: Mapping[str, Scores]
    """Split -> scores of the exported model, without the splits that have no labels."""
    num_steps: int
    num_ranks: int
    global_batch_size: int | None = None
    """Examples per optimiser step; None with a token budget."""
    global_token_budget: int | None = None
    padding_efficiency: float | None = None
    """Real tokens / padded tokens, over all ranks and steps."""
    critical_path_efficiency: float | None = None
    """Real tokens / (ranks x padded tokens of the slowest rank), over all steps."""
    rank_balance: float | None = None
    """Padded tokens of the mean rank / of the slowest rank; 1 if no rank waits."""
    seconds: Seconds
    tokens_per_second: float | None = None
    """Real tokens of all ranks per second of training."""
    peak_memory_bytes: int | None
    """Maximum over the ranks."""
    feature_cache: str | None = None
    """Place of the cached features: device, host, disk or off."""
    feature_cache_bytes: int | None = None
    """Bytes of the cached features, over all ranks."""
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]
    """Input of the run (config, tokens, frozen weights ...) -> its hash."""
    note: str | None = None
    """Fact about the training that its settings do not say."""

    def to_dict(self) -> dict[str, Any]:
        """Return the object of result.json, keys in the order of the fields."""
        return asdict(self)


@cache
def versions() -> Mapping[str, str]:
    """Look up the versions of Python, this package and the libraries that results depend on."""
    found = {"python": platform.python_version(), "agnews_dist": agnews_dist.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package != "deepspeed":
                found[package] = "unknown"
    return found


def find_commit() -> str:
    """Return the git commit of this package if it runs from a checkout, with `changed` if files differ; else `none`."""
    root = Path(agnews_dist.__file__).parents[1]
    if not (root / ".git").exists():
        return "none"
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}, changed" if changes else commit


def print_json(content: object) -> None:
    """Print strict, indented JSON; NaN and infinities are null."""
    print(json.dumps(to_json_value(content), indent=2, allow_nan=False))


def write_json(path: Path, obj: Mapping[str, object]) -> None:
    """Write `obj` as strict, indented JSON, whole or not at all. NaN and infinities become null, lists of integers lines."""
    text = json.dumps(to_json_value(obj), indent=2, allow_nan=False)
    # Strings hold no raw line break, so this finds lists only.
    write_text(path, [re.sub(r"\[\n[\s\d,]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text), "\n"])


def write_predictions(directory: Path, name: str, split: "SplitScores") -> Path:
    """Write `{"id", "label", "prediction", "probabilities"}` per row of the split `name`, whole or not at all.

    The file is predictions-<name>.jsonl; its path is returned. A label is null if the split has none. Of more than 256 classes,
    `"top": [[class, probability], ...]` has the most probable ones in place of `"probabilities"`.

    A probability is the shortest text of its float32 value: the float32 logits have no more digits. Non-finite ones are null.
    """
    path = directory / f"predictions-{name}.jsonl"
    write_text(path, _format_predictions(split))
    return path


def _format_predictions(split: "SplitScores") -> Iterator[str]:
    labels_N = ["null" if label < 0 else str(label) for label in split.labels_N.tolist()]
    rows = enumerate(zip(labels_N, split.predictions_N.tolist(), _format_probabilities(split), strict=True))
    for row, (label, prediction, probabilities) in rows:
        yield f'{{"id": {row}, "label": {label}, "prediction": {prediction}, {probabilities}}}\n'


def _format_probabilities(split: "SplitScores") -> Iterator[str]:
    for begin in range(0, len(split.probabilities_NK), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        values_BK = split.probabilities_NK[part].astype(np.float32)
        # numpy formats all numbers at once, several times faster than json.dumps per row.
        texts_BK = values_BK.astype(np.str_)
        texts_BK[~np.isfinite(values_BK)] = "null"
        if split.classes_NK is None:
            yield from (f'"probabilities": [{", ".join(texts_K)}]' for texts_K in texts_BK.tolist())
            continue
        for classes_K, texts_K in zip(split.classes_NK[part].tolist(), texts_BK.tolist(), strict=True):
            pairs = (f"[{i}, {text}]" for i, text in zip(classes_K, texts_K, strict=True))
            yield f'"top": [{", ".join(pairs)}]'
