"""The report of a run: after its end, at a stop, or later from what it has left."""

import copy
from collections.abc import Callable, Mapping
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
from agnews_dist.events import Emit, Warned, begin_phase
from agnews_dist.features.manager import FeatureCache
from agnews_dist.report.pages.analysis import RunRows, analyse, is_current
from agnews_dist.report.pages.details import SplitDetails, describe_split
from agnews_dist.report.pages.page import build_page, write_page
from agnews_dist.report.pages.stored_run import Fields, StoredRun, read_json
from agnews_dist.report.result_files import write_json
from agnews_dist.run.setup import TrainingInputs, load_text
from agnews_dist.run.stored_runs import read_run
from agnews_dist.storage.atomic import write_text

ANALYSIS_FILE = "analysis.json"
LABEL_ERRORS_FILE = "label_errors.csv"
PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "cleanlab": "cleanlab", "jinja2": "jinja2"}
"""Module -> package of the extra `report`."""
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
        """Copy the untrained suffix, for the baseline on the frozen model. Collective; before the suffix is trained."""
        self._config, self._engine, self._store, self._classifier = config, engine, inputs.store, inputs.classifier
        self._read_given = read_given
        missing = collectives.all_gather(list_missing_packages())[0] if config.report.write else []
        self._missing = missing
        self._is_on = config.report.write and not missing
        self._suffix: nn.Module | None = None
        self._frozen: FrozenFeatures | None = None
        # Without a cache, the frozen part would run once more.
        if self._is_on and features.choice.place != "off":
            suffix = copy.deepcopy(inputs.classifier.suffix).eval()
            suffix.add_module("out_head", nn.Identity())
            self._suffix = suffix

    def compute_features(self, tables: Mapping[str, TokenTable], features: FeatureCache) -> None:
        """Compute what the frozen model knows of the rows, over all ranks. Collective."""
        if self._suffix is not None:
            frozen = compute_frozen_features(
                self._suffix, tables, self._engine, features.source, owner_N=features.owner_N, seed=self._config.run.seed
            )
            self._frozen = frozen if self._engine.world.is_main else None
            self._suffix = None

    def write(self, directory: Path, emit: Emit) -> Path | None:
        """Write the report, on rank 0. A report that fails is a warning: it takes nothing from the run."""
        if self._missing:
            emit(Warned(message=f"no report: {', '.join(self._missing)} not installed. Run pip install agnews_dist[report]."))
        if not self._is_on:
            return None

        def load_rows() -> RunRows:
            return combine_rows(
                load_text(self._config.data, read_given=self._read_given), self._store, self._config.data.max_length
            )

        limits = {"frozen_limit_seconds": self._estimate_frozen_seconds()}
        return try_to_report(directory, load_rows, self._frozen, limits, max_seconds=self._config.report.max_seconds, emit=emit)

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


def try_to_report(
    directory: Path,
    load_rows: Callable[[], RunRows] | None,
    frozen: FrozenFeatures | None = None,
    limits: Mapping[str, float] | None = None,
    *,
    max_seconds: float = 0.0,
    emit: Emit,
) -> Path | None:
    """Write the report, or warn why there is none. The run is complete without it."""
    try:
        return write_report(read_run(directory), load_rows, frozen, limits, max_seconds=max_seconds, emit=emit)
    except Exception as error:
        what = str(error) or type(error).__name__
        emit(Warned(message=f"no report: {what} Run agnews-dist report {directory} later."))
        return None


def write_report(
    run: StoredRun,
    load_rows: Callable[[], RunRows] | None,
    frozen: FrozenFeatures | None = None,
    limits: Mapping[str, float] | None = None,
    *,
    max_seconds: float,
    recompute: bool = False,
    emit: Emit,
) -> Path:
    """Write analysis.json, report.html, report.md and figures to the run's directory; return the path of the page.

    Args:
        run: to report on.
        load_rows: reads the texts, unless an analysis of these predictions was kept. None: the report shows no texts.
        frozen: what the frozen model knows of the rows.
        limits: measured limits, kept with the analysis.
        max_seconds: see `analyse`.
        recompute: analyse the texts again.
        emit: for progress.

    Raises:
        UserError: the directory cannot be written, or a file of the run is damaged.
    """
    emit(begin_phase("write the report"))
    details = {name: describe_split(run, name) for name in run.predictions if run.is_labelled(name)}
    kept = read_json(run.directory / ANALYSIS_FILE)
    kept = kept if kept is not None and is_current(kept, run) else None
    if kept is None or recompute:
        analysis = _analyse(run, load_rows, details, frozen, limits or {}, kept or {}, max_seconds=max_seconds)
    else:
        analysis = kept
    return write_page(build_page(run, details, analysis), run.directory)


def _analyse(
    run: StoredRun,
    load_rows: Callable[[], RunRows] | None,
    details: Mapping[str, SplitDetails],
    frozen: FrozenFeatures | None,
    limits: Mapping[str, float],
    former: Fields,
    *,
    max_seconds: float,
) -> Fields:
    """Return a new analysis, which is kept; without rows only a note on what is missing, which is not.

    `former`: an analysis of the same predictions. It has what only a training can measure.
    """
    if load_rows is None:
        return {}
    try:
        analysis, label_errors = analyse(run, load_rows(), details, frozen, max_seconds=max_seconds)
    except UserError as error:
        return {"notes": [f"Texts, baselines and label errors are left out: {error}"]}
    baselines = {each["name"]: each for each in former.get("baselines", [])}
    baselines |= {each["name"]: each for each in analysis["baselines"] if not (each["skipped"] and each["name"] in baselines)}
    analysis["baselines"] = list(baselines.values())
    analysis = {**former, **limits, **analysis}
    write_json(run.directory / ANALYSIS_FILE, analysis)
    if label_errors:
        write_text(run.directory / LABEL_ERRORS_FILE, [label_errors])
    return analysis
