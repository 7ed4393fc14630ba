"""Check whether a training would run here: `python -m agnews_dist doctor`, alone or under torchrun.

Every rank checks its machine, the disks and the model's config. Then the ranks meet, compare facts and measure each other.
Loads no weights and no data. Exit code 1: the run would fail. Takes the options of a training, and:

--ranks            alone: ranks of the planned training; under a launcher: expected number of ranks
--ranks_per_node   ranks of the planned training on one node; default: all
--json             one JSON object on standard output
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from agnews_dist.commands.command import TRAINING_OPTIONS, run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.errors import ConfigError, SharedError, UserError

if TYPE_CHECKING:
    from agnews_dist.config.schema import Config
    from agnews_dist.preflight.findings import Finding
    from agnews_dist.preflight.machine import PlannedRun

OPTIONS = (
    *TRAINING_OPTIONS,
    cli.Option("--ranks", type=int | None, help="Ranks of the training; under a launcher: expected number of ranks."),
    cli.Option("--ranks_per_node", type=int | None, help="Ranks on one node; default: all of --ranks."),
    cli.Option("--json", type=bool, default=False, help="Print one JSON object instead of tables."),
)
MEETING_SECONDS = 120
"""Time for all ranks to come. Nodes with a cold file system load Python minutes apart."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("doctor", argv, run, OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """Run all checks; rank 0 prints the findings.

    Raises:
        UserError: the run would fail.
    """
    planned_world = _planned_world(world, loaded)
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    from agnews_dist.preflight.disks import remove_empty
    from agnews_dist.preflight.findings import Finding, has_unfinished_calls, merge_findings, worst_verdict
    from agnews_dist.preflight.machine import check_rank
    from agnews_dist.preflight.runner import check_job, form_group
    from agnews_dist.preflight.view import print_checkup

    planned = _plan_run(loaded.config, planned_world)
    report = check_rank(planned, world)
    error: UserError | None = None
    try:
        device = form_group(world, report, MEETING_SECONDS)
        by_rank, together = check_job(planned, world, report, device, loaded.options["ranks"])
        findings = [*merge_findings(by_rank), *together]
    except (UserError, RuntimeError) as failure:
        # Print this rank's own findings all the same. Only a rank that waited knows which rank did not come: all raise.
        error = failure if isinstance(failure, UserError) else _explain_lost_rank(failure)
        findings = merge_findings([[*report.findings, Finding(check="rendezvous", verdict="fail", found=str(error))]])
    remove_empty(report.created)  # after the last rank has written
    if world.is_main:
        if loaded.options["json"]:
            memory = report.diagnosis.to_dict() if report.diagnosis is not None else {"fits": False}
            result = {"verdict": worst_verdict(findings), "findings": [asdict(each) for each in findings], **memory}
            print(json.dumps(result, indent=2, allow_nan=False))
        else:
            print_checkup(findings, report.diagnosis, world.num_ranks)
    if error is None and worst_verdict(findings) == "fail":
        # All ranks have the same findings.
        error = SharedError(_summarise_failures(findings), rank=0)
    if has_unfinished_calls():
        _exit_now(error if world.is_main else None, code=int(error is not None))
    if error is not None:
        raise error


def _plan_run(config: "Config", world: World) -> "PlannedRun":
    from agnews_dist.preflight.machine import PlannedRun
    from agnews_dist.run.engine_setup import check_engine
    from agnews_dist.run.fingerprints import weight_settings
    from agnews_dist.run.memory_setup import build_memory_setup
    from agnews_dist.storage.directories import cache_root

    engine, model = config.engine, config.model
    compared = {"engine.backend": engine.backend, "engine.zero_stage": engine.zero_stage}
    return PlannedRun(
        world=world,
        model_name=model.name,
        revision=model.revision,
        init=model.init,
        source=config.data.source,
        device=engine.device,
        precision=engine.precision,
        compile=engine.compile,
        run_dir=Path(config.run.dir),
        cache_dir=cache_root(config.data.cache_dir),
        num_checkpoints=config.checkpoint.keep,
        feature_bytes=int(engine.feature_cache_gigabytes * 1e9) if engine.feature_cache == "disk" else 0,
        settings={**weight_settings(config), **compared},
        check_engine=partial(check_engine, config, world),
        read_memory_setup=partial(build_memory_setup, config, world),
    )


def _planned_world(world: World, loaded: cli.Loaded) -> World:
    """Return the ranks of the planned training: those of this launch, or those of the options."""
    ranks, per_node = loaded.options["ranks"], loaded.options["ranks_per_node"]
    for name, value in (("--ranks", ranks), ("--ranks_per_node", per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: a training has at least one rank. Set it to 1 or more.")
    if ranks is None or is_launched(os.environ):
        return world
    if per_node is not None and per_node > ranks:
        raise ConfigError(
            f"--ranks_per_node {per_node} with --ranks {ranks}: a node cannot have more ranks than there are. Lower the first."
        )
    return World(num_ranks=ranks, ranks_per_node=per_node or ranks)


def _summarise_failures(findings: "Sequence[Finding]") -> str:
    """Return the first complete error message, else the names of the failed checks."""
    failed = [finding for finding in findings if finding.verdict == "fail"]
    names = ", ".join(finding.check for finding in failed)
    summary = f"{len(failed)} of {len(findings)} checks failed ({names}): the run would fail. Fix these checks."
    return next((finding.found for finding in failed if not finding.remedy), summary)


def _explain_lost_rank(error: RuntimeError) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"a rank was lost during the measurements ({lines[0].rstrip('. ')}): a training would fail as well. Look for another "
        "rank's error above, and for a node that is overloaded or out of memory."
    )


def _exit_now(error: Exception | None, code: int) -> NoReturn:
    """End the process although a thread hangs in a driver; a normal exit would wait for it."""
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
