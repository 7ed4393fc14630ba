"""Sections about the run itself: curves, time, batches, data, settings, and how to repeat it."""

import re
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from agnews_dist.errors import count_noun
from agnews_dist.evaluation.intervals import wilson_interval
from agnews_dist.report.formatting import format_duration
from agnews_dist.report.pages import figures
from agnews_dist.report.pages.parts import Section, Table, format_percent, format_score, make_table
from agnews_dist.report.pages.stored_run import Fields, StoredRun

MAX_POINTS = 60
"""Points of a curve; more steps are averaged."""


def curve_section(run: StoredRun) -> Section | None:
    """Build the curves of loss, accuracy, learning rate and throughput; None: the run has made no step."""
    steps = run.events_of("StepDone")
    if not steps:
        return None
    evaluations = [event for event in run.events_of("EvalDone") if event["split"] == "validation"]
    x, loss = average_steps(steps, "loss")
    rate_x, rates = average_steps(steps, "num_tokens", per="seconds")
    lr_x, learning_rates = average_steps(steps, "lr")
    eval_x = [event["step"] for event in evaluations]

    def draw_loss(axes: "figures.Axes") -> None:
        series = {"train": (x, loss)}
        if evaluations:
            series["validation"] = (eval_x, [_number(event["loss"]) for event in evaluations])
        figures.draw_lines(axes, series, x_label="step", y_label="loss (nats)")

    def draw_accuracy(axes: "figures.Axes") -> None:
        accuracy = [_number(event["accuracy"]) for event in evaluations]
        intervals = [wilson_interval(event["num_correct"], event["num_examples"]) for event in evaluations]
        figures.draw_band(axes, eval_x, [i.low for i in intervals], [i.high for i in intervals])
        series = {"accuracy": (eval_x, accuracy), "macro F1": (eval_x, [_number(e["macro_f1"]) for e in evaluations])}
        figures.draw_lines(axes, series, x_label="step", y_label="validation score")

    drawn = [figures.draw_figure("loss", "Loss", "Training loss, averaged over steps, and validation loss.", draw_loss)]
    if evaluations:
        caption = "Validation scores; the band is the 95 % interval of the accuracy."
        drawn.append(figures.draw_figure("accuracy", "Accuracy", caption, draw_accuracy))
    drawn += [
        figures.draw_figure(
            "learning_rate",
            "Learning rate",
            "Learning rate of each step.",
            lambda axes: figures.draw_lines(axes, {"lr": (lr_x, learning_rates)}, x_label="step", y_label="learning rate"),
        ),
        figures.draw_figure(
            "throughput",
            "Throughput",
            "Real tokens of all ranks per second of training steps.",
            lambda axes: figures.draw_lines(axes, {"tokens/s": (rate_x, rates)}, x_label="step", y_label="tokens/s"),
        ),
    ]
    rows = [
        (
            str(event["epoch"]),
            f"{event['step']:,}",
            format_score(_number(event["accuracy"])),
            format_score(_number(event["macro_f1"])),
            format_score(_number(event["loss"])),
        )
        for event in evaluations
    ]
    tables = (make_table(("epoch", "step", "accuracy", "macro F1", "loss"), rows, title="Evaluations"),) if rows else ()
    notes = tuple(f"Attempt {event['attempt']} continued from step {event['step']:,}." for event in run.events_of("Resumed"))
    return Section("curves", "Training", f"{count_noun(len(steps), 'step')} in the event log.", tables, tuple(drawn), notes)


def average_steps(steps: Sequence[Fields], key: str, *, per: str | None = None) -> tuple[list[float], list[float]]:
    """Return (steps, values) of a curve, averaged over blocks of steps where there are too many; null becomes NaN.

    `per`: divide the sum of a block by the sum of this field.
    """
    number_N = np.array([event["step"] for event in steps], np.float64)
    value_N = np.array([_number(event[key]) for event in steps])
    weight_N = np.ones(len(steps)) if per is None else np.array([_number(event[per]) for event in steps])
    blocks = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
    values = [float(value_N[ids].sum() / weight_N[ids].sum()) if weight_N[ids].sum() > 0 else float("nan") for ids in blocks]
    return [float(number_N[ids].mean()) for ids in blocks], values


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def time_section(run: StoredRun, analysis: Fields) -> Section | None:
    """Build the table of where the time went; None: the run has no result."""
    if run.result is None or "seconds" not in run.result:
        return None
    rows = list_stages(run, analysis)
    total = run.result["seconds"]["total"]
    cells = [
        (
            name,
            f"{seconds:,.1f}",
            format_percent(seconds / total) if total else "-",
            "-" if limit is None else f"{limit:,.1f}",
            why,
        )
        for name, seconds, limit, why in rows
    ]
    header = ("part", "seconds", "share", "limit, s", "the limit is")
    table = make_table(header, [*cells, ("total", f"{total:,.1f}", "100.0 %", "-", "")])
    bars = [(name, seconds, limit) for name, seconds, limit, _ in rows]
    figure = figures.draw_figure(
        "time",
        "Where the time went",
        "Seconds by part, over all attempts; a mark is the limit of its part.",
        lambda axes: figures.draw_bars(axes, bars, x_label="seconds"),
    )
    rate = run.result.get("tokens_per_second")
    lead = f"{format_duration(total)} in all" + (f", {rate:,.0f} tokens/s in training." if rate else ".")
    return Section("time", "Where the time went", lead, (table,), (figure,))


def list_stages(run: StoredRun, analysis: Fields) -> list[tuple[str, float, float | None, str]]:
    """Return (part, seconds, limit or None, meaning of the limit) of every part of the run."""
    assert run.result is not None
    seconds = run.result["seconds"]
    saving = sum(_number(event["stall"]) for event in run.events_of("CheckpointSaved"))
    training = max(0.0, seconds["train"] - seconds["prefix"])
    efficiency = run.result.get("critical_path_efficiency")
    frozen_limit = analysis.get("frozen_limit_seconds")
    if frozen_limit is not None and frozen_limit > seconds["prefix"]:
        frozen_limit = None  # features of an earlier run were read
    known = seconds["setup"] + seconds["tokenize"] + seconds["train"] + seconds["eval"] + saving
    return [
        ("start", seconds["setup"], None, ""),
        ("tokenise", seconds["tokenize"], None, ""),
        ("frozen part", seconds["prefix"], frozen_limit, "its matrix products at the measured rate" if frozen_limit else ""),
        (
            "training",
            training,
            training * efficiency if efficiency else None,
            "the same steps without padding and waiting ranks" if efficiency else "",
        ),
        ("evaluation", seconds["eval"], None, ""),
        ("saving", saving, None, ""),
        ("rest", max(0.0, seconds["total"] - known), None, ""),
    ]


def batch_section(run: StoredRun) -> Section | None:
    """Build the table of the batches: padding and balance of the ranks."""
    result = run.result
    if result is None or result.get("padding_efficiency") is None:
        return None
    size = result.get("global_batch_size")
    rows = [
        ("steps", f"{result['num_steps']:,}"),
        ("ranks", f"{result['num_ranks']:,}"),
        ("global batch", f"{size:,} texts" if size else f"at most {result['global_token_budget']:,} tokens"),
        ("real tokens of computed tokens", format_percent(result["padding_efficiency"])),
        ("mean rank of slowest rank", format_percent(result["rank_balance"])),
        ("real tokens of what ranks compute or wait for", format_percent(result["critical_path_efficiency"])),
    ]
    return Section("batches", "Batches", "", (make_table(("fact", "value"), rows),))


def data_section(run: StoredRun, analysis: Fields) -> Section | None:
    """Build the summary of the data; None: the rows were not read."""
    data: Fields | None = analysis.get("data")
    if data is None:
        return None
    splits: Sequence[Fields] = data["splits"]
    has_lengths = all("mean_length" in split for split in splits)
    tables = [_split_table(splits, data["max_length"], has_lengths=has_lengths)]
    names = list(run.class_names) or [str(i) for i in range(len(splits[0]["class_counts"] or []))]
    if len(names) <= 50:
        counted = [split for split in splits if split["class_counts"] is not None]
        rows = [(name, *(f"{split['class_counts'][i]:,}" for split in counted)) for i, name in enumerate(names)]
        tables.append(make_table(("class", *(split["name"] for split in counted)), rows, title="Rows of every class"))
    findings = [(each["what"], each["where"], each["why"], each["fix"]) for each in data["findings"]]
    if findings:
        header = ("found", "where", "why it matters", "what to do")
        tables.append(make_table(header, findings, title="Duplicates, leaks and other findings", is_wide_text=True))
    drawn: tuple[figures.FigureFiles, ...] = ()
    if has_lengths:
        drawn = (_draw_lengths(splits),)
    notes = () if findings else ("No duplicates, no texts in two splits, no classes without rows.",)
    return Section("data", "Data", "", tuple(tables), drawn, notes)


def _split_table(splits: Sequence[Fields], max_length: int, *, has_lengths: bool) -> Table:
    header = ["split", "rows"]
    rows: list[list[str]] = [[split["name"], f"{split['num_rows']:,}"] for split in splits]
    note = ""
    if has_lengths:
        header += ["mean tokens", "5 %", "median", "95 %", "longest", "truncated"]
        for row, split in zip(rows, splits, strict=True):
            quantiles = [f"{value:.0f}" for value in split["length_quantiles"]]
            row += [f"{split['mean_length']:.1f}", *quantiles, str(split["max_length"]), f"{split['num_truncated']:,}"]
        note = f"Texts are truncated to {max_length:,} tokens."
    return make_table(header, rows, note=note)


def _draw_lengths(splits: Sequence[Fields]) -> figures.FigureFiles:
    def draw(axes: "figures.Axes") -> None:
        for number, split in enumerate(splits):
            counts, edges = split["length_histogram"]
            colour = figures.COLOURS[figures.SERIES[number % len(figures.SERIES)]]
            axes.stairs(
                [count / max(1, sum(counts)) for count in counts], edges, color=colour, label=split["name"], linewidth=1.4
            )
        axes.set_xlabel("tokens of a text")
        axes.set_ylabel("share of texts")
        axes.legend()

    return figures.draw_figure("lengths", "Lengths", "Tokens per text, by split.", draw)


def settings_section(run: StoredRun, analysis: Fields) -> Section:
    """Build what is needed to repeat the run: settings, versions, machine, fingerprints, command."""
    started: Mapping[str, str] = next((event["facts"] for event in reversed(run.events_of("RunStarted"))), {})
    result: Mapping[str, Mapping[str, str]] = run.result or {}
    num_ranks = int((run.result or {}).get("num_ranks") or 1)
    tables = [
        make_table(
            ("setting", "value"),
            [(key, _format_setting(value)) for key, value in run.changed.items()],
            title="Settings that differ from the defaults",
        ),
        make_table(("fact", "value"), [("host", str(run.status.get("host", "-"))), *started.items()], title="The run"),
        make_table(
            ("library", "version"), {**result.get("versions", {}), **analysis.get("versions", {})}.items(), title="Versions"
        ),
        make_table(("input", "sha256"), result.get("fingerprints", {}).items(), title="Fingerprints"),
    ]
    note, command = (run.result or {}).get("note"), repeat_command(run, num_ranks, started.get("ranks", ""))
    return Section(
        "settings",
        "Settings and machine",
        note or "The command trains the same again, under another name. With several nodes, each of them takes it.",
        tuple(table for table in tables if table.rows),
        command="" if note else command,
    )


def repeat_command(run: StoredRun, num_ranks: int, ranks: str) -> str:
    """Return the command that trains the same again, under another name.

    `ranks`: the fact of the header, such as `16 (8 per node), DDP`. With several nodes the command is for each of them.
    """
    found = re.match(r"(\d+) \((\d+) per node\)", ranks)
    per_node = int(found[2]) if found and int(found[1]) == num_ranks else num_ranks
    start = "python -m"
    if num_ranks > per_node:
        start = (
            f"torchrun --nnodes={num_ranks // per_node} --nproc_per_node={per_node} --rdzv_backend=c10d "
            "--rdzv_endpoint=FIRST_NODE:29500 -m"
        )
    elif num_ranks > 1:
        start = f"torchrun --nproc_per_node={num_ranks} -m"
    config = shlex.quote(str(run.directory.resolve() / "config.yaml"))
    return f"{start} agnews_dist.train --config {config} --run.name {shlex.quote(f'{run.name}-again')}"


def _format_setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_setting, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
