"""Output of the runs command: a table on a terminal, one line per run elsewhere, or one JSON object."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agnews_dist.errors import shorten
from agnews_dist.report.formatting import can_draw, create_output, create_table, escape_text, format_duration
from agnews_dist.storage.capacity import gigabytes

JSON_FORMAT = 1
"""Number of the format of --json; it grows if a field changes its meaning or goes."""
Facts = Mapping[str, Any]
COLUMNS = ("run", "state", "step", "validation", "test", "age", "size", "settings that differ")


def sort_runs(runs: Sequence[Facts], order: str) -> list[Facts]:
    """Sort runs by name, or by time, accuracy or size, the largest first; those without the value are last."""
    if order == "name":
        return sorted(runs, key=lambda run: run["name"])

    def key(run: Facts) -> Any:
        if order in ("test", "validation"):
            return run["scores"].get(order, {}).get("accuracy")
        return run["time"] if order == "time" else run["size_bytes"]

    known = [run for run in runs if key(run) is not None]
    return sorted(known, key=key, reverse=True) + [run for run in runs if key(run) is None]


def runs_to_json(directory: Path, runs: Sequence[Facts]) -> dict[str, Any]:
    """Return the object of --json."""
    return {"format": JSON_FORMAT, "directory": str(directory), "runs": list(runs)}


def show_runs(directory: Path, runs: Sequence[Facts]) -> None:
    """Print the runs."""
    out = create_output(sys.stdout)
    if not runs:
        print(f"no run below {escape_text(str(directory), out.encoding)}")
        return
    common = _find_common(runs)
    rows = [[escape_text(cell, out.encoding) for cell in _list_cells(run, common)] for run in runs]
    if not can_draw(out):
        for row in rows:
            print("  ".join(row))
        return
    out.print(create_table(COLUMNS, rows, right=("step", "validation", "test", "size")))
    if common:
        print(
            "in all of them: " + escape_text("  ".join(f"{key} {_show(value)}" for key, value in common.items()), out.encoding)
        )


def _find_common(runs: Sequence[Facts]) -> dict[str, Any]:
    """Return the settings that differ from the defaults in the same way in every one of several runs."""
    if len(runs) < 2:
        return {}
    first, *others = (run["changed"] for run in runs)
    return {key: value for key, value in first.items() if all(key in each and each[key] == value for each in others)}


def _list_cells(run: Facts, common: Mapping[str, Any]) -> list[str]:
    own = [f"{key} {_show(value)}" for key, value in run["changed"].items() if key not in common]
    age = run["age_seconds"]
    return [
        run["name"],
        run["state"],
        "-" if run["step"] is None else f"{run['step']:,}",
        *(_format_accuracy(run, split) for split in ("validation", "test")),
        "-" if age is None else f"{age / 86400:.1f} days" if age > 86400 else format_duration(age),
        gigabytes(run["size_bytes"]),
        "  ".join(own) or "-",
    ]


def _format_accuracy(run: Facts, split: str) -> str:
    accuracy = run["scores"].get(split, {}).get("accuracy")
    return "-" if accuracy is None else f"{accuracy:.4f}"


def _show(value: object) -> str:
    return shorten(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value), 40)
