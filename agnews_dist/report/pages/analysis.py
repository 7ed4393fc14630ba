"""analysis.json: what the report shows besides scores. It needs texts and models, so it is computed once and kept.

It holds baselines on the same rows, probable label errors, a summary of the data, accuracy by length, and the texts that are
shown. The report is built again from it where the data is no longer to be had.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from agnews_dist.data.quality import find_faults
from agnews_dist.data.rows import Corpus, Ints, Split, hash_corpus
from agnews_dist.errors import UserError
from agnews_dist.evaluation.baselines import FROZEN_MODEL, BaselineResult, features_baseline, majority_baseline, tfidf_baseline
from agnews_dist.evaluation.frozen_features import FrozenFeatures
from agnews_dist.evaluation.label_errors import LabelIssue, find_near_duplicates, probabilities_out_of_fold, rank_label_issues
from agnews_dist.report.pages.details import SplitDetails
from agnews_dist.report.pages.stored_run import Fields, StoredRun

FORMAT = 1
PACKAGES = ("scikit-learn", "scipy", "cleanlab")
"""Libraries that the numbers depend on."""
MAX_ROWS = 20_000
"""Training rows from which a baseline learns, and that are searched for label errors."""
MAX_TEXTS = 200_000
"""Texts of a split that are in memory at once."""
MAX_SHOWN = 400
"""Characters of a text that are kept to be shown."""
NUM_LABEL_ISSUES = 50
"""Probable label errors of a split that are shown with their texts."""
MAX_LABEL_ISSUES = 5_000
"""Probable label errors of a split that are listed: a twentieth of its rows, at most these."""
MAX_MISTAKES = 2000
"""Mistakes of a split whose texts are kept."""
NUM_LENGTH_BINS = 8


@dataclass(frozen=True)
class RunRows:
    """The rows of a run, with the number of tokens of each."""

    corpus: Corpus
    lengths: Mapping[str, Ints]
    """Split -> tokens of each text after truncation; may be empty."""
    num_truncated: Mapping[str, int]
    max_length: int


def is_current(analysis: Fields | None, run: StoredRun) -> bool:
    """Return whether a kept analysis belongs to the predictions of the run."""
    if analysis is None or analysis.get("format") != FORMAT:
        return False
    return analysis.get("predictions") == {name: each.fingerprint for name, each in run.predictions.items()}


def analyse(
    run: StoredRun,
    rows: RunRows,
    details: Mapping[str, SplitDetails],
    frozen: FrozenFeatures | str,
    *,
    max_seconds: float,
    check_stop: Callable[[], None],
) -> tuple[Fields, str]:
    """Analyse the texts of a run; return the object of analysis.json, and the ranked label errors as csv.

    Args:
        run: with its predictions; without any, only the data is described.
        rows: the rows that it was trained and scored on.
        details: the scores of each labelled split.
        frozen: what the frozen model computed for some training rows and all scored ones; or why that baseline is left out.
        max_seconds: time for baselines and label errors, about a third for each; 0: none of them.
        check_stop: called between the parts; what it raises ends the analysis.

    Raises:
        UserError: the rows are not those of the run.
    """
    _check_rows(run, rows.corpus)
    texts = _TextsToShow(rows.corpus)
    for name, each in details.items():
        texts.add(name, [*each.mistakes, *_list_mistakes(run, name)])
        texts.add(name, [row for pair in each.pairs for row in pair.rows])
    analysis: Fields = {
        "format": FORMAT,
        "predictions": {name: each.fingerprint for name, each in run.predictions.items()},
        "rows": {name: hash_corpus({"rows": split}, ()) for name, split in rows.corpus.splits.items()},
        "data": describe_data(rows),
        "by_length": {name: _by_length(run, name, rows) for name in details if name in rows.lengths},
        "baselines": [],
        "label_issues": {},
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "notes": [],
    }
    label_errors = ""
    if details and max_seconds and "train" in rows.corpus.splits:
        scored = {name: rows.corpus.splits[name] for name in details if name in rows.corpus.splits}
        baselines = _run_baselines(rows.corpus.splits["train"], scored, frozen, max_seconds=max_seconds, check_stop=check_stop)
        analysis["baselines"] = [_baseline_fields(each) for each in baselines]
        check_stop()
        ranked = _find_label_issues(run, rows.corpus, list(details), analysis["notes"], max_seconds=max_seconds / 3)
        label_errors = format_label_issues(rows.corpus, ranked)
        for name, issues in ranked.items():
            shown = _with_near_texts(rows.corpus.splits[name], issues[:NUM_LABEL_ISSUES])
            texts.add(name, [issue["row"] for issue in shown])
            analysis["label_issues"][name] = shown
    analysis["texts"] = texts.to_json()
    return analysis, label_errors


def _list_mistakes(run: StoredRun, name: str) -> list[int]:
    """List the rows that were predicted wrongly: a comparison of runs shows their texts."""
    stored = run.predictions[name]
    return np.flatnonzero(stored.labels_N != stored.predictions_N)[:MAX_MISTAKES].tolist()


def _check_rows(run: StoredRun, corpus: Corpus) -> None:
    rows = (run.result or {}).get("fingerprints", {}).get("rows", corpus.fingerprint)
    for name, stored in run.predictions.items():
        split = corpus.splits.get(name)
        if split is None or rows != corpus.fingerprint or not np.array_equal(split.labels, stored.labels_N):
            raise UserError(
                f"{run.directory}: the rows of its data are not those it was trained and scored on. Set --data.source to the "
                "same rows."
            )


class _TextsToShow:
    """Texts that the report shows, by split and row."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._found: dict[str, dict[str, Fields]] = {}

    def add(self, name: str, rows: Sequence[int]) -> None:
        split = self._corpus.splits[name]
        found = self._found.setdefault(name, {})
        for row in rows:
            text = split.texts[row]
            shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
            found[str(row)] = {"text": shown, "label": int(split.labels[row]), "origin": split.origin.name(row)}

    def to_json(self) -> Fields:
        return dict(self._found)


def describe_data(rows: RunRows) -> Fields:
    """Describe the splits: rows, classes, lengths, truncation; and the findings about them."""
    corpus = rows.corpus
    splits: list[Fields] = []
    for name, split in corpus.splits.items():
        fields: Fields = {"name": name, "num_rows": len(split)}
        is_labelled = bool((split.labels >= 0).all())
        fields["class_counts"] = np.bincount(split.labels, minlength=len(corpus.class_names)).tolist() if is_labelled else None
        if (lengths_N := rows.lengths.get(name)) is not None:
            quantiles = np.quantile(lengths_N, [0.05, 0.5, 0.95])
            counts, edges = np.histogram(lengths_N, bins=min(24, int(lengths_N.max() - lengths_N.min()) + 1))
            fields |= {
                "mean_length": float(lengths_N.mean()),
                "length_quantiles": quantiles.tolist(),
                "max_length": int(lengths_N.max()),
                "length_histogram": [counts.tolist(), edges.tolist()],
                "num_truncated": rows.num_truncated.get(name, 0),
            }
        splits.append(fields)
    return {"splits": splits, "max_length": rows.max_length, "findings": [asdict(each) for each in find_faults(corpus)]}


def _by_length(run: StoredRun, name: str, rows: RunRows) -> list[Fields]:
    """Count examples and correct predictions by the length of the text, in bins of about equal counts."""
    stored, lengths_N = run.predictions[name], rows.lengths[name]
    edges = np.unique(np.quantile(lengths_N, np.linspace(0, 1, NUM_LENGTH_BINS + 1), method="higher"))
    edges[-1] += 1
    edges = edges if len(edges) > 1 else np.array([edges[0] - 1, edges[0]])
    is_right_N = stored.labels_N == stored.predictions_N
    found: list[Fields] = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        in_bin_N = (lengths_N >= low) & (lengths_N < high)
        if in_bin_N.any():
            counts = {"num_examples": int(in_bin_N.sum()), "num_correct": int(is_right_N[in_bin_N].sum())}
            found.append({"low": int(low), "high": int(high) - 1, **counts})
    return found


def _run_baselines(
    train: Split,
    scored: Mapping[str, Split],
    frozen: FrozenFeatures | str,
    *,
    max_seconds: float,
    check_stop: Callable[[], None],
) -> list[BaselineResult]:
    labels = {name: split.labels for name, split in scored.items()}
    found = [majority_baseline(train.labels, labels)]
    sample, _ = _sample(train)
    texts = {name: list(split.texts) for name, split in scored.items() if len(split) <= MAX_TEXTS}
    scored_labels = {name: labels[name] for name in texts}
    seconds = max_seconds / 3
    found.append(
        tfidf_baseline(list(sample.texts), sample.labels, texts, scored_labels, max_rows=MAX_TEXTS, max_seconds=seconds)
    )
    check_stop()
    if not isinstance(frozen, str) and not (len(frozen.train_rows_N) and frozen.splits.keys() & labels.keys()):
        frozen = "the time (report.max_seconds) is too short, or the splits are too large"
    if not isinstance(frozen, str):
        train_labels = train.labels[frozen.train_rows_N]
        features = {name: each for name, each in frozen.splits.items() if name in labels}
        labels = {name: labels[name] for name in features}
        found.append(features_baseline(frozen.train_NH, train_labels, features, labels, max_seconds=seconds))
    else:
        found.append(BaselineResult(FROZEN_MODEL, skipped=frozen))
    return found


def _baseline_fields(baseline: BaselineResult) -> Fields:
    scores = {
        name: {
            "num_examples": each.num_examples,
            "num_correct": each.num_correct,
            "accuracy": each.accuracy,
            "macro_f1": each.macro_f1,
        }
        for name, each in baseline.scores.items()
    }
    return {
        "name": baseline.name,
        "splits": scores,
        "num_train_rows": baseline.num_train_rows,
        "seconds": round(baseline.seconds, 2),
        "skipped": baseline.skipped,
    }


def _find_label_issues(
    run: StoredRun, corpus: Corpus, scored: Sequence[str], notes: list[str], *, max_seconds: float
) -> dict[str, list[LabelIssue]]:
    """Rank probable label errors: of scored splits by the model, of train by a simple model out of fold."""
    found: dict[str, list[LabelIssue]] = {}
    for name in scored:
        stored = run.predictions[name]
        if stored.has_all_probabilities:
            found[name] = rank_label_issues(stored.labels_N, stored.probabilities_NK, limit=_limit_issues(len(stored.labels_N)))
        else:
            notes.append(f"label errors of {name} were not searched: not every probability was kept")
    train, ids_N = _sample(corpus.splits["train"])
    folds = probabilities_out_of_fold(
        list(train.texts), train.labels, len(corpus.class_names), max_rows=MAX_ROWS, max_seconds=max_seconds
    )
    if folds.note:
        notes.append(f"label errors of train: {folds.note}")
    if len(folds.rows_N):
        issues = rank_label_issues(train.labels[folds.rows_N], folds.probabilities_NC, limit=_limit_issues(len(folds.rows_N)))
        found["train"] = [issue._replace(row=int(ids_N[folds.rows_N[issue.row]])) for issue in issues]
    return found


def _sample(train: Split) -> tuple[Split, Ints]:
    """Return at most MAX_TEXTS rows of a split, and their ids in it."""
    ids_N = np.arange(len(train))
    if len(train) > MAX_TEXTS:
        ids_N = np.sort(np.random.default_rng(0).permutation(len(train))[:MAX_TEXTS])
    return (train.take(ids_N) if len(ids_N) < len(train) else train), ids_N


def _limit_issues(num_rows: int) -> int:
    return min(MAX_LABEL_ISSUES, max(NUM_LABEL_ISSUES, num_rows // 20))


def format_label_issues(corpus: Corpus, found: Mapping[str, Sequence[LabelIssue]]) -> str:
    """Format all ranked rows as csv."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("split", "rank", "row", "origin", "label", "suggested", "quality", "text"))
    for name, issues in found.items():
        split = corpus.splits[name]
        for rank, issue in enumerate(issues, 1):
            names = (corpus.class_names[issue.label], corpus.class_names[issue.suggested])
            where = (issue.row, split.origin.name(issue.row))
            writer.writerow((name, rank, *where, *names, f"{issue.quality:.4f}", split.texts[issue.row]))
    return file.getvalue()


def _with_near_texts(split: Split, issues: Sequence[LabelIssue]) -> list[Fields]:
    """Add to each issue the texts of its split that are nearly the same."""
    rows = [issue.row for issue in issues]
    near = find_near_duplicates(list(split.texts), rows) if len(split) <= MAX_TEXTS else {}
    fields: list[Fields] = []
    for issue in issues:
        others: list[dict[str, Any]] = [
            {"row": each.row, "similarity": round(each.similarity, 3), "label": int(split.labels[each.row])}
            for each in near.get(issue.row, [])
        ]
        fields.append({**issue._asdict(), "near": others})
    return fields
