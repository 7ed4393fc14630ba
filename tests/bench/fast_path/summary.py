"""The log of run.py as Markdown tables: what each contestant took, and what of the goals was reached.

Goals hold against the faster of Trainer as it is and Trainer compiled; the variants with a changed model are shown only.
"""

from statistics import mean, median
from typing import Any

Row = dict[str, Any]
Runs = dict[tuple[str, int], list[Row]]
"""(kind, epochs) -> what ran so."""
MIB = 2**20
NAMES = {
    "ours": "ours",
    "plain": "ours, plain path",
    "length": "Trainer, `group_by_length`",
    "random": "Trainer, random batches padded to the longest",
    "fixed": "Trainer, all padded to 128",
}
GOALS = {("length", 3): 9, ("random", 3): 12, ("fixed", 3): 12, ("length", 10): 25}
"""(peer, epochs) -> how many times as fast as it ours wants to be."""
EPOCH_GOAL, PREFIX_GOAL = 100, 0.75


def groups(rows: list[Row]) -> Runs:
    """Finished runs by what ran and for how many epochs, in order of appearance."""
    found: Runs = {}
    for row in rows[1:]:
        if "epoch_seconds" in row:
            found.setdefault((kind(row), row["epochs"]), []).append(row)
    return found


def kind(row: Row) -> str:
    """The contestant, and in which variant of Trainer's."""
    options = row["command"].split()
    is_changed = "--activation" in options or "--quiet-frozen" in options
    compiled = ", compiled" if "--compile" in options else ""
    return row["contestant"] + (", model changed" if is_changed else "") + compiled


def name(kind: str) -> str:
    """For the table."""
    contestant, comma, variant = kind.partition(",")
    return NAMES[contestant] + comma + variant


def peers(found: Runs, contestant: str, epochs: int) -> list[list[Row]]:
    """What ours is held against: Trainer as it is or compiled, not with a changed model."""
    return [found[key] for key in ((contestant, epochs), (f"{contestant}, compiled", epochs)) if key in found]


def seconds(runs: list[Row]) -> float:
    """End to end, of the median run."""
    return median(row["seconds"] for row in runs)


def spread(values: list[float], digits: int) -> str:
    """'12.3', or '12.3 (12.1 to 12.9)' of several."""
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def runs_table(found: Runs) -> str:
    """A line per contestant and number of epochs; medians where it ran more than once."""
    lines = [
        "| what | epochs | seconds, end to end | times ours | frozen part, s | an epoch, s | last epoch's loss | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (contestant, epochs), runs in found.items():
        mine = found.get(("ours", epochs))
        times = f"{seconds(runs) / seconds(mine):.1f}" if mine and contestant != "ours" else ""
        prefix = f"{median(row['parts']['prefix'] for row in runs):.2f}" if contestant == "ours" else ""
        cells = [name(contestant), str(epochs), spread([row["seconds"] for row in runs], 1), times, prefix]
        cells += [spread([mean(row["epoch_seconds"]) for row in runs], 2), f"{median(row['loss'][-1] for row in runs):.3f}"]
        cells.append(spread([row["peak_rss_bytes"] / MIB for row in runs], 0))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_rate(rows: list[Row]) -> float:
    """FLOP/s: the best that any measurement of the matrix products saw."""
    return max(row["gigaflops"] for row in rows if "gigaflops" in row) * 1e9


def prefix_rate(job: Row, row: Row) -> float:
    """FLOP/s of the frozen part of a run of ours: only its matrix products count, all of its time does."""
    tokens = sum(job["tokens"].values())
    return tokens * (job["blocks"] - 1) * 24 * job["width"] ** 2 / row["parts"]["prefix"]


def cache_bytes(job: Row) -> int:
    """What the features of all splits take: a row of fp32 per token."""
    return sum(job["tokens"].values()) * job["width"] * 4


def goals_table(rows: list[Row], found: Runs) -> str:
    """What was wanted and what came out; a line is left out where its runs are missing."""
    lines = ["| goal | wanted | reached |", "|---|---|---|"]
    job = rows[0]["job"]
    for (peer, epochs), goal in GOALS.items():
        theirs = [seconds(runs) for runs in peers(found, peer, epochs)]
        if theirs and ("ours", epochs) in found:
            times = min(theirs) / seconds(found["ours", epochs])
            lines.append(f"| {epochs} epochs against {NAMES[peer]} | {goal}x | {times:.1f}x |")
    # The longest runs have the most epochs. Their median leaves out what compiling took.
    for epochs in sorted((epochs for who, epochs in found if who == "ours" and peers(found, "length", epochs)))[-1:]:
        theirs = min(median(row["epoch_seconds"]) for runs in peers(found, "length", epochs) for row in runs)
        # The first epoch uses the features for the first time; from the second on they are only read again.
        later = median(mean(row["epoch_seconds"][1:]) for row in found["ours", epochs])
        reached = f"{theirs / later:.0f}x ({theirs:.1f} s against {later:.3f} s)"
        lines.append(f"| a cached epoch against `group_by_length` | {EPOCH_GOAL}x | {reached} |")
    if machine := [row for row in rows if "gigaflops" in row]:
        rate, rates = machine_rate(machine), [prefix_rate(job, row) for row in found.get(("ours", 3), [])]
        if rates:
            shares = spread([100 * value / rate for value in rates], 0)
            reached = f"{shares} % ({median(rates) / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s)"
            lines.append(f"| frozen part, share of the matrix-product rate | {PREFIX_GOAL:.0%} | {reached} |")
    if ("ours", 3) in found and ("plain", 1) in found:
        peak = max(row["peak_rss_bytes"] for row in found["ours", 3]) / MIB
        plain, cache = found["plain", 1][0]["peak_rss_bytes"] / MIB, cache_bytes(job) / MIB
        bound = f"{plain:,.0f} + {cache:,.0f} MiB" if cache >= 1 else f"{plain:,.0f} + {cache:.1f} MiB"
        lines.append(f"| peak memory, at most plain training + cache | {bound} | {peak:,.0f} MiB |")
    return "\n".join(lines)


def plain_note(found: Runs) -> str:
    """The plain path ran one epoch; its three are that and two more of the same."""
    runs = found.get(("plain", 1))
    if not runs or ("ours", 3) not in found:
        return ""
    scaled = median(row["seconds"] + 2 * row["epoch_seconds"][0] for row in runs)
    times = scaled / seconds(found["ours", 3])
    return f"Plain path, three epochs, scaled from one (its time + 2 x its epoch): {scaled:.1f} s, {times:.1f} times ours.\n"


def settings_table(rows: list[Row]) -> str:
    """Trainer's settings: end to end, every epoch, and what remains once compiling is over."""
    lines = [
        "| setting | epochs | seconds, end to end | epochs, s | CPU s | loss | load before |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows[1:]:
        if "epoch_seconds" in row:
            epochs = ", ".join(f"{value:.1f}" for value in row["epoch_seconds"])
            cells = [row["key"], str(row["epochs"]), f"{row['seconds']:.1f}", epochs, f"{row['cpu_seconds']:.0f}"]
            lines.append(f"| {' | '.join([*cells, str(row['loss'][-1]), str(row['load_before'])])} |")
    return "\n".join(lines) + "\n"


def tables(rows: list[Row]) -> str:
    """Of a log, its first line included."""
    if rows[0]["settings"]:
        return settings_table(rows)
    found = groups(rows)
    return "\n\n".join(part for part in (runs_table(found), plain_note(found).strip(), goals_table(rows, found)) if part) + "\n"
