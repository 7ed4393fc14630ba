"""Runs on disk: find them below a directory, read one for its report, list their states and scores."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agnews_dist.config.fields import Problems, all_sections, all_settings, build_config, check_value, make_config, values_of
from agnews_dist.config.schema import Config
from agnews_dist.config.yaml_file import read_config
from agnews_dist.errors import UserError, did_you_mean
from agnews_dist.report.event_log import LOG_FILE
from agnews_dist.report.pages.stored_run import (
    Fields,
    StoredRun,
    find_class_names,
    read_all_predictions,
    read_events,
    read_result,
)
from agnews_dist.run.directory import CONFIG_FILE, is_in_use
from agnews_dist.run.status import has_process, is_sweep, read_status

OWN_SETTINGS = ("run.name", "run.dir", "run.overwrite")
"""Settings that differ between any two runs and say nothing about them."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One line of the list of runs. The fields are those of `agnews-dist runs --json`."""

    name: str
    path: str
    state: str
    """finished, running, preempted, failed, killed or unknown."""
    reason: str
    step: int | None
    """Optimiser steps that are saved."""
    attempt: int | None
    scores: Mapping[str, Mapping[str, float | int]]
    """Split -> num_examples, num_correct, accuracy, macro_f1, loss; empty before the end."""
    seconds: float | None
    """Time of the whole run, over all attempts."""
    changed: Mapping[str, Any]
    """Settings that differ from the defaults."""
    time: str | None
    """ISO 8601, UTC: the last change of the state."""
    age_seconds: float | None
    size_bytes: int
    """Size of all its files."""


def is_run(directory: Path) -> bool:
    """Return whether a directory is that of a run."""
    return (directory / CONFIG_FILE).is_file()


def find_runs(directory: Path) -> list[Path]:
    """Find the runs directly below a directory, sorted by name.

    Raises:
        UserError: it cannot be listed.
    """
    return list_names(directory, is_run)


def list_names(directory: Path, is_wanted: Callable[[Path], bool]) -> list[Path]:
    """List the directories that `is_wanted` accepts directly below another one, sorted by name.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        return sorted({path.resolve() for path in directory.iterdir() if not path.name.startswith(".") and is_wanted(path)})
    except OSError as error:
        raise UserError(
            f"{directory}: it cannot be listed ({error.strerror or error}). Give the directory of the runs (run.dir)."
        ) from error


def read_run(directory: Path) -> StoredRun:
    """Read all files of a run that its report shows.

    Raises:
        UserError: the directory is not a run's, or a file of predictions is damaged.
    """
    if is_sweep(directory):
        raise UserError(f"{directory}: it is a sweep, whose report is its sweep.html. Give one of its runs, {directory}/best.")
    if not is_run(directory):
        names = [path.name for path in directory.parent.iterdir() if is_run(path)] if directory.parent.is_dir() else []
        raise UserError(
            f"{directory}: it is not a run's directory, which has a {CONFIG_FILE}.{did_you_mean(directory.name, names)} Give "
            "the directory of a run, such as runs/NAME."
        )
    settings, changed = read_settings(directory)
    events, predictions = read_events(directory / LOG_FILE), read_all_predictions(directory)
    state, reason, status = _read_state(directory)
    return StoredRun(
        directory=directory,
        state=state,
        reason=reason,
        status=status,
        settings=settings,
        changed=changed,
        result=read_result(directory / "result.json"),
        events=events,
        predictions=predictions,
        class_names=find_class_names(directory, events, predictions),
    )


def read_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a run, and those that differ from the defaults. Unknown ones, of another version, are left out."""
    values = _read_values(directory)
    return {**default_values(), **values}, select_changed(values)


def default_values() -> dict[str, Any]:
    """Return dotted key -> default of every setting, as JSON holds it."""
    return {key: list(s.default) if isinstance(s.default, tuple) else s.default for key, s in all_settings().items()}


def select_changed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that differ from the defaults and from run to run. Unknown ones are left out."""
    defaults = {key: default for key, default in default_values().items() if key not in OWN_SETTINGS}
    return {key: value for key, value in values.items() if key in defaults and value != defaults[key]}


def _read_values(directory: Path) -> dict[str, Any]:
    """Return the settings of a config.yaml that this version knows; a value that it does not know stays a text."""
    values: dict[str, Any] = {}
    for raw in read_config(str(directory / CONFIG_FILE), Problems()):
        setting = all_settings()[raw.name]
        try:
            value = check_value(raw, setting.type, setting.default)[0]
        except ValueError:
            value = raw.value
        values[raw.name] = list(value) if isinstance(value, tuple) else value
    return values


def read_run_config(directory: Path, overrides: Mapping[str, object]) -> Config:
    """Return the settings of a run as a configuration, with other values for some dotted keys.

    Raises:
        ConfigError: a value is not possible in this version.
    """
    raw = read_config(str(directory / CONFIG_FILE), Problems())
    values = dict(values_of(build_config(raw, Problems()))) | dict(overrides)
    sections = {section: dict[str, Any]() for section in all_sections()}
    for key, value in values.items():
        sections[all_settings()[key].section][all_settings()[key].name] = value
    return make_config(sections)


def _read_state(directory: Path) -> tuple[str, str, Fields]:
    """Return (state, reason, fields of status.json)."""
    status = read_status(directory)
    if status is None:
        has_result = (directory / "result.json").is_file()
        return ("finished", "it has a result.json", {}) if has_result else ("unknown", "it has no readable status.json", {})
    fields = asdict(status)
    try:
        datetime.fromisoformat(status.time)
    except (ValueError, TypeError):
        fields["time"] = None
    if status.state == "running" and not (is_in_use(directory.parent, directory.name) or has_process(status)):
        return "killed", "its process is gone", fields
    return status.state, status.reason, fields


def seconds_since(time: str | None, now: datetime | None = None) -> float | None:
    """Return the age of a time in ISO 8601; None without one."""
    if time is None:
        return None
    return max(0.0, ((now or datetime.now(timezone.utc)) - datetime.fromisoformat(time)).total_seconds())


def list_facts(directory: Path) -> RunFacts:
    """Collect the facts of one run. A damaged file counts as absent."""
    state, reason, status = _read_state(directory)
    result = read_result(directory / "result.json") or {}
    scores = {
        name: {key: value for key, value in fields.items() if key != "confusion"}
        for name, fields in result.get("splits", {}).items()
        if isinstance(fields, dict)
    }
    return RunFacts(
        name=directory.name,
        path=str(directory),
        state=state,
        reason=reason,
        step=status.get("step", result.get("num_steps")),
        attempt=status.get("attempt"),
        scores=scores,
        seconds=result.get("seconds", {}).get("total"),
        changed=read_settings(directory)[1],
        time=status.get("time"),
        age_seconds=seconds_since(status.get("time")),
        size_bytes=sum_bytes(directory),
    )


def sum_bytes(directory: Path) -> int:
    """Sum up the sizes of all files below a directory."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except OSError:
                continue  # removed meanwhile
    return total
