"""Reports of runs that have ended: one run from its own settings, or several compared on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agnews_dist.config.schema import Config
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, Warned
from agnews_dist.report.pages.analysis import RunRows, analyse, is_current
from agnews_dist.report.pages.comparison import build_comparison, check_comparable
from agnews_dist.report.pages.details import SplitDetails, describe_split
from agnews_dist.report.pages.page import check_output, write_page
from agnews_dist.report.pages.stored_run import Fields, StoredRun, read_json
from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
from agnews_dist.run.model_setup import read_model_files
from agnews_dist.run.reporting import ANALYSIS_FILE, NO_FEATURES, combine_rows, write_report
from agnews_dist.run.setup import load_text, open_tokens
from agnews_dist.run.status import is_sweep
from agnews_dist.run.stored_runs import read_run, read_run_config


def report_one(
    directory: Path, *, output: Path | None = None, overrides: Mapping[str, Any], recompute: bool = False, emit: Emit
) -> Path:
    """Write the report of one run; return the path of the page.

    `output`: another directory than the run's. `overrides`: settings that replace those of the run, to find its data.
    `recompute`: analyse the texts again, also if an analysis was kept.

    Raises:
        UserError: see `read_run` and `write_report`.
    """
    run = read_run(directory)

    def analyse_rows(run: StoredRun, details: Mapping[str, SplitDetails]) -> tuple[Fields, str]:
        config = read_run_config(directory, {**_find_source(run), **overrides})
        rows, seconds = load_rows(config, emit), config.report.max_seconds
        return analyse(run, rows, details, NO_FEATURES, max_seconds=seconds, check_stop=lambda: None)

    return write_report(run, analyse_rows, output=output, recompute=recompute, emit=emit)


def _find_source(run: StoredRun) -> dict[str, object]:
    """Return `data.source` and `model.name` as paths, if they are relative to the directory in which the run was started."""
    found: dict[str, object] = {}
    runs = Path(str(run.settings.get("run.dir", "runs")))
    parents = run.directory.resolve().parents
    # A member of a sweep is in the sweep's directory.
    depth = len(runs.parts) + is_sweep(parents[0])
    if not runs.is_absolute() and ".." not in runs.parts and len(parents) > depth:
        for key in ("data.source", "model.name"):
            path = parents[depth] / str(run.settings.get(key))
            if path.exists() and not Path(str(run.settings.get(key))).exists():
                found[key] = str(path)
    return found


def load_rows(config: Config, emit: Emit) -> RunRows:
    """Read the rows of a run again, with the lengths of their tokens if the tokenizer is at hand.

    Raises:
        UserError: the rows cannot be read.
    """
    fetch_inputs(partial(list_requests, config, has_weights=False), World(), emit)
    corpus, data = load_text(config.data), config.data
    try:
        files = read_model_files(config.model, data)
        store = open_tokens(corpus, files.tokenizer, data, max_length=data.max_length, emit=emit, world=World())
    except UserError as error:
        emit(Warned(message=f"the report has no lengths of texts: {error}"))
        store = None
    return combine_rows(corpus, store, data.max_length)


def compare(directories: Sequence[Path], output: Path, build: Callable[[Path], Path]) -> Path:
    """Write the comparison of runs with the first of them to `output`; return the path of the page.

    `build` writes the report of a run. It is called for those without an analysis of their predictions, which has the texts.

    Raises:
        UserError: the runs were not scored on the same rows.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"report of {', '.join(map(str, directories))}: two runs have the same name. Rename one directory.")
    check_output(output)
    check_comparable(runs, {name: {} for name in names})
    for run in runs:
        if not _read_analysis(run):
            with suppress(UserError):  # a run that cannot be written is compared without its texts
                build(run.directory)
    analyses = {run.name: _read_analysis(run) for run in runs}
    split = check_comparable(runs, analyses)
    details = {run.name: {split: describe_split(run, split)} for run in runs}
    return write_page(build_comparison(runs, details, analyses, split), output)


def _read_analysis(run: StoredRun) -> Fields:
    """Return the kept analysis of a run; empty if it is not of these predictions."""
    analysis = read_json(run.directory / ANALYSIS_FILE)
    return analysis if analysis is not None and is_current(analysis, run) else {}
