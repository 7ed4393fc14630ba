"""The doctor's output for people: a table of findings and one of memory."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from agnews_dist.preflight.findings import Finding, format_ranks
from agnews_dist.preflight.memory_check import Diagnosis
from agnews_dist.storage.capacity import gigabytes

STYLES = {"ok": None, "warn": "yellow", "fail": "bold red"}


def print_checkup(findings: Sequence[Finding], diagnosis: Diagnosis | None, num_ranks: int) -> None:
    """Print the tables on standard output."""
    # A log file has no width, and rich's default of 80 columns would break paths.
    console = Console(width=None if sys.stdout.isatty() else 120)
    checks = Table("check", "verdict", "ranks", "found", title="checks", title_justify="left")
    for finding in findings:
        text = f"{finding.found}\n-> {finding.remedy}" if finding.remedy else finding.found
        row = (finding.check, finding.verdict, format_ranks(finding.ranks, num_ranks), text)
        # Paths and errors may contain brackets, which rich reads as markup.
        checks.add_row(*(cell.replace("[", r"\[") for cell in row), style=STYLES[finding.verdict])
    console.print(checks)
    if diagnosis is not None:
        console.print(_build_memory_table(diagnosis))
        if diagnosis.problem is None:
            console.print("It fits.")
    verdicts = [finding.verdict for finding in findings]
    console.print(f"{verdicts.count('fail')} failure(s), {verdicts.count('warn')} warning(s).")


def _build_memory_table(diagnosis: Diagnosis) -> Table:
    estimate = diagnosis.estimate
    table = Table(title=f"memory per rank, {diagnosis.setting}", title_justify="left")
    for name in ("part", "on the device", "in host memory"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in dict.fromkeys([*estimate.device, *estimate.host]):
        sizes = (estimate.device.get(part), estimate.host.get(part))
        table.add_row(part, *("" if size is None else gigabytes(size) for size in sizes))
    table.add_section()
    table.add_row("all", gigabytes(estimate.device_bytes), gigabytes(estimate.host_bytes) if estimate.host else "")
    table.add_row("free", gigabytes(diagnosis.free_device), gigabytes(diagnosis.free_host) if estimate.host else "")
    return table
