"""Reports of runs that have ended: one run from its own settings, or several compared on the same rows."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agnews_dist.config.schema import Config
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, Warned
from agnews_dist.report.pages.analysis import RunRows
from agnews_dist.report.pages.comparison import build_comparison, check_comparable
from agnews_dist.report.pages.details import describe_split
from agnews_dist.report.pages.page import write_page
from agnews_dist.report.pages.stored_run import read_json
from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
from agnews_dist.run.reporting import ANALYSIS_FILE, combine_rows, write_report
from agnews_dist.run.setup import load_text, open_tokens, read_model_files
from agnews_dist.run.stored_runs import read_run, read_run_config


def report_one(directory: Path, *, overrides: Mapping[str, Any], recompute: bool, emit: Emit) -> Path:
    """Write the report of one run; return the path of the page.

    `overrides`: settings that replace those of the run, to find its data. `recompute`: also if an analysis was kept.

    Raises:
        UserError: see `read_run` and `write_report`.
    """
    run = read_run(directory)
    config = read_run_config(directory, overrides)
    return write_report(
        run, partial(load_rows, config, emit), max_seconds=config.report.max_seconds, recompute=recompute, emit=emit
    )


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

    `build` writes the report of a run. It is called for those without an analysis, which has the texts.

    Raises:
        UserError: the runs were not scored on the same rows.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"report of {', '.join(map(str, directories))}: two runs have the same name. Rename one directory.")
    check_comparable(runs, {name: {} for name in names})
    for run in runs:
        if read_json(run.directory / ANALYSIS_FILE) is None:
            build(run.directory)
    analyses = {run.name: read_json(run.directory / ANALYSIS_FILE) or {} for run in runs}
    split = check_comparable(runs, analyses)
    details = {run.name: {split: describe_split(run, split)} for run in runs}
    try:
        output.mkdir(parents=True, exist_ok=True)
        return write_page(build_comparison(runs, details, analyses, split), output)
    except OSError as error:
        raise UserError(
            f"--output {output}: it cannot be written ({error.strerror or error}). Set it to a writable directory."
        ) from error
