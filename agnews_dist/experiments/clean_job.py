"""`agnews-dist clean` as a function: label errors and near duplicates of a data set, and the training without them."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnews_dist.config.schema import Config
from agnews_dist.data.exclusion import read_exclusion
from agnews_dist.data.rows import Corpus
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World, print_line
from agnews_dist.errors import DataError, count_noun
from agnews_dist.evaluation.evaluator import SplitScores, evaluate_split
from agnews_dist.evaluation.label_errors import (
    assign_folds,
    count_label_issues,
    find_near_duplicates,
    probabilities_out_of_fold,
    rank_label_issues,
)
from agnews_dist.evaluation.paired import mcnemar_exact
from agnews_dist.events import SCORES, RunDone, RunStarted, Warned, begin_phase
from agnews_dist.experiments.cleaning import answer_out_of_fold, train_member
from agnews_dist.experiments.feature_group import FeatureGroup, open_feature_group
from agnews_dist.experiments.members import list_ignored
from agnews_dist.report.console import Console, Sinks
from agnews_dist.report.pages.analysis import MAX_TEXTS, format_label_issues
from agnews_dist.report.result_files import versions, write_json
from agnews_dist.run.directory import check_output
from agnews_dist.run.engine_setup import start_training_engine
from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
from agnews_dist.run.reporting import check_packages
from agnews_dist.run.setup import load_text
from agnews_dist.storage.atomic import write_text
from agnews_dist.training.loop import Monitors
from agnews_dist.training.timing import StageTimer

RESULTS, ISSUES, EXCLUDE, DUPLICATES = "clean.json", "label_issues.csv", "exclude.csv", "near_duplicates.csv"
PART_SHARE = 1 / 3
"""Share of `report.max_seconds` for the words of the texts, and for near duplicates."""


@dataclass(frozen=True)
class CleanJob:
    """Everything that a cleaning is made of, the same on every rank."""

    config: Config
    output: Path
    num_folds: int = 5
    share: float | None = None
    """Share of the training rows to exclude; None: as many as cleanlab estimates to be wrong."""


def run_clean(
    world: World, job: CleanJob, *, preemption: PreemptionHandler, console: Console | None = None, start: float | None = None
) -> Path:
    """Find label errors and near duplicates, train without them, and compare. Collective. Return the directory.

    Raises:
        UserError: anything that the user can fix.
    """
    config, timer = job.config, StageTimer(start or time.perf_counter())
    engine = start_training_engine(config, world, preemption)
    sinks = Sinks()
    with ExitStack() as stack:
        stack.enter_context(sinks)
        if console is not None:
            sinks.add(console)

        def prepare() -> None:
            check_packages()
            if world.is_main:
                check_output(job.output, overwrite=config.run.overwrite, file=RESULTS)

        collectives.raise_if_any_failed(collectives.catch(prepare))
        preemption.before_exit = _print_last_words
        # Its limit of time is that of a report.
        if ignored := [name for name in list_ignored(config) if name != "report.max_seconds"]:
            sinks(Warned(message=f"{', '.join(ignored)}: without effect in a cleaning."))
        fetch_inputs(partial(list_requests, config), world, sinks)
        monitors = Monitors(sinks, timer, preemption)
        corpus, fold_N = _assign_folds(job)
        group = open_feature_group(config, engine, monitors, stack, num_trainings=job.num_folds + 2)
        sinks(RunStarted(facts=_describe(job, group), parameters={}))
        begin = time.perf_counter()
        with collectives.without_others():
            outcome = collectives.catch(
                partial(answer_out_of_fold, group, config, fold_N, worker=(world.rank, world.num_ranks), monitors=monitors)
            )
        collectives.wait_for_main("trains its folds")
        parts = [part for of_rank in collectives.all_gather(collectives.raise_if_any_failed(outcome)) for part in of_rank]
        finished = None
        if corpus is not None:
            with collectives.without_others():
                seconds = time.perf_counter() - begin
                finished = collectives.catch(
                    lambda: _Cleaning(job, group, corpus, monitors).finish(parts, fold_seconds=seconds)
                )
        collectives.wait_for_main("trains without the label errors")
        done = collectives.raise_if_any_failed(finished)
        if done is not None:
            sinks(done)
    return job.output


def _print_last_words(state: str, reason: str) -> None:
    if state == "preempted":
        print_line(f"clean: stopped ({reason}). It has written nothing; the same command begins again.")


def _assign_folds(job: CleanJob) -> tuple[Corpus | None, NDArray[np.int64]]:
    """Read the texts on rank 0, and return them there with the folds of the training rows. Collective."""

    def assign() -> tuple[Corpus, NDArray[np.int64]]:
        corpus = load_text(job.config.data)
        train = corpus.splits["train"]
        if max(map(len, corpus.splits.values())) > MAX_TEXTS:
            raise DataError(f"clean: a split has more than {MAX_TEXTS:,} rows. Set data.limit_train and the other limits.")
        fold_N = assign_folds(train.texts, np.asarray(train.labels, np.int64), job.num_folds, job.config.data.seed)
        if not (fold_N >= 0).any():
            raise DataError(f"--folds {job.num_folds}: every class has fewer texts than folds. Set fewer folds, or add rows.")
        return corpus, fold_N

    found = collectives.raise_if_any_failed(collectives.catch_on_main(assign, "reads the texts"))
    corpus, fold_N = found if found is not None else (None, None)
    fold_N = collectives.all_gather(fold_N)[0]
    assert fold_N is not None
    return corpus, fold_N


def _describe(job: CleanJob, group: FeatureGroup) -> dict[str, str]:
    splits = ", ".join(f"{len(split):,} {name}" for name, split in group.inputs.store.splits.items())
    return {
        "clean": str(job.output),
        "model": job.config.model.name,
        "data": f"{job.config.data.source}: {splits}",
        "features": group.kept,
        "folds": f"{job.num_folds}: each is judged by a member that is trained on the others",
    }


class _Cleaning:
    """The work on rank 0 after the folds."""

    def __init__(self, job: CleanJob, group: FeatureGroup, corpus: Corpus, monitors: Monitors) -> None:
        self._job, self._group, self._corpus, self._monitors = job, group, corpus, monitors
        self._emit = monitors.emit
        self._labels_N = np.asarray(corpus.splits["train"].labels, np.int64)
        exclude = job.config.data.exclude
        # Read now: it may be a file of this output, which is replaced.
        self._left_out = [] if exclude is None else read_exclusion(Path(exclude)).names()
        self._scored = [name for name in ("validation", "test") if name in group.tables and self._is_labelled(name)]

    def _is_labelled(self, name: str) -> bool:
        return bool((np.asarray(self._corpus.splits[name].labels) >= 0).all())

    def finish(self, parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], *, fold_seconds: float) -> RunDone:
        """Rank the issues, train with all rows and without the excluded ones, compare, and write all files."""
        job, output, begin = self._job, self._job.output, time.perf_counter()
        rows_N = np.concatenate([rows for rows, _ in parts])
        probabilities_NC = np.concatenate([each for _, each in parts])
        order_N = np.argsort(rows_N)
        rows_N, probabilities_NC = rows_N[order_N], probabilities_NC[order_N]
        labels_N = self._labels_N[rows_N]
        self._emit(begin_phase("judge the words of the texts"))
        probabilities_NC, words_note = self._add_words(rows_N, probabilities_NC)
        ranked = rank_label_issues(labels_N, probabilities_NC, limit=len(rows_N))
        num_wrong = count_label_issues(labels_N, probabilities_NC)
        num_excluded = num_wrong if job.share is None else int(job.share * len(self._labels_N))
        issues = {"train": [issue._replace(row=int(rows_N[issue.row])) for issue in ranked]}
        excluded = issues["train"][:num_excluded]
        self._emit(begin_phase("train with all rows"))
        before = self._train(np.arange(len(self._labels_N)))
        notes = [words_note, *self._explain_unsearched(before)]
        for name in self._scored:
            if before[name].classes_NK is None:
                issues[name] = rank_label_issues(
                    before[name].labels_N, before[name].probabilities_NK, limit=len(before[name].labels_N)
                )
        self._emit(begin_phase("train without the excluded rows"))
        kept_N = np.setdiff1d(np.arange(len(self._labels_N)), [issue.row for issue in excluded])
        after = self._train(kept_N) if excluded else before
        training_seconds = time.perf_counter() - begin
        self._emit(begin_phase("find near duplicates"))
        duplicates, note = self._find_duplicates()
        write_text(output / ISSUES, [format_label_issues(self._corpus, issues)])
        write_text(output / EXCLUDE, [format_label_issues(self._corpus, {"train": excluded}), _format_names(self._left_out)])
        write_text(output / DUPLICATES, [duplicates])
        comparison = {name: _compare(before[name], after[name]) for name in self._scored}
        report: dict[str, Any] = {
            "format": 1,
            "versions": versions(),
            "folds": job.num_folds,
            "rows": len(self._labels_N),
            "judged_rows": len(rows_N),
            "issues": {name: len(issues[name]) if name in issues else None for name in ("train", *self._scored)},
            "estimated_errors": num_wrong,
            "excluded": len(excluded),
            "excluded_before": len(self._left_out),
            "comparison": comparison,
            "seconds": {"folds": round(fold_seconds, 3), "trainings": round(training_seconds, 3)},
        }
        write_json(output / RESULTS, report)
        for each in filter(None, (*notes, note)):
            self._emit(Warned(message=each))
        return RunDone(facts=self._facts(report), paths={name: str(output / name) for name in (ISSUES, EXCLUDE, DUPLICATES)})

    def _add_words(self, rows_N: NDArray[np.int64], probabilities_NC: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
        """Average the members' probabilities with those of a logistic regression on tf-idf, out of fold too.

        Each of the two finds errors that the other misses. Return a note on rows that the second one leaves out.
        """
        texts = [self._corpus.splits["train"].texts[row] for row in rows_N.tolist()]
        seconds = PART_SHARE * self._job.config.report.max_seconds
        num_classes = probabilities_NC.shape[1]
        found = probabilities_out_of_fold(
            texts,
            self._labels_N[rows_N],
            num_classes,
            num_folds=self._job.num_folds,
            max_rows=len(rows_N),
            max_seconds=seconds,
            seed=self._job.config.data.seed,
        )
        together_NC = probabilities_NC.copy()
        together_NC[found.rows_N] = (probabilities_NC[found.rows_N] + found.probabilities_NC) / 2
        return together_NC, f"words of the texts: {found.note}" if found.note else ""

    def _train(self, rows_N: NDArray[np.int64]) -> Mapping[str, SplitScores]:
        """Train on some training rows, and score the other splits."""
        group = self._group
        splits = {name: (name, np.arange(len(group.tables[name]))) for name in group.tables}
        part = group.select({**splits, "train": ("train", rows_N)})
        training = train_member(part, self._job.config, self._monitors)
        return {
            name: evaluate_split(training.classifier, part.tables[name], part.engine, features=part.features(name))
            for name in ("validation", "test")
            if name in group.tables
        }

    def _explain_unsearched(self, scored: Mapping[str, SplitScores]) -> list[str]:
        """Return why the labels of some splits are not searched."""
        notes: list[str] = []
        for name, split in scored.items():
            if not self._is_labelled(name):
                notes.append(f"{name}: it has no labels, so none are searched.")
            elif split.classes_NK is not None:
                notes.append(f"{name}: with so large a number of classes its labels are not searched.")
        return notes

    def _find_duplicates(self) -> tuple[str, str]:
        """Return the rows of other splits with nearly the same text as a training row, as csv; and a note on rows left out."""
        splits = self._corpus.splits
        train, others = splits["train"], [name for name in ("validation", "test") if name in splits]
        texts = [*train.texts[:], *(text for name in others for text in splits[name].texts[:])]
        seconds = PART_SHARE * self._job.config.report.max_seconds
        queries = list(range(len(train), len(texts)))
        # Relatives in the other splits must not take the places of the training rows.
        found = find_near_duplicates(texts, queries, candidates=range(len(train)), deadline=time.monotonic() + seconds)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("split", "row", "origin", "train_row", "train_origin", "similarity", "text", "train_text"))
        begin = len(train)
        for name in others:
            split = splits[name]
            for row in range(len(split)):
                for near in found.get(begin + row, []):
                    where = (name, row, split.origin.name(row), near.row, train.origin.name(near.row))
                    writer.writerow((*where, f"{near.similarity:.3f}", texts[begin + row], texts[near.row]))
            begin += len(split)
        missing = len(queries) - len(found)
        fix = "Raise report.max_seconds to compare them too."
        return out.getvalue(), f"near duplicates: {count_noun(missing, 'row')} not compared, for time. {fix}" if missing else ""

    def _facts(self, report: Mapping[str, Any]) -> dict[str, str]:
        issues = ", ".join(f"{number:,} {name}" for name, number in report["issues"].items() if number is not None)
        facts = {
            "issues": f"labels that another class beats: {issues}",
            "excluded": f"{report['excluded']:,} of {report['rows']:,} training rows"
            + f", and the {len(self._left_out):,} of data.exclude" * bool(self._left_out),
        }
        for name, each in report["comparison"].items():
            change = f"accuracy {each['before']['accuracy']:.4f} with all rows, {each['after']['accuracy']:.4f} without them"
            facts[name] = f"{change}; p = {each['p_value']:.3g}"
        seconds = report["seconds"]
        facts["time"] = f"{seconds['folds']:.1f} s for the folds, {seconds['trainings']:.1f} s for two trainings"
        path = self._job.output / EXCLUDE
        facts["next"] = f"read {EXCLUDE}, remove the lines that are right, and train with --data.exclude {path}"
        return facts


def _format_names(names: Sequence[str]) -> str:
    """Format rows that are left out already as lines of a table of label issues, which has their names alone."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(("", "", "", name, "", "", "", "") for name in names)
    return out.getvalue()


def _compare(before: SplitScores, after: SplitScores) -> dict[str, Any]:
    """Compare two trainings on the same rows."""
    assert before.scores is not None
    assert after.scores is not None
    test = mcnemar_exact(before.labels_N, before.predictions_N, after.predictions_N)
    return {
        "before": {name: getattr(before.scores, name) for name in SCORES},
        "after": {name: getattr(after.scores, name) for name in SCORES},
        "only_before_right": test.num_first_only,
        "only_after_right": test.num_second_only,
        "p_value": test.p_value,
    }
