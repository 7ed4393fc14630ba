"""The tables of RESULTS.md and README on batches are those that the raw logs give; the benchmark counts right."""

import importlib
import json
import sys

import numpy as np
import pytest
from support.processes import REPOSITORY

BENCH = REPOSITORY / "tests" / "bench"
RESULTS = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
README_NAMES = {
    "ours": "ours",
    "ours, sorted over the whole epoch (the limit)": "ours, window epoch (the limit)",
    "lhotse `DynamicBucketingSampler`": "lhotse DynamicBucketingSampler",
    "Hugging Face `BatchRebalanceSampler`": "HF BatchRebalanceSampler",
    "Hugging Face `DistributedLengthGroupedSampler`": "HF DistributedLengthGroupedSampler",
    "Hugging Face `LengthGroupedSampler`": "HF LengthGroupedSampler",
    "torch `DistributedSampler`": "torch DistributedSampler (random)",
}


def logged(name: str) -> list[dict]:
    lines = (BENCH / "logs" / f"2026-11-22-plan-{name}-cpu2.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def module(monkeypatch):
    """Of tests/bench/plan, without what only the benchmark installs."""
    monkeypatch.syspath_prepend(str(BENCH / "plan"))
    for name in ("table", "growth", "measure", "peers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def test_the_comparison_is_what_the_log_says(module):
    rows = logged("compare")[1:]
    assert len(rows) == 3 * 3 * 12
    for part in module("table").table(rows).split("\n\n"):
        assert part.strip() in RESULTS
    assert (BENCH / "plots" / "2026-11-22-plan-compare.png").stat().st_size > 10_000
    assert "(plots/2026-11-22-plan-compare.png)" in RESULTS


def test_the_readme_shows_the_same_figures():
    readme, rows = (REPOSITORY / "README.md").read_text(encoding="utf-8"), logged("compare")[1:]
    for shown, sampler in README_NAMES.items():
        found = [
            f"{row['critical_path']:.3f}" for row in rows if row["data"] == "AG News" and row["sampler"] == sampler
        ]
        assert len(found) == 3
        assert f"| {shown} | {' | '.join(found)} |" in readme


def test_the_growth_is_what_the_log_says(module):
    rows = logged("growth")
    assert max(row["num_examples"] for row in rows) == 10**9
    assert all(row["counted_once"] for row in rows)
    assert module("table").growth_table(rows).strip() in RESULTS


def test_the_simulation_sees_a_lost_or_repeated_example(module):
    sums_of = module("growth").sums_of
    ids = np.arange(100_003, dtype=np.uint64)

    def sums(ids: np.ndarray) -> list[int]:
        return [int(power.sum()) for power in (ids, ids * ids, ids * ids * ids)]

    assert sums(ids) == sums_of(len(ids))
    swapped = ids.copy()
    swapped[[7, 8, 20, 31]] = 8, 8, 20, 30
    assert sums(swapped) != sums_of(len(ids))


def test_virtual_lengths_are_the_same_however_they_are_asked_for(module):
    lengths = module("growth").Virtual(np.arange(1, 98), 5000)
    assert len(lengths) == 5000
    assert np.array_equal(lengths[100:200], lengths[np.arange(100, 200)])
    assert len(np.unique(lengths[0:5000])) == 97
