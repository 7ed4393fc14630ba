"""A probe: one pass of the frozen model over the rows, a logistic regression on every layer, and a page that compares them."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from agnews_dist.config.schema import Config
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError, count_noun
from agnews_dist.evaluation.layer_features import POOLINGS, PooledRows, View, gather_view, list_views, pool_layers
from agnews_dist.evaluation.layer_probes import (
    MIN_TRAIN_ROWS,
    STRENGTHS,
    Conclusion,
    LayerScore,
    ProbeFit,
    check_rows,
    choose_cut,
    choose_probe_rows,
    compare_views,
    fit_probe,
)
from agnews_dist.evaluation.linear_model import TooCostlyError, order_stratified
from agnews_dist.events import Emit, Progress, RunDone, RunStarted, Warned, begin_phase
from agnews_dist.features.placement import MEMORY_SHARE
from agnews_dist.report.console import Console, Sinks
from agnews_dist.report.formatting import format_duration
from agnews_dist.report.pages.page import write_page
from agnews_dist.report.pages.probe_page import CAVEAT, RULE, build_probe_page, explain, format_csv
from agnews_dist.report.result_files import versions, write_json
from agnews_dist.run.directory import check_output, new_names
from agnews_dist.run.engine_setup import start_engine
from agnews_dist.run.fingerprints import setting_values
from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
from agnews_dist.run.reporting import check_packages
from agnews_dist.run.results import peak_memory_bytes
from agnews_dist.run.setup import TrainingInputs, load_training_inputs, place_inputs
from agnews_dist.storage.atomic import write_text
from agnews_dist.storage.capacity import free_host_bytes, gigabytes
from agnews_dist.training.timing import StageTimer

FORMAT = 1
"""Number of the format of probe.json."""
MAX_ROWS = 20_000
"""Most rows of a split that are taken. More change the scores of a probe little."""
ALL_FROZEN = {"trainable_blocks": 0, "train_embeddings": False, "freeze_schedule": None, "pooling": "last"}
"""Settings of the model that a probe replaces. A head that reads means takes a part of the norm into the frozen part."""
FIT_COPIES = 8
"""Copies of one view in memory while it is gathered and fitted."""


@dataclass(frozen=True)
class Probed:
    """A finished probe, on rank 0."""

    scores: list[LayerScore]
    conclusions: list[Conclusion]
    """For `model.pooling`, and for the others."""
    num_rows: int
    """Rows that were scored."""


def run_probe(config: Config, world: World, *, output: Path | None, console: Console | None, start: float) -> Probed | None:
    """Probe the frozen model on every layer, and write the results on rank 0, which returns them. Collective.

    `output`: directory of the results; None: below `run.dir`. `start`: `time.perf_counter()` at the begin of the command.

    Raises:
        UserError: anything that the user can fix.
    """
    timer = StageTimer(start)
    poolings = sorted(POOLINGS, key=lambda pooling: pooling != config.model.pooling)
    config = config.model_copy(update={"model": config.model.model_copy(update=ALL_FROZEN)})
    with Sinks() as emit:
        if console is not None:
            emit.add(console)
        emit(begin_phase(f"connect {count_noun(world.num_ranks, 'rank')}"))
        engine = start_engine(config.engine, world, is_training=False)
        claim = partial(_claim, config, output)
        directory = collectives.raise_if_any_failed(collectives.catch_on_main(claim, "looks at the directory of the probe"))
        fetch_inputs(partial(list_requests, config), world, emit)
        load = partial(load_training_inputs, config, world, emit, timer, exports=False)
        inputs = collectives.raise_if_any_failed(collectives.catch(load))
        collectives.check_equal(inputs.fingerprints)
        tables = place_inputs(config, inputs, engine)
        begin = time.perf_counter()
        rows = _choose_rows(config, inputs, tables, engine, emit)

        def pool() -> dict[str, PooledRows]:
            return {
                name: pool_layers(inputs.classifier, tables[name], ids_N, engine, emit=emit) for name, ids_N in rows.items()
            }

        parts = collectives.raise_if_any_failed(collectives.catch(pool))
        seconds = {"frozen_model": time.perf_counter() - begin}
        labels = {name: tables[name].labels_N[ids_N] for name, ids_N in rows.items()}
        views, begin = list_views(inputs.classifier.config.n_layer), time.perf_counter()
        fitted_R = _choose_fitted(config, parts["train"], labels["train"], world, emit)
        fits = _fit_views(views, parts, labels["train"], fitted_R, world, seed=config.data.seed, emit=emit)
        seconds |= {"fits": time.perf_counter() - begin, "total": time.perf_counter() - start}
        peak = max(collectives.all_gather(peak_memory_bytes(engine.device)))

        def write() -> Probed | None:
            if directory is None:
                return None
            emit(begin_phase("write the probe"))
            scores = compare_views(views, fits, labels["validation"], len(inputs.class_names))
            num_blocks, num_rows = views[-1].layer, len(labels["validation"])
            conclusions = [choose_cut(scores, each, num_blocks=num_blocks, num_rows=num_rows) for each in poolings]
            counts = {"train": len(tables["train"]), "validation": len(tables["validation"])}
            done = Probed(scores, conclusions, num_rows)
            facts = {"rows": counts, "fitted": len(fitted_R), "scored": num_rows, "ranks": world.num_ranks}
            facts |= {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "peak_memory_bytes": peak}
            paths = _write(directory, config, inputs, done, facts)
            emit(RunDone(facts={"time": _describe_seconds(seconds), "peak memory": gigabytes(peak)}, paths=paths))
            return done

        return collectives.raise_if_any_failed(collectives.catch_on_main(write, "writes the probe"))


def _claim(config: Config, output: Path | None) -> Path:
    """Return the directory of the results, once it is known that they can be written."""
    check_packages()
    if not config.report.max_seconds:
        raise UserError("report.max_seconds 0: it is the time for the fits of a probe. Set it to some seconds.")
    name = config.run.name or next(new_names(config.model.name, datetime.now()))
    directory = output or Path(config.run.dir) / f"{name}-probe"
    check_output(directory, overwrite=config.run.overwrite, file="probe.json")
    return directory


def choose_counts(num_rows: tuple[int, int], row_bytes: float, limit_bytes: float) -> tuple[int, int]:
    """Choose how many rows of train and of the scored split are taken: at most `MAX_ROWS` each, and what fits into the memory.

    >>> choose_counts((120_000, 6_000), row_bytes=1000, limit_bytes=13_000_000)
    (10000, 3000)
    """
    train, scored = (min(count, MAX_ROWS) for count in num_rows)
    share = min(1.0, limit_bytes / row_bytes / (train + scored))
    return int(share * train), int(share * scored)


def _choose_rows(
    config: Config, inputs: TrainingInputs, tables: dict[str, TokenTable], engine: Engine, emit: Emit
) -> dict[str, Ints]:
    """Choose the rows of train and validation, the same on all ranks, and emit the header. Collective.

    Raises:
        SharedError: the memory or the training split is too small.
    """
    gpt2, world, seed = inputs.classifier.config, engine.world, config.data.seed
    num_views = len(list_views(gpt2.n_layer))
    row_bytes = 4 * gpt2.n_embd * (num_views / world.num_ranks + FIT_COPIES)
    free = min(collectives.all_gather(free_host_bytes()))
    names = ("train", "validation")
    whole = tuple(len(tables[name]) for name in names)
    counts = choose_counts((whole[0], whole[1]), row_bytes, MEMORY_SHARE * free / world.ranks_per_node)

    def choose() -> dict[str, Ints]:
        if counts[0] < min(MIN_TRAIN_ROWS, whole[0]) or not counts[1]:
            raise UserError(
                f"model.name {config.model.name}: {gigabytes(free)} free, too little for features of {MIN_TRAIN_ROWS} rows. "
                "Use a machine with more memory, or more nodes."
            )
        orders = [order_stratified(tables[name].labels_N, seed) for name in names]
        found = {name: np.sort(order_N[:count]) for name, order_N, count in zip(names, orders, counts, strict=True)}
        try:
            check_rows(tables["train"].labels_N[found["train"]], seed)
        except TooCostlyError as error:
            raise UserError(f"probe of {config.data.source}: {error}. Give it more rows of train.") from error
        return found

    rows = collectives.raise_if_any_failed(collectives.catch(choose))
    described: list[str] = []
    for name, count, all_rows in zip(names, counts, whole, strict=True):
        described.append(f"{count:,} of {name}" if count == all_rows else f"{count:,} of {all_rows:,} of {name}, stratified")
    facts = {
        "model": config.model.name,
        "data": config.data.source,
        "layers": f"{gpt2.n_layer + 1}, and the last one after the norm; {' and '.join(POOLINGS)} token",
        "rows": "; ".join(described),
        "memory": f"{gigabytes(int(row_bytes * sum(counts)))} per rank for features and fits, of {gigabytes(free)} free",
        "device": f"{engine.description}, {engine.precision}",
        "ranks": f"{world.num_ranks} ({world.ranks_per_node} per node)",
        **inputs.data_facts,
    }
    emit(RunStarted(facts=facts, parameters=inputs.parameters))
    return rows


def _choose_fitted(config: Config, part: PooledRows, labels_N: Ints, world: World, emit: Emit) -> Ints:
    """Choose the training rows that all probes are fitted on, by the time that rank 0 measures. Collective.

    Raises:
        SharedError: they are too few.
    """
    num_views, limit = len(part.values_LND), config.report.max_seconds
    seconds = limit / math.ceil(num_views / world.num_ranks)
    train_ND = gather_view(part, num_views - 1)

    def choose() -> Ints:
        try:
            return choose_probe_rows(train_ND, labels_N, max_seconds=seconds, seed=config.data.seed)
        except TooCostlyError as error:
            raise UserError(f"report.max_seconds {limit:g}: {error} in each probe. Raise it.") from error

    emit(begin_phase("time a probe"))
    chosen = collectives.raise_if_any_failed(collectives.catch_on_main(choose, "times a probe"))
    rows_R = collectives.all_gather(chosen)[0]
    assert rows_R is not None
    if len(rows_R) < len(labels_N):
        fitted = f"{len(rows_R):,} of {len(labels_N):,} training rows"
        emit(Warned(message=f"the probes learn from {fitted}, stratified: report.max_seconds {limit:g} allows no more."))
    return rows_R


def _fit_views(
    views: list[View], parts: dict[str, PooledRows], labels_N: Ints, fitted_R: Ints, world: World, *, seed: int, emit: Emit
) -> list[ProbeFit]:
    """Fit the probe of every view, one per rank at a time; return them in order. Collective."""
    mine: list[ProbeFit] = []
    for begin in range(0, len(views), world.num_ranks):
        emit(Progress(task="fit probes", done=begin, total=len(views), unit="probes"))
        own = None
        for number in range(begin, min(begin + world.num_ranks, len(views))):
            gathered = [gather_view(parts[name], number) for name in ("train", "validation")]
            own = gathered if number - begin == world.rank else own
        if own is not None:
            mine.append(fit_probe(own[0][fitted_R], labels_N[fitted_R], own[1], seed=seed))
    emit(Progress(task="fit probes", done=len(views), total=len(views), unit="probes"))
    gathered = collectives.all_gather(mine)
    return [gathered[number % world.num_ranks][number // world.num_ranks] for number in range(len(views))]


def _describe_seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {format_duration(value)}" for name, value in seconds.items())


def _write(directory: Path, config: Config, inputs: TrainingInputs, done: Probed, facts: dict[str, Any]) -> dict[str, str]:
    """Write the files of a probe; return their paths by kind."""
    values, scores = setting_values(config), done.scores
    own = {key: value for key, value in values.items() if key.startswith(("data.", "model.")) or key == "engine.precision"}
    own = {key: value for key, value in own.items() if key.removeprefix("model.") not in ALL_FROZEN}
    found = {**versions(), "scikit-learn": metadata.version("scikit-learn")}
    shown = {
        "model": config.model.name,
        "data": config.data.source,
        "rows": f"fitted on {facts['fitted']:,} of {facts['rows']['train']:,} training rows, scored on {facts['scored']:,} of "
        f"{facts['rows']['validation']:,} of validation",
        "time": _describe_seconds(facts["seconds"]),
        "memory": f"{gigabytes(facts['peak_memory_bytes'])} at most on a rank, of {count_noun(facts['ranks'], 'rank')}",
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }
    page = build_probe_page(
        directory.name,
        f"{config.model.name} on {config.data.source}",
        scores,
        done.conclusions,
        num_rows=done.num_rows,
        facts=shown,
    )
    conclusions = {
        each.best.view.pooling: {
            "best": each.best.view.layer_name,
            "cut": each.cut.view.layer_name,
            "blocks_above": each.num_above,
            "standard_error": each.standard_error,
        }
        for each in done.conclusions
    }
    content = {
        "format": FORMAT,
        "conclusion": explain(done.conclusions[0], done.num_rows),
        "rule": RULE,
        "caveat": CAVEAT,
        "poolings": conclusions,
        "views": [{**asdict(each), "view": each.view._asdict(), "is_close": each.is_close} for each in scores],
        "strengths": STRENGTHS,
        "class_names": inputs.class_names,
        **facts,
        "settings": own,
        "versions": found,
        "fingerprints": {name: value for name, value in inputs.fingerprints.items() if name != "config"},
    }
    html = write_page(page, directory, "probe")
    write_text(directory / "probe.csv", [format_csv(scores)])
    # Last: with it the directory holds a probe.
    write_json(directory / "probe.json", content)
    return {"page": str(html), "results": str(directory / "probe.json"), "table": str(directory / "probe.csv")}
