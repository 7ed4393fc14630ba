"""Will it run here, and what will it take? `python -m agnews_dist doctor`, alone, under torchrun, or under a bare `srun`.

Every rank looks at its machine, at the disks and at the model's config; then the ranks meet, compare, and measure each other.
Loads no weights and no data. Ends with 1 if the run would fail or go astray. Besides these it takes all that a training takes.

--ranks            alone: ranks of the training that is asked about; under a launcher: how many there should be
--ranks_per_node   of them on one node; default: all, or those of this launch
--json             one JSON object on standard output
--endpoint         HOST:PORT where torchrun's agents are to meet: only whether this node can, at once; with --nodes, --node
--print_interface  with --endpoint: the interface and own address on the way there, for scripts
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from agnews_dist.commands.command import TRAINING_OPTIONS, run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World, is_launched, ranks_of_srun
from agnews_dist.errors import ConfigError, SharedError, UserError

if TYPE_CHECKING:
    from agnews_dist.preflight.findings import Finding
    from agnews_dist.preflight.machine import RankReport

OPTIONS = (
    *TRAINING_OPTIONS,
    cli.Option("--ranks", type=int | None, help="Ranks of the training; under a launcher: how many there should be."),
    cli.Option("--ranks_per_node", type=int | None, help="Ranks of them on one node; default: all of --ranks."),
    cli.Option("--json", type=bool, default=False, help="Print one JSON object instead of the tables for people."),
    cli.Option("--endpoint", help="HOST:PORT where the nodes are to meet: check that alone, without loading torch."),
    cli.Option("--nodes", type=int, default=1, help="With --endpoint: how many nodes there are."),
    cli.Option("--node", type=int, default=0, help="With --endpoint: which of them this is; they meet at 0."),
    cli.Option("--print_interface", type=bool, default=False, help="With --endpoint: print interface and own address."),
)
MEETING_SECONDS = 120
"""Nodes come apart by what a cold file system takes to load Python; a rank that dies is missed for as long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code."""
    # A training needs torchrun's restarts; to look around, srun's own numbers do.
    os.environ.update(ranks_of_srun(os.environ))
    return run_command("doctor", argv, run, OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """Look, compare, measure; rank 0 shows what was found.

    Raises:
        UserError: something would keep the run from working.
    """
    if loaded.options["endpoint"] is not None:
        _look_at_meeting(loaded)
        return
    config, asked = loaded.config, _asked(world, loaded)
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    from agnews_dist.preflight.disks import remove_empty
    from agnews_dist.preflight.findings import Finding, is_anything_left_behind, merged, worst
    from agnews_dist.preflight.machine import check_rank
    from agnews_dist.preflight.runner import check_job, meet
    from agnews_dist.preflight.view import Checkup, show_checkup

    here = check_rank(config, asked, world)
    expected, apart = None, None
    try:
        device = meet(world, here, MEETING_SECONDS)
        by_rank, together, expected = check_job(config, asked, world, here, device, loaded.options["ranks"])
        findings = [*merged(by_rank), *together]
    except (UserError, RuntimeError) as unmet:
        # What this rank found alone is told all the same.
        apart = unmet if isinstance(unmet, UserError) else _fell_apart(unmet)
        findings = merged([[*here.findings, Finding(check="rendezvous", verdict="fail", found=str(apart))]])
    remove_empty(here.made)  # now that nobody writes there any more
    if world.is_main:
        checkup = Checkup(findings, here.diagnosis, expected, world.num_ranks)
        if loaded.options["json"]:
            print(json.dumps(checkup.to_dict(), indent=2, allow_nan=False))
        else:
            show_checkup(checkup)
    error = apart  # on every rank that waited: who did not come is only known there
    if error is None and worst(findings) == "fail":
        error = SharedError(_problem(here, findings), rank=0)  # the findings are the same on all ranks that have met
    if is_anything_left_behind():
        _leave(error if world.is_main else None, code=int(error is not None))
    if error is not None:
        raise error


def _problem(here: "RankReport", findings: "Sequence[Finding]") -> str:
    """The one error of the model or its memory in its own words, else which checks failed."""
    if here.error is not None:
        return str(here.error)
    if here.diagnosis is not None and here.diagnosis.problem is not None:
        return here.diagnosis.problem
    failed = [finding.check for finding in findings if finding.verdict == "fail"]
    return (
        f"{len(failed)} of {len(findings)} checks failed ({', '.join(failed)}): the run would break off or go astray. Mend "
        "what the table says beside each."
    )


def _fell_apart(error: RuntimeError) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"the ranks lost each other while they measured ({lines[0].rstrip('. ')}): a training would break off as well. Look "
        "for another rank's error above, and for a node that is overloaded or out of memory."
    )


def _leave(error: Exception | None, code: int) -> NoReturn:
    """Although a thread hangs in a driver, for which an orderly end would wait."""
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _look_at_meeting(loaded: cli.Loaded) -> None:
    """One line for people, or interface and address for a script.

    Raises:
        UserError: this node cannot meet the others.
    """
    from agnews_dist.preflight.rendezvous_check import look, parse_endpoint, route

    options = loaded.options
    meeting = parse_endpoint(options["endpoint"], num_nodes=options["nodes"], node=options["node"])
    if options["print_interface"]:
        print(*route(meeting))
        return
    finding = look(meeting)
    if finding.verdict == "fail":
        raise UserError(f"rendezvous: {finding.found}. {finding.remedy}.")
    if finding.verdict == "warn":
        print(f"warning: rendezvous: {finding.found}. {finding.remedy}.", file=sys.stderr)


def _asked(world: World, loaded: cli.Loaded) -> World:
    """The ranks of the training that is asked about."""
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
