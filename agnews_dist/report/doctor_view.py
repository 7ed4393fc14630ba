"""The doctor's findings for people: one table of facts, one of memory per rank."""

from rich.console import Console
from rich.table import Table

from agnews_dist.memory import Diagnosis, gigabytes


def show_diagnosis(found: Diagnosis) -> None:
    """Print it on standard output."""
    out = Console()
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
