"""The report of a run: after its end, at a stop, or later from what it has left."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import nn

from agnews_dist.config.schema import Config
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.corpus import ReadRows
from agnews_dist.data.rows import Corpus
from agnews_dist.data.tokens import TokenStore
from agnews_dist.distributed import collectives
from agnews_dist.engine.device import DTYPES, measure_matrix_rate
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.evaluation.frozen_features import FrozenFeatures, compute_frozen_features
from agnews_dist.events import Emit, RunDone, Warned, begin_phase
from agnews_dist.features.manager import FeatureCache
from agnews_dist.report.pages.analysis import RunRows, analyse, is_current
from agnews_dist.report.pages.details import SplitDetails, describe_split
from agnews_dist.report.pages.page import build_page, write_page
from agnews_dist.report.pages.stored_run import Fields, StoredRun, read_json
from agnews_dist.report.result_files import write_json
from agnews_dist.run.attempt import Attempt
from agnews_dist.run.setup import TrainingInputs, load_text
from agnews_dist.run.stored_runs import read_run
from agnews_dist.storage.atomic import write_text

ANALYSIS_FILE = "analysis.json"
LABEL_ERRORS_FILE = "label_errors.csv"
PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "cleanlab": "cleanlab", "jinja2": "jinja2"}
"""Module -> package of the extra `report`."""
AnalyseRows = Callable[[StoredRun, Mapping[str, SplitDetails]], tuple[Fields, str]]
"""From a run and its scores to the object of analysis.json, and the ranked label errors as csv."""
NO_FEATURES = "it takes a training that keeps its features (engine.feature_cache)"
MAX_COPY_BYTES = 256_000_000
"""Size of a trainable part up to which the untrained one is kept for a baseline."""
PROBE_SECONDS = 0.2
"""Time of measuring matrix products."""


def list_missing_packages() -> list[str]:
    """Return the packages of the report that are not installed."""
    return [package for module, package in PACKAGES.items() if find_spec(module) is None]


def check_packages() -> None:
    """Check that the packages of the report are installed.

    Raises:
        UserError: some are not.
    """
    if missing := list_missing_packages():
        raise UserError(f"report: {', '.join(missing)} not installed. Run pip install agnews_dist[report].")


class Reporter:
    """Writer of the report at the end of a training. Every rank has one."""

    def __init__(
        self, config: Config, inputs: TrainingInputs, engine: Engine, features: FeatureCache, read_given: ReadRows | None = None
    ) -> None:
        """Copy the untrained suffix, for the baseline on the frozen model. Collective; before the suffix is trained.

        `read_given`: see `load_text`.
        """
        self._config, self._engine, self._store, self._classifier = config, engine, inputs.store, inputs.classifier
        self._read_given = read_given
        self._missing = collectives.all_gather(list_missing_packages())[0] if config.report.write else []
        self._is_on = config.report.write and not self._missing
        self._suffix: nn.Module | None = None
        """On the CPU, where the memory is not estimated to the last megabyte."""
        self._frozen: FrozenFeatures | str = NO_FEATURES
        suffix = inputs.classifier.suffix
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in suffix.parameters())
        if num_bytes > MAX_COPY_BYTES:
            self._frozen = f"the trainable part has more than {MAX_COPY_BYTES // 1_000_000} MB"
        # Without a cache, the frozen part would run once more.
        elif self._is_on and config.report.max_seconds and features.choice.place != "off":
            self._suffix = copy.deepcopy(suffix).cpu().eval()
            self._suffix.add_module("out_head", nn.Identity())

    def finish(self, tables: Mapping[str, TokenTable], features: FeatureCache, attempt: Attempt, done: RunDone | None) -> None:
        """Write the report, and emit `done`, the last event of the run. Collective.

        The run is recorded as finished, so nothing here ends it: a report that fails, or that a stop cuts short, is a warning.
        """
        page: Path | None = None
        try:
            self._compute_features(tables, features)
            if done is not None:
                page = self._write(attempt)
        finally:
            if done is not None:
                paths = {"report": str(page)} if page is not None else {}
                attempt.monitors.emit(replace(done, paths={**paths, **done.paths}))
        if self._is_on:
            collectives.wait_for_main(None)
            collectives.raise_if_any_failed(None)

    def _compute_features(self, tables: Mapping[str, TokenTable], features: FeatureCache) -> None:
        """Compute what the frozen model knows of the rows, over all ranks. Collective."""
        if self._suffix is not None:
            self._frozen = compute_frozen_features(
                self._suffix,
                tables,
                self._engine,
                features.source,
                owner_N=features.owner_N,
                seed=self._config.run.seed,
                max_seconds=self._config.report.max_seconds / 3,
            )
            self._suffix = None

    def _write(self, attempt: Attempt) -> Path | None:
        """Write the report, on rank 0."""
        emit, directory = attempt.monitors.emit, attempt.directory
        if self._missing:
            emit(Warned(message=f"no report: {', '.join(self._missing)} not installed. Run pip install agnews_dist[report]."))
        if not self._is_on:
            return None

        def analyse_rows(run: StoredRun, details: Mapping[str, SplitDetails]) -> tuple[Fields, str]:
            corpus = load_text(self._config.data, read_given=self._read_given)
            rows = combine_rows(corpus, self._store, self._config.data.max_length)
            seconds = self._config.report.max_seconds
            analysis, errors = analyse(run, rows, details, self._frozen, max_seconds=seconds, check_stop=check_stop)
            return {**analysis, "frozen_limit_seconds": self._estimate_frozen_seconds()}, errors

        def check_stop() -> None:
            if attempt.monitors.preemption.is_stopping:
                raise UserError("the report was cut short: the run was asked to stop. Run agnews-dist report RUN later.")

        return try_to_report(directory, analyse_rows, emit=emit)

    def _estimate_frozen_seconds(self) -> float:
        """Estimate the least time of the frozen part: its matrix products at the rate that this rank measures."""
        width, num_blocks = self._classifier.config.n_embd, len(self._classifier.prefix.h)
        lengths_N = np.concatenate([split.lengths for split in self._store.splits.values()]).astype(np.float64)
        operations = num_blocks * float((24 * width**2 * lengths_N + 2 * width * lengths_N * (lengths_N + 1)).sum())
        dtype = DTYPES[self._engine.precision]
        return operations / (measure_matrix_rate(self._engine.device, dtype, PROBE_SECONDS) * self._engine.world.num_ranks)


def combine_rows(corpus: Corpus, store: TokenStore | None, max_length: int) -> RunRows:
    """Combine texts with the lengths of their tokens, if they are known."""
    splits = store.splits if store is not None else {}
    lengths = {name: split.lengths for name, split in splits.items()}
    return RunRows(corpus, lengths, {name: split.num_truncated for name, split in splits.items()}, max_length)


def try_to_report(directory: Path, analyse_rows: AnalyseRows | None, *, emit: Emit) -> Path | None:
    """Write the report, or warn why there is none. The run is complete without it."""
    try:
        return write_report(read_run(directory), analyse_rows, emit=emit)
    except Exception as error:
        what = str(error) or type(error).__name__
        emit(Warned(message=f"no report: {what} Run agnews-dist report {directory} later."))
        return None


def write_report(
    run: StoredRun, analyse_rows: AnalyseRows | None, *, output: Path | None = None, recompute: bool = False, emit: Emit
) -> Path:
    """Write analysis.json, report.html, report.md and figures; return the path of the page.

    Args:
        run: to report on.
        analyse_rows: analyses the texts, unless an analysis of these predictions was kept. None: the report shows no texts.
        output: another directory than the run's.
        recompute: analyse the texts again.
        emit: for progress.

    Raises:
        UserError: the directory cannot be written, or a file of the run is damaged.
    """
    emit(begin_phase("write the report"))
    target = output or run.directory
    details = {name: describe_split(run, name) for name in run.predictions if run.is_labelled(name)}
    kept = read_json(run.directory / ANALYSIS_FILE)
    analysis = kept if kept is not None and is_current(kept, run) else {}
    if analyse_rows is not None and (recompute or not analysis):
        analysis = _analyse(run, target, analyse_rows, details, analysis)
    return write_page(build_page(run, details, analysis), target)


def _analyse(
    run: StoredRun, target: Path, analyse_rows: AnalyseRows, details: Mapping[str, SplitDetails], former: Fields
) -> Fields:
    """Return a new analysis, and keep it; if the rows cannot be read, a note that says so.

    `former`: an analysis of the same predictions. It has what only a training can measure.
    """
    try:
        analysis, label_errors = analyse_rows(run, details)
    except UserError as error:
        return {"notes": [f"Texts, baselines and label errors are left out: {error}"]}
    baselines = {each["name"]: each for each in former.get("baselines", [])}
    baselines |= {each["name"]: each for each in analysis["baselines"] if not (each["skipped"] and each["name"] in baselines)}
    analysis = {**former, **analysis, "baselines": list(baselines.values())}
    write_json(target / ANALYSIS_FILE, analysis)
    if label_errors:
        write_text(target / LABEL_ERRORS_FILE, [label_errors])
    return analysis
