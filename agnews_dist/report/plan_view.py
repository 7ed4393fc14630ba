"""One screen for a forecast: facts about the batches, and the lengths of the texts as bars."""

from collections.abc import Mapping, Sequence

import rich.console
from rich.table import Table
from rich.text import Text

from agnews_dist.data.batching.forecast import Bin, Forecast, Spread
from agnews_dist.report.formatting import can_draw, create_table, escape_text, format_ratio, lay_out_facts

_MIN_BAR_WIDTH = 4
"""Fewer columns are too few for bars."""


def show_plan(
    plan: Forecast, *, title: str, data_facts: Mapping[str, str], num_truncated: int, max_length: int, out: rich.console.Console
) -> None:
    """Print the forecast in the width of `out`; plain ASCII unless `out` is a terminal with Unicode.

    `data_facts`: how the data was read, as in the header of a run.
    """
    for part in (
        Text(escape_text(title, out.encoding), style="bold", overflow="fold"),
        lay_out_facts({**data_facts, **_list_facts(plan, num_truncated, max_length)}, out.encoding),
        Text(),
        _draw_bars(plan.histogram, width=out.width, in_blocks=can_draw(out)),
    ):
        out.print(part, highlight=False)


def _list_facts(plan: Forecast, num_truncated: int, max_length: int) -> dict[str, str]:
    num_texts, settings = plan.num_examples, plan.settings
    mean = plan.num_tokens / max(1, num_texts)
    budget, window = settings.global_token_budget, settings.bucket_window
    batch = f"{settings.global_batch_size:,} texts" if budget is None else f"at most {budget:,} tokens"
    span = "the whole epoch" if window == "epoch" else f"{window:,} batches"
    ratios, texts = plan.efficiency, plan.examples_per_step
    tokens, micro = plan.tokens_per_step, plan.micro_batches_per_step
    facts = {
        "data": f"{num_texts:,} texts, {plan.num_tokens:,} tokens per epoch (mean {mean:.1f}, longest {plan.longest:,})",
        "cut off": f"{num_truncated:,} texts ({num_truncated / max(1, num_texts):.2%}), at {max_length:,} tokens",
        "batches": f"{batch} over all ranks, sorted within {span}",
        "steps": f"{plan.num_steps_per_epoch:,} per epoch, {plan.num_steps:,} in all",
        "per step": f"{_format_spread(texts)} texts, {_format_spread(tokens)} tokens",
        "per rank": f"micro-batches per step: {_format_spread(micro)}; steps without a text: {plan.idle_share:.1%}",
        "efficiency": f"critical path {format_ratio(ratios.critical_path)}, padding {format_ratio(ratios.padding)}, "
        f"balance {format_ratio(ratios.rank_balance)}",
    }
    if plan.num_steps_measured < plan.num_steps:
        facts["measured"] = f"on the first {plan.num_steps_measured:,} steps"
    return facts


def _format_spread(figure: Spread) -> str:
    """Format as `31.9 (7-32)`, or as one value if all are equal."""
    return f"{figure.min:,}" if figure.min == figure.max else f"{figure.mean:,.1f} ({figure.min:,}-{figure.max:,})"


def _draw_bars(bins: Sequence[Bin], *, width: int, in_blocks: bool) -> Table:
    labels = [(f"{each.first:,}-{each.last:,}", f"{each.num_texts:,}") for each in bins]
    bar_width = width - sum(max(map(len, column)) + 2 for column in zip(("tokens", "texts"), *labels, strict=True))
    most = max((each.num_texts for each in bins), default=0)
    table = create_table(("tokens", "texts"), right=("tokens", "texts"))
    has_bars = bar_width >= _MIN_BAR_WIDTH
    if has_bars:
        table.add_column(no_wrap=True, style="cyan")
    for each, (lengths, count) in zip(bins, labels, strict=True):
        bars = [Text(draw_bar(each.num_texts / most * bar_width, in_blocks=in_blocks))] if has_bars else []
        table.add_row(Text(lengths), Text(count), *bars)
    return table


def draw_bar(length: float, *, in_blocks: bool) -> str:
    """Draw a bar of `length` columns, in eighths of a block or in whole `#`; any length above 0 is visible.

    >>> draw_bar(2.5, in_blocks=True), draw_bar(2.5, in_blocks=False), draw_bar(0.01, in_blocks=False)
    ('\u2588\u2588\u258c', '##', '#')
    """
    if not in_blocks:
        return "#" * (max(1, round(length)) if length else 0)
    eighths = max(1, round(length * 8)) if length else 0
    return "\u2588" * (eighths // 8) + "\u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8 - 1 : eighths % 8]
