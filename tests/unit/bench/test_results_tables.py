"""The tables of RESULTS.md show what the raw logs say."""

import json
import re
import statistics
import sys

from support.processes import REPOSITORY

BENCH = REPOSITORY / "tests" / "bench"
NAMES = {"ours, pretrained": "ours", "Hugging Face Trainer 5.23.0": "hf_trainer", "ours, `model.init: random`": "random"}


def test_results_link_every_log():
    text = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\((logs/[^)]+)\)", text))
    assert links
    assert links == {f"logs/{path.name}" for path in (BENCH / "logs").iterdir()}


def test_accuracy_table_matches_the_log():
    log = (BENCH / "logs" / "2026-11-22-accuracy-cpu2.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    assert len(rows) == 9
    results = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    texts = [document.read_text(encoding="utf-8") for document in documents]
    for shown, what in NAMES.items():
        best = [row["best_accuracy"] for row in rows if row["what"] == what]
        last = [row["accuracy"] for row in rows if row["what"] == what]
        assert len(best) == 3
        mean = f"{statistics.mean(best):.4f} +- {statistics.stdev(best) / 3**0.5:.4f}"
        assert f"| {shown} | 0, 1, 2 | {mean} | {statistics.mean(last):.4f} |" in results
        assert any(f"| {shown} | {mean} |" in text for text in texts), f"README or docs: {shown}"


def test_settings_table_matches_the_logs():
    rows = [
        json.loads(line)
        for name in ("2026-11-22-accuracy-cpu2.jsonl", "2026-11-22-settings-cpu2.jsonl")
        for line in (BENCH / "logs" / name).read_text(encoding="utf-8").splitlines()
    ]
    results = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    shown = {"lr 1e-3, batch 32 (default)": {}, "lr 3e-3": {"optim.lr": "3e-3"}, "lr 3e-4": {"optim.lr": "3e-4"}}
    shown["batch 64"] = {"batch.global_batch_size": "64"}
    for setting, varied in shown.items():
        best = [row["best_accuracy"] for row in rows if row["what"] == "ours" and row.get("varied", {}) == varied][:2]
        assert len(best) == 2
        assert f"| {setting} | {best[0]:.3f}, {best[1]:.3f} | {statistics.mean(best):.3f} |" in results


def test_kills_table_matches_the_log():
    log = (BENCH / "logs" / "2026-11-23-kills-cpu2.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    campaigns, kills = [line for line in lines if "seed" in line], [line for line in lines if "run" in line]
    results = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    assert [campaign["differing"] for campaign in campaigns] == [[]] * 3
    assert len(kills) == sum(campaign["num_kills"] for campaign in campaigns) == 180
    through, agents = [kill["through"] for kill in kills], [kill for kill in kills if kill["target"] == "agent"]
    assert f"{through.count('torchrun')} through torchrun ({len(agents)} of its agent)" in results
    for how in ("TERM", "USR1", "USR2", "INT", "KILL", "STOP"):
        mine = [kill for kill in kills if kill["how"] == how]
        seconds, repeated = [kill["seconds"] for kill in mine], [kill["repeated"] for kill in mine]
        times = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"
        assert f"| {how} | {len(mine)} | {times} | {statistics.mean(repeated):.1f}, {max(repeated)} |" in results


def test_checkpoint_table_matches_the_log():
    log = (BENCH / "logs" / "2026-11-23-checkpoints-cpu2.jsonl").read_text(encoding="utf-8")
    rows = {row["save"]: row for row in map(json.loads, log.splitlines()) if "save" in row}
    results = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    shown = {"accelerate `save_state`": "accelerator.save_state", "Hugging Face Trainer": "Trainer"}
    for name, save in shown.items():
        row = rows[save]
        stall, durable = (f"{row[f'median_{key}']:.3f}" for key in ("stall", "durable"))
        ratios = f"{row['stall_over_ours']:.0f}", f"{row['durable_over_ours']:.1f}"
        assert f"| {name} | {row['median_bytes'] / 1e6:.1f} | {stall} | {ratios[0]} | {durable} | {ratios[1]} |" in results


def test_fast_path_tables_match_the_logs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH / "fast_path"))
    monkeypatch.delitem(sys.modules, "summary", raising=False)
    from summary import tables

    results = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    logs = sorted((BENCH / "logs").glob("*-fast-path*.jsonl"))
    assert logs
    for log in logs:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert not any("failed" in row for row in rows)
        for table in tables(rows).split("\n\n"):
            assert table.strip() in results, log.name
