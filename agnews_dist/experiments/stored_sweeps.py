"""Sweeps on disk, for the list of runs: one line each."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from agnews_dist.events import SCORES
from agnews_dist.experiments.standings import MemberResult, rank_settings
from agnews_dist.report.pages.stored_run import Fields, read_json
from agnews_dist.run.status import FILE, PLAN, Status, has_process, is_sweep, lock_name, read_status
from agnews_dist.run.stored_runs import RunFacts, default_values, list_names, seconds_since, select_changed, sum_bytes
from agnews_dist.storage.locks import is_locked

RESULTS = "sweep.json"
MEMBERS = "members"


def find_sweeps(directory: Path) -> list[Path]:
    """Find the sweeps directly below a directory, sorted by name.

    Raises:
        UserError: it cannot be listed.
    """
    return list_names(directory, is_sweep)


def list_sweep_facts(directory: Path, now: datetime | None = None) -> RunFacts:
    """Collect the facts of one sweep. Its scores are those of its best setting: means over the seeds."""
    plan, report = read_json(directory / PLAN) or {}, read_json(directory / RESULTS)
    members = [each for path in (directory / MEMBERS).glob("*.json") if (each := read_json(path)) is not None]
    state, reason, newest = _read_state(directory, is_finished=report is not None)
    if state != "finished":
        reason = f"{len(members):,} of {_count_members(plan):,} members have ended; {reason}"
    return RunFacts(
        name=directory.name,
        path=str(directory),
        state=state,
        reason=reason,
        step=sum(member["num_steps"] for member in members),
        attempt=newest.attempt if newest is not None else None,
        scores=_read_scores(report) if report is not None else _find_best(plan, members),
        seconds=sum(member["seconds"] for member in members),
        changed=_list_changed(plan),
        time=newest.time if newest is not None else None,
        age_seconds=seconds_since(newest.time, now) if newest is not None else None,
        size_bytes=sum_bytes(directory),
    )


def _read_state(directory: Path, *, is_finished: bool) -> tuple[str, str, Status | None]:
    """Return (state, reason, newest status) over all processes of a sweep."""
    found: list[tuple[Status, bool]] = []
    for path in directory.glob(f"{Path(FILE).stem}*.json"):
        status = read_status(directory, path.name)
        with suppress(ValueError, TypeError):
            if status is not None and datetime.fromisoformat(status.time):
                lives = status.state == "running" and (is_locked(directory / lock_name(path.name)) or has_process(status))
                found.append((status, lives))
    found.sort(key=lambda each: (each[1], each[0].time))
    newest, lives = found[-1] if found else (None, False)
    if newest is not None and lives:
        return "running", newest.reason, newest
    if is_finished:
        return "finished", "all members have ended", newest
    if newest is None:
        return "unknown", "it has no readable status.json", None
    if newest.state == "running":
        return "killed", "its process is gone", newest
    return newest.state, newest.reason, newest


def _count_members(plan: Fields) -> int:
    """Return the number of members of a plan."""
    samples, seeds = plan.get("samples"), plan.get("seeds", [])
    combinations = samples[1] if samples else math.prod(map(len, plan.get("varied settings", {}).values()))
    return combinations * len(seeds)


def _read_scores(report: Fields) -> dict[str, dict[str, float | int]]:
    """Return the mean scores of the selected setting by split."""
    return {
        split: {name: of[name]["mean"] for name in SCORES} | {"num_examples": of["num_examples"]}
        for split, of in report.get("selected", {}).items()
        if split in ("validation", "test")
    }


def _find_best(plan: Fields, members: Sequence[Fields]) -> dict[str, dict[str, float | int]]:
    """Return the mean scores of the best setting so far, among those whose members have all finished."""
    metric = plan.get("settings", {}).get("optim.best_metric", "accuracy")
    # A number that is not finite is null in JSON.
    nan: Any = math.nan
    results = [MemberResult(**{key: nan if value is None else value for key, value in each.items()}) for each in members]
    standings = rank_settings(results, len(plan.get("seeds", [])), metric)
    best = next((standing for standing in standings if standing.state == "finished"), None)
    if best is None:
        return {}
    return {"validation": {name: fmean(getattr(result, name) for result in best.results) for name in SCORES}}


def _list_changed(plan: Fields) -> dict[str, Any]:
    """Return the settings that differ from the defaults; of varied ones a text with all values."""
    varied, defaults = {**plan.get("varied settings", {}), "run.seed": plan.get("seeds", [])}, default_values()
    listed = {key: f"{{{', '.join(map(_format, values))}}}" for key, values in varied.items() if len(values) > 1}
    single = {key: values[0] for key, values in varied.items() if len(values) == 1 and values[0] != defaults.get(key)}
    return {**listed, **single, **select_changed(plan.get("settings", {}))}


def _format(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
