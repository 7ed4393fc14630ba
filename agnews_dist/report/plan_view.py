"""A plan as one screen: facts, what other batches would cost, and the lengths of the texts as bars."""

from collections.abc import Mapping, Sequence

import rich.console
from rich.table import Table
from rich.text import Text

from agnews_dist.data.batching.forecast import Bin, Forecast, Spread
from agnews_dist.report.console import draws
from agnews_dist.report.formatting import share, visible

_LEAST_BAR = 4
"""Columns below which bars tell nothing."""


def show_plan(plan: Forecast, *, title: str, num_truncated: int, max_length: int, out: rich.console.Console) -> None:
    """Print it to `out`, as wide as that is; plain ASCII where that is no terminal, or one without Unicode."""
    facts = _facts(plan, num_truncated=num_truncated, max_length=max_length)
    for part in (
        Text(visible(title, out.encoding), style="bold", overflow="fold"),
        _grid(facts),
        Text(),
        _comparison(plan),
        Text(),
        _bars(plan.histogram, width=out.width, in_blocks=draws(out)),
    ):
        out.print(part, highlight=False)


def _facts(plan: Forecast, *, num_truncated: int, max_length: int) -> dict[str, str]:
    num_texts, settings = plan.num_examples, plan.settings
    mean = plan.num_tokens / max(1, num_texts)
    budget, window = settings.global_token_budget, settings.bucket_window
    batch = f"{settings.global_batch_size:,} texts" if budget is None else f"at most {budget:,} tokens"
    reach = "the whole epoch" if window == "epoch" else f"{window:,} batches"
    texts, tokens, micro = plan.examples_per_step, plan.tokens_per_step, plan.micro_batches_per_step
    facts = {
        "data": f"{num_texts:,} texts, {plan.num_tokens:,} tokens per epoch (mean {mean:.1f}, longest {plan.longest:,})",
        "cut off": f"{num_truncated:,} texts ({num_truncated / max(1, num_texts):.2%}), at {max_length:,} tokens",
        "batches": f"{batch} over all ranks, sorted within {reach}",
        "steps": f"{plan.num_steps_per_epoch:,} per epoch, {plan.num_steps:,} in all",
        "per step": f"{_span(texts)} texts, {_span(tokens)} tokens",
        "per rank": f"micro-batches per step: {_span(micro)}; steps without a text: {plan.idle_share:.1%}",
    }
    if plan.num_steps_dealt < plan.num_steps:
        facts["measured"] = f"on the first {plan.num_steps_dealt:,} steps"
    return facts


def _span(figure: Spread) -> str:
    """`31.9 (7-32)`, or the one value that it always has."""
    if figure.min == figure.max:
        return f"{figure.min:,}"
    return f"{figure.mean:,.1f} ({figure.min:,}-{figure.max:,})"


def _grid(facts: Mapping[str, str]) -> Table:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", overflow="fold")
    rows.add_column(overflow="fold")
    for label, value in facts.items():
        rows.add_row(Text(label), Text(value))
    return rows


def _comparison(plan: Forecast) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(Text("efficiency"), overflow="fold")
    for name in ("critical path", "padding", "balance"):
        table.add_column(Text(name), justify="right", overflow="fold")
    for name, figures, style in (
        ("this plan", plan.efficiency, "bold green"),
        ("bucket_window epoch", plan.limit, ""),
        ("bucket_window 1 (random batches)", plan.random, ""),
        ("random, equal rows per rank", plan.equal_counts, ""),
    ):
        cells = (share(figures.critical_path), share(figures.padding), share(figures.rank_balance))
        table.add_row(Text(name), *map(Text, cells), style=style)
    return table


def _bars(bins: Sequence[Bin], *, width: int, in_blocks: bool) -> Table:
    labels = [(f"{each.first:,}-{each.last:,}", f"{each.num_texts:,}") for each in bins]
    room = width - sum(max(map(len, column)) + 2 for column in zip(("tokens", "texts"), *labels, strict=True))
    most = max((each.num_texts for each in bins), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(Text("tokens"), justify="right", overflow="fold")
    table.add_column(Text("texts"), justify="right", overflow="fold")
    has_bars = room >= _LEAST_BAR
    if has_bars:
        table.add_column(no_wrap=True, style="cyan")
    for each, (span, count) in zip(bins, labels, strict=True):
        bars = [Text(bar(each.num_texts / most * room, in_blocks=in_blocks))] if has_bars else []
        table.add_row(Text(span), Text(count), *bars)
    return table


def bar(length: float, *, in_blocks: bool) -> str:
    """A bar of `length` columns, in eighths where those can be drawn; the least one shows for anything above 0.

    >>> bar(2.5, in_blocks=True), bar(2.5, in_blocks=False), bar(0.01, in_blocks=False), bar(0.0, in_blocks=False)
    ('\u2588\u2588\u258c', '##', '#', '')
    """
    if not in_blocks:
        return "#" * (max(1, round(length)) if length else 0)
    eighths = max(1, round(length * 8)) if length else 0
    return "\u2588" * (eighths // 8) + "\u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8 - 1 : eighths % 8]
