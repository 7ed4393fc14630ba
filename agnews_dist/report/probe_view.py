"""The table of a probe on standard output, with its conclusion."""

import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from agnews_dist.evaluation.layer_probes import Conclusion, LayerScore
from agnews_dist.report.formatting import can_draw, create_output
from agnews_dist.report.pages.probe_page import CAVEAT, HEADER, POOLING_NAMES, RULE, explain, list_cells


def show_probe(scores: Sequence[LayerScore], conclusions: Sequence[Conclusion], num_rows: int) -> None:
    """Print the scores of every layer, pooling by pooling, and the conclusion.

    A terminal gets the best layers in bold. Elsewhere columns are padded, without control codes.
    """
    out = create_output(sys.stdout)
    rows = list_cells(scores)
    if can_draw(out):
        # As Text: rich would interpret [brackets] in a string as markup.
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for name in HEADER:
            table.add_column(Text(name), justify="left" if name in ("layer", "pooling", "against the best") else "right")
        for cells in rows:
            style = "bold" if "best" in cells else "dim" if "worse" in cells else ""
            table.add_row(*map(Text, cells), style=style)
        out.print(table)
    else:
        widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
        for cells in (HEADER, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    main, *others = conclusions
    best = [(POOLING_NAMES[each.best.view.pooling], each.best) for each in others]
    texts = [f"The {name} is best at layer {each.view.layer_name}, with {each.accuracy:.4f}." for name, each in best]
    for text in ("", explain(main, num_rows), *texts, f"{RULE} {CAVEAT}"):
        if can_draw(out):
            out.print(Text(text))
        else:
            print(text)  # in one line, for scripts
