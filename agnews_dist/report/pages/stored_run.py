"""A run as its directory holds it, also one that is unfinished, was moved, or is of an older version."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from agnews_dist import events
from agnews_dist.errors import UserError
from agnews_dist.evaluation.metrics import MAX_DENSE_CLASSES

Fields = dict[str, Any]
LINES_AT_ONCE = 10_000
_SCORES = {field.name for field in dataclasses.fields(events.Scores)}


@dataclass(frozen=True)
class StoredPredictions:
    """predictions-<split>.jsonl: N rows in file order."""

    labels_N: NDArray[np.int64]
    """All -1 if the split has no labels."""
    predictions_N: NDArray[np.int64]
    probabilities_NK: NDArray[np.float64]
    """Probabilities of every class in order, or of `classes_NK`. A value that was not finite is NaN."""
    classes_NK: NDArray[np.int64] | None
    """Most probable classes; None: every class has its column."""
    fingerprint: str
    """sha256 of the file."""

    @property
    def is_labelled(self) -> bool:
        return bool(len(self.labels_N)) and bool((self.labels_N >= 0).all())

    @property
    def has_all_probabilities(self) -> bool:
        """True if every row has a finite probability of every class."""
        return self.classes_NK is None and bool(np.isfinite(self.probabilities_NK).all())

    @cached_property
    def confidence_N(self) -> NDArray[np.float64]:
        """Probability of the predicted class."""
        if self.classes_NK is not None:
            return self.probabilities_NK[:, 0]
        return self.probabilities_NK[np.arange(len(self.predictions_N)), self.predictions_N]

    def probability_of(self, row: int, label: int) -> float | None:
        """Return the probability of one class for one row; None: it was not kept."""
        if self.classes_NK is None:
            return float(self.probabilities_NK[row, label])
        places = np.flatnonzero(self.classes_NK[row] == label)
        return float(self.probabilities_NK[row, places[0]]) if len(places) else None


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """The files of a run. A file that is not there is None or empty."""

    directory: Path
    state: str
    """finished, running, preempted, failed, or killed: it says running, but no process has it."""
    reason: str
    status: Mapping[str, Any]
    """Fields of status.json."""
    settings: Mapping[str, Any]
    """Dotted key -> value."""
    changed: Mapping[str, Any]
    """The settings that differ from the defaults."""
    result: Mapping[str, Any] | None
    """result.json."""
    events: Sequence[Fields]
    predictions: Mapping[str, StoredPredictions]
    class_names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def main_split(self) -> str | None:
        """The split whose predictions are shown in detail: test, or validation if test has no labels."""
        return next((name for name in ("test", "validation") if self.is_labelled(name)), None)

    def is_labelled(self, split: str) -> bool:
        """Return whether there are predictions of a split with labels."""
        return split in self.predictions and self.predictions[split].is_labelled

    def events_of(self, kind: str) -> list[Fields]:
        """Return the events of one kind, in order."""
        return [event for event in self.events if event.get("event") == kind]


def read_result(path: Path) -> Fields | None:
    """Read result.json; None: it is absent, or has not the parts of every version."""
    result = read_json(path)
    parts = [result.get(name) for name in ("splits", "seconds")] if result is not None else [None]
    return result if all(isinstance(part, dict) for part in parts) else None


def read_json(path: Path) -> Fields | None:
    """Read a JSON object; None: it is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return cast(Fields, content) if isinstance(content, dict) else None


def read_events(path: Path) -> list[Fields]:
    """Read the lines of events.jsonl. Lines that are cut short, or lack fields that every version has, are left out."""
    found: list[Fields] = []
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and _has_all_fields(cast(Fields, event)):
                    found.append(cast(Fields, event))
    except OSError:
        return []
    return found


@cache
def _required_fields(kind: str) -> frozenset[str]:
    """Return the fields of an event that have no default; those of its scores in place of `scores`."""
    event = next((each for each in get_args(events.Event) if each.__name__ == kind), None)
    fields = [] if event is None else dataclasses.fields(event)
    names = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    return frozenset(names - {"scores"} | (_SCORES if "scores" in names else set()))


def _has_all_fields(event: Fields) -> bool:
    return _required_fields(str(event.get("event"))) <= event.keys()


def read_all_predictions(directory: Path) -> dict[str, StoredPredictions]:
    """Read the predictions of every split of a run, validation first."""
    paths = {path.stem.removeprefix("predictions-"): path for path in directory.glob("predictions-*.jsonl")}
    names = [name for name in ("validation", "test") if name in paths]
    return {name: read_predictions(paths[name]) for name in [*names, *sorted(paths.keys() - set(names))]}


def read_predictions(path: Path) -> StoredPredictions:
    """Read one file of predictions.

    Raises:
        UserError: it cannot be read, or a line is not one of a prediction.
    """
    digest, parts = hashlib.sha256(), list[StoredPredictions]()
    number = 0
    try:
        with path.open("rb") as file:
            while lines := list(itertools.islice(file, LINES_AT_ONCE)):
                rows: list[Fields] = []
                for line in lines:
                    digest.update(line)
                    rows.append(json.loads(line))
                    if rows[-1]["id"] != number:
                        raise ValueError(f"id {rows[-1]['id']}")
                    number += 1
                parts.append(_to_arrays(rows))
        if not parts:
            raise ValueError("it is empty")
        classes = [part.classes_NK for part in parts if part.classes_NK is not None]
        return StoredPredictions(
            np.concatenate([part.labels_N for part in parts]),
            np.concatenate([part.predictions_N for part in parts]),
            np.concatenate([part.probabilities_NK for part in parts]),
            np.concatenate(classes) if classes else None,
            fingerprint=digest.hexdigest(),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} line {number + 1}: it cannot be read ({error}). Write it again with the same training."
        ) from error


def _to_arrays(rows: Sequence[Fields]) -> StoredPredictions:
    """Convert some lines. Python's numbers take eight times the memory of an array."""
    has_top = "top" in rows[0]
    values = [[pair[1] for pair in row["top"]] if has_top else row["probabilities"] for row in rows]
    return StoredPredictions(
        np.array([-1 if row["label"] is None else row["label"] for row in rows], np.int64),
        np.array([row["prediction"] for row in rows], np.int64),
        np.array([[float("nan") if value is None else value for value in row] for row in values], np.float64),
        np.array([[pair[0] for pair in row["top"]] for row in rows], np.int64) if has_top else None,
        fingerprint="",
    )


def find_class_names(
    directory: Path, events: Sequence[Fields], predictions: Mapping[str, StoredPredictions]
) -> tuple[str, ...]:
    """Find the names of the classes: in the exported model, else in the last evaluation, else numbers."""
    config = read_json(directory / "model" / "config.json") or {}
    named = config.get("id2label")
    if isinstance(named, dict):
        names = cast("dict[str, Any]", named)
        return tuple(str(names[key]) for key in sorted(names, key=int))
    for event in reversed(events):
        if event.get("event") == "EvalDone" and event.get("class_names"):
            return tuple(map(str, event["class_names"]))
    num_classes = 0
    for split in predictions.values():
        if split.classes_NK is None:
            num_classes = max(num_classes, split.probabilities_NK.shape[1])
        else:
            num_classes = max(
                num_classes, int(split.classes_NK.max()) + 1, int(split.labels_N.max()) + 1, MAX_DENSE_CLASSES + 1
            )
    return tuple(map(str, range(num_classes)))
