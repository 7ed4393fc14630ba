"""The doctor's findings for people: one table of verdicts, one of facts, one of memory per rank."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from agnews_dist.engine.memory import Diagnosis
from agnews_dist.preflight.findings import Finding, rank_words, worst
from agnews_dist.storage.capacity import gigabytes

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Checkup:
    """All that the doctor found."""

    findings: Sequence[Finding]
    diagnosis: Diagnosis | None
    """None: there is no such model."""
    expected_seconds: float | None
    num_ranks: int

    def to_dict(self) -> Mapping[str, object]:
        """For JSON."""
        memory = self.diagnosis.to_dict() if self.diagnosis is not None else {"fits": False}
        return {
            "verdict": worst(self.findings),
            "findings": [finding.to_dict() for finding in self.findings],
            "expected_seconds": self.expected_seconds,
            **memory,
        }


def show_checkup(found: Checkup) -> None:
    """Print it on standard output."""
    # A log file has no width; 80 columns would break every path.
    out = Console(width=None if sys.stdout.isatty() else 120)
    checks = Table(title="checks", title_justify="left")
    for name in ("check", "verdict", "ranks", "found"):
        checks.add_column(name)
    for finding in found.findings:
        told = f"{finding.found}\n-> {finding.remedy}" if finding.remedy else finding.found
        # Words of paths and errors, not markup.
        row = (finding.check, finding.verdict, rank_words(finding.ranks, found.num_ranks), told)
        checks.add_row(
            *(cell.replace("[", r"\[") for cell in row), style=STYLES[finding.verdict] if finding.remedy else None
        )
    out.print(checks)
    if found.diagnosis is not None:
        show_diagnosis(found.diagnosis, out)
    if found.expected_seconds is not None:
        out.print(
            f"The configured training will take about {_duration(found.expected_seconds)} on ranks like these, give or take a "
            "factor of two."
        )
    counts = {verdict: sum(finding.verdict == verdict for finding in found.findings) for verdict in ("fail", "warn")}
    out.print(f"{counts['fail']} failure(s), {counts['warn']} warning(s).")


def show_diagnosis(found: Diagnosis, out: Console) -> None:
    """Versions and machine, and memory by part."""
    facts = Table(title="what is here", show_header=False, title_justify="left")
    for name, value in found.facts.items():
        facts.add_row(name, value)
    out.print(facts)
    memory = Table(title=f"memory per rank, {found.setting}", title_justify="left")
    memory.add_column("part")
    memory.add_column("on the device", justify="right")
    memory.add_column("in host memory", justify="right")
    estimate = found.estimate
    for part in dict.fromkeys([*estimate.device, *estimate.host]):
        places = (estimate.device.get(part), estimate.host.get(part))
        memory.add_row(part, *("" if size is None else gigabytes(size) for size in places))
    memory.add_section()
    memory.add_row("all", gigabytes(estimate.device_bytes), gigabytes(estimate.host_bytes) if estimate.host else "")
    memory.add_row("free", gigabytes(found.free_device), gigabytes(found.free_host) if estimate.host else "")
    out.print(memory)
    if found.problem is None:
        out.print("It fits.")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
