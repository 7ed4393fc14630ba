"""A smoke test of the benchmarks: every script starts with the package as it is now, and the main one runs."""

import json
from pathlib import Path

import pytest
from support.fork_server import run_python
from support.processes import REPOSITORY

pytestmark = pytest.mark.slow
BENCH = REPOSITORY / "tests" / "bench"
# The comparison of plans needs the packages of plan/requirements.txt.
SCRIPTS = [
    path
    for path in sorted(BENCH.rglob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
    and path.name not in ("compare.py", "lhotse_settings.py", "measure.py", "plot.py")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_script_starts(script: Path) -> None:
    assert "usage: " in run_python(str(script), "--help").stdout


def test_fast_path_benchmark_measures_both_paths(tmp_path: Path) -> None:
    fast_path = BENCH / "fast_path"
    run_python(str(fast_path / "job.py"), str(tmp_path / "job"), "--quick")
    rows = []
    for option in ((), ("--plain",)):
        output = tmp_path / f"output{len(rows)}"
        done = run_python(str(fast_path / "ours.py"), str(tmp_path / "job"), str(output), "--epochs", "2", *option)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    assert [row["contestant"] for row in rows] == ["ours", "plain"]
    assert [row["features"].partition(":")[0] for row in rows] == ["disk", "off"]
    for row in rows:
        assert len(row["epoch_seconds"]) == len(row["loss"]) == 2
        assert 0 < sum(row["epoch_seconds"]) < row["seconds"]
        assert row["loss"][1] < row["loss"][0]
    assert rows[0]["tokens_per_epoch"] == rows[1]["tokens_per_epoch"]
