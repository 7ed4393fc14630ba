"""The rows of the logs as Markdown tables."""

from typing import Any

Row = dict[str, Any]


def span(low: int, high: int) -> str:
    """'29', or '29 to 31'."""
    return str(low) if low == high else f"{low} to {high}"


def costs_table(rows: list[Row]) -> list[str]:
    """AG News, every case: efficiency, examples, steps, cost of planning."""
    lines = [
        "| sampler | critical path | padding | balance | repeated | lost | examples per step | steps | plan, s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    case = None
    for row in rows:
        if case != (row["global_batch"], row["num_ranks"]):
            case = row["global_batch"], row["num_ranks"]
            lines.append(f"| **{case[0]:,} on {case[1]} ranks** | | | | | | | | | |")
        shown = (row["critical_path"], row["padding"], row["rank_balance"])
        cells = [row["sampler"], *(f"{value:.3f}" for value in shown), f"{row['repeated']:,}", f"{row['lost']:,}"]
        cells += [span(row["batch_min"], row["batch_max"]), span(row["steps_min"], row["steps_max"])]
        cells += [f"{row['seconds']:.3f}", f"{row['peak_mib']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def order_table(rows: list[Row]) -> list[str]:
    """What only the case measured on several numbers of ranks and epochs shows."""
    lines = ["| sampler | same global batch on 2, 4, 8 ranks | batch mates kept in the next epoch |", "|---|---|---|"]
    return lines + [f"| {row['sampler']} | {row['same_batches']:.0%} | {row['mates_kept']:.1%} |" for row in rows]


def lengths_table(rows: list[Row]) -> list[str]:
    """Critical-path efficiency on the other lengths: a row per sampler, a column per case."""
    columns: dict[str, None] = {}
    by_sampler: dict[str, list[Row]] = {}
    for row in rows:
        columns[f"{row['data']} {row['global_batch']:,} / {row['num_ranks']}"] = None
        by_sampler.setdefault(row["sampler"], []).append(row)
    lines = [f"| sampler | {' | '.join(columns)} | repeated | lost |", "|---" * (len(columns) + 3) + "|"]
    for sampler, found in by_sampler.items():
        cells = [sampler, *(f"{row['critical_path']:.3f}" for row in found)]
        cells += [f"{sum(row[count] for row in found):,}" for count in ("repeated", "lost")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def growth_table(rows: list[Row]) -> str:
    """Planning and sharing of ours as data sets grow (growth.py)."""
    lines = [
        "| examples | held | ranks | steps | plan, s | share, s | one late step, s | peak MiB | critical path |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        held = "blocks" if row.get("block_size") else "in memory"
        cells = [f"{row['num_examples']:,}", held, f"{row['num_ranks']:,}", f"{row['num_steps']:,}"]
        cells += [f"{row['plan_seconds']:.3g}", f"{row['share_seconds']:.3g}", f"{row['resume_seconds']:.2g}"]
        cells += [f"{row['peak_mib']:,.0f}", f"{row['critical_path']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> str:
    """The comparison's three, ready for RESULTS.md."""
    timed = [row for row in rows if "seconds" in row]
    parts = costs_table(timed), order_table([row for row in rows if "mates_kept" in row])
    others = lengths_table([row for row in rows if "seconds" not in row])
    return "\n\n".join("\n".join(lines) for lines in (*parts, others)) + "\n"
