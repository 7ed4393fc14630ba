"""All checks of the doctor: of each rank alone, then of the ranks together, with their output. Collective."""

import os
import sys
from collections.abc import Sequence

import torch

from agnews_dist.distributed import collectives
from agnews_dist.distributed.rendezvous import open_process_group
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.engine.device import DTYPES
from agnews_dist.errors import SharedError, UserError
from agnews_dist.preflight import network, ranks
from agnews_dist.preflight.findings import (
    Finding,
    first_line,
    format_ranks,
    has_unfinished_calls,
    merge_findings,
    worst_verdict,
)
from agnews_dist.preflight.hub_check import check_hub_on_node
from agnews_dist.preflight.machine import PlannedRun, RankReport, check_rank
from agnews_dist.report.formatting import escape_text
from agnews_dist.report.result_files import print_json

MEETING_SECONDS = 120
"""Time for all ranks to come. Nodes with a cold file system load Python minutes apart."""
SAME_SOFTWARE = "Start every rank from one environment, on a file system all nodes share"
SAME_SETTINGS = "Start every rank with the same arguments and the same YAML files"


def run_checks(planned: PlannedRun, world: World, *, num_expected: int | None, as_json: bool) -> None:
    """Run all checks; rank 0 prints the findings. `num_expected`: ranks that the user named.

    Raises:
        UserError: the run would fail.
    """
    error: UserError | None = None
    report: RankReport | None = None
    try:
        form_group(world)
        report = check_rank(planned, world, check_hub_on_node(planned.list_requests, planned.list_config_requests, world))
        device = choose_device(world, report)
        reports = collectives.all_gather(report)
        together = check_together(planned, world, reports, device, num_expected)
        findings = [*merge_findings([own.findings for own in reports]), *together]
    except (UserError, RuntimeError) as failure:
        # Print this rank's own findings all the same. Only a rank that waited knows which rank did not come: all raise.
        lost = f"a rank was lost during the measurements ({first_line(failure).rstrip('. ')}): a training would fail as well. "
        lost += "Look for another rank's error above, and for a node that is overloaded or out of memory."
        error = failure if isinstance(failure, UserError) else UserError(lost)
        report = report or check_rank(
            planned, world, check_hub_on_node(planned.list_requests, planned.list_config_requests, world)
        )
        findings = merge_findings([[*report.findings, Finding("rendezvous", "fail", str(error))]])
    if world.is_main:
        print_findings(findings, report, world.num_ranks, as_json=as_json)
    if error is None and worst_verdict(findings) == "fail":
        # All ranks have the same findings. A complete error message comes first, else the names of the failed checks.
        failed = [finding for finding in findings if finding.verdict == "fail"]
        names = ", ".join(finding.check for finding in failed)
        summary = f"{len(failed)} of {len(findings)} checks failed ({names}): the run would fail. Fix these checks."
        error = SharedError(next((finding.found for finding in failed if not finding.remedy), summary), rank=0)
    if has_unfinished_calls():
        # A normal end would wait for the thread that hangs in a driver.
        if error is not None and world.is_main:
            print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(error is not None))
    if error is not None:
        raise error


def form_group(world: World) -> None:
    """Create the process group."""
    if world.num_ranks > 1:
        # By default NCCL's watchdog ends the process if a collective hangs, and all findings would be lost.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # Both: the ranks must be able to exchange findings even if the GPUs cannot.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        open_process_group(world, backend, MEETING_SECONDS)


def choose_device(world: World, report: RankReport) -> torch.device:
    """Return the device to measure: a GPU if every rank uses its own, else the CPU. Collective."""
    if not all(collectives.all_gather(report.device["device"] == "cuda")):
        return torch.device("cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def check_together(
    planned: PlannedRun, world: World, reports: Sequence[RankReport], device: torch.device, num_expected: int | None
) -> list[Finding]:
    """Compare the reports of all ranks, and measure clocks, shared files, network and speed."""
    hosts = [report.host for report in reports]
    # Before the first NCCL collective: if that hangs, the GPU may hang as well.
    dtype = DTYPES[reports[world.rank].device["precision"]] if device.type == "cuda" else torch.float32
    works = collectives.all_gather(network.measure_work(device, dtype))
    sums = network.check_sum(world, device)
    return [
        ranks.check_world(num_expected if is_launched(os.environ) else None, world, hosts, os.environ),
        ranks.compare_ranks("versions", [report.versions for report in reports], SAME_SOFTWARE),
        ranks.compare_ranks("configuration", [report.settings for report in reports], SAME_SETTINGS),
        ranks.judge_devices([report.device for report in reports]),
        ranks.judge_cores(reports),
        network.judge_clocks(network.measure_clock_offsets(world), hosts),
        ranks.check_shared(planned.run_dir, world, hosts),
        sums,
        *([network.check_pairs(world, device, hosts)] if sums.verdict == "ok" else []),
        network.judge_work(works, hosts, [len(report.cores.allowed) for report in reports]),
    ]


def print_findings(findings: Sequence[Finding], report: RankReport, num_ranks: int, *, as_json: bool) -> None:
    """Print one line per finding, or a JSON object with rank 0's memory estimate."""
    if as_json:
        result = {"verdict": worst_verdict(findings), "findings": findings, **report.memory}
        print_json(result)
        return
    for finding in findings:
        who = "" if len(finding.ranks) in (0, num_ranks) else f" ({format_ranks(finding.ranks)})"
        remedy = f"\n      -> {finding.remedy}" if finding.remedy else ""
        row = f"{finding.verdict:4}  {finding.check}{who}: {finding.found}{remedy}"
        print(escape_text(row, sys.stdout.encoding))
    verdicts = [finding.verdict for finding in findings]
    print(f"{verdicts.count('fail')} failure(s), {verdicts.count('warn')} warning(s).")
