"""A campaign of faults in every communication between two ranks; each run must end right or with an error that names it.

    PYTHONPATH=.:tests python tests/faults/collectives.py [--sample 20] [--resumed] [--portion 1/2] [--seed 7] [--json FILE]

A run of seconds tokenises, computes features, trains, evaluates, saves and exports. In each case one call on one rank raises,
hangs, comes too late or returns with one bit flipped (support/collective_faults.py): every call on either rank times every
fault, or a `--sample` of them. With `--resumed` the run continues one that failed in its last step, and the faults are those of
the calls that only such a start makes. A right outcome is one of these:

    right   the run ends as if nothing had happened, with the same bits
    error   all ranks end in time, the output names an error, and the same command then ends with the same bits
    waits   a rank waits aloud for rank 0, whose process is alive; TERM ends it
    end     the results are written, a rank has an error in the last communication, another one has ended already; the same
            command then ends with the same bits

Anything else is a fault: another result with exit code 0, an end without a message, no end. It prints a line per case and a
table; exit code 1 at a fault.
"""

import argparse
import itertools
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from support import small_run
from support.collective_faults import FAULTS, NO_DATA
from support.jobs import NUM_RANKS, ForkedJob
from support.processes import wait_until
from support.small_run import read_results

from agnews_dist.distributed.rendezvous import MARGIN_SECONDS

INJECT = "support.collective_faults:inject"
RANK_TIMEOUT = 6
LATE = RANK_TIMEOUT + 2
SECONDS_TO_END = 3 * RANK_TIMEOUT + MARGIN_SECONDS + 20.0
"""Time from the start to the end of all ranks. The longest is that of a rank that hangs before it is connected to others."""
SETTINGS = (
    *("--optim.max_steps", "4", "--optim.evaluate_every", "2", "--checkpoint.every_steps", "3"),
    *("--engine.feature_cache", "host", "--engine.timeout_seconds", str(RANK_TIMEOUT)),
)
NAMED = re.compile(r"^(?:\[rank \d/\d\] )?(?:error: .+|\w*(?:Error|Exception): .+|.* ended with it|rank \d .+)$", re.MULTILINE)
RIGHT = ("right", "error", "waits", "end")


@dataclass
class Case:
    """One fault and its outcome."""

    rank: int
    number: int
    """Number of the call on this rank, from 0."""
    call: str
    fault: str
    seed: int
    outcome: str = ""
    message: str = ""
    """The first error in the output."""
    seconds: float = 0.0
    """Time from the start to the end of all ranks."""


def list_calls(directory: Path, failed: Path | None = None) -> list[list[str]]:
    """Return the calls of each rank in a run without a fault; `failed`: directory of a run to continue."""
    take_runs(failed, directory)
    (directory / "calls").mkdir(parents=True)
    small_run.finish(directory, *SETTINGS, fault=INJECT, CALLS=str(directory / "calls"))
    return [(directory / "calls" / f"rank{rank}").read_text().splitlines() for rank in range(NUM_RANKS)]


def fail_in_last_step(directory: Path, calls: Sequence[str]) -> None:
    """Leave a run with a checkpoint that fails in its last step; `calls`: those of rank 0."""
    number = max(number for number, call in enumerate(calls) if call.startswith("gradients"))
    environ = {"COLLECTIVE_FAULT": "raise", "ON_RANK": "0", "AT_CALL": str(number)}
    small_run.wait_for(small_run.start(directory, *SETTINGS, fault=INJECT, **environ), directory, codes=1)


def take_runs(failed: Path | None, directory: Path) -> None:
    """Copy a run that failed to the directory of a new start."""
    if failed is not None:
        shutil.copytree(failed / "runs", directory / "runs")


def list_cases(calls: Sequence[Sequence[str]], seed: int) -> list[Case]:
    """Return every fault in every call that can have it."""
    return [
        Case(rank, number, call, fault, seed)
        for rank in range(NUM_RANKS)
        for number, call in enumerate(calls[rank])
        for fault in FAULTS
        if fault != "flip" or call.split()[0] not in NO_DATA
    ]


def run_case(case: Case, directory: Path, reference: dict[str, object], failed: Path | None) -> None:
    """Run a case, and after an error the same command again; record the outcome. `failed`: directory of a run to continue."""
    take_runs(failed, directory)
    environ = {"COLLECTIVE_FAULT": case.fault, "ON_RANK": str(case.rank), "AT_CALL": str(case.number)}
    begin = time.monotonic()
    job = small_run.start(directory, *SETTINGS, fault=INJECT, LATE=str(LATE), BIT=str(case.seed), **environ)
    try:
        has_ended = wait_until(job.has_ended, SECONDS_TO_END, every=0.05)
        if not has_ended and case.fault == "hang" and "no time limit while it lives" in small_run.read_log(directory):
            case.outcome = "waits" if ends_at_term(job) else "does not end at TERM"
    finally:
        job.kill(with_stacks=True)
    case.seconds, codes, log = round(time.monotonic() - begin, 1), job.codes(), small_run.read_log(directory)
    found = [line for line in NAMED.findall(log) if not line.startswith("fault: ")]
    case.message = found[0] if found else ""
    if f"fault: {case.fault}" not in log:
        case.outcome = "the call was not reached"
    elif case.outcome == "":
        case.outcome = judge(has_ended, codes, case.message, small_run.run_directory(directory), reference)
    if case.outcome in ("error", "waits", "end"):
        shutil.copy(directory / "log.txt", directory / "first.txt")
        try:
            restarted = read_results(small_run.finish(directory, *SETTINGS))
        except AssertionError as error:
            print(error, file=sys.stderr)
            case.outcome = "fails again after the restart"
            return
        differing = [name for name, value in reference.items() if restarted[name] != value]
        if differing:
            case.outcome = f"ends with other {', '.join(differing)} after the restart"


def ends_at_term(job: ForkedJob) -> bool:
    """Return whether TERM ends a job within the time that it has for a stop."""
    job.signal("all", signal.SIGTERM)
    return wait_until(job.has_ended, 30.0, every=0.05)


def judge(has_ended: bool, codes: Sequence[int | None], message: str, run: Path, reference: dict[str, object]) -> str:
    """Return the outcome of a run with a fault."""
    if not has_ended:
        return "does not end"
    if any(code is not None and code < 0 for code in codes):
        return f"died of a signal: {codes}"
    if not any(codes):
        results = read_results(run)
        differing = [name for name, value in reference.items() if results[name] != value]
        return f"exit code 0 with other {', '.join(differing)}" if differing else "right"
    if not message:
        return "no message"
    if not all(codes):
        return "end" if (run / "model").is_dir() else f"an error on some ranks only: {codes}"
    return "error"


def make_table(cases: Sequence[Case]) -> list[str]:
    """Return lines with the outcomes per function and fault."""
    rows: dict[str, dict[str, Counter[str]]] = {}
    for case in cases:
        rows.setdefault(case.call, {}).setdefault(case.fault, Counter())[case.outcome] += 1
    width = max(map(len, rows), default=0)
    lines = [" ".join([f"{'call':{width}}", *(f"{fault:22}" for fault in FAULTS)])]
    for call, faults in rows.items():
        texts = [
            ", ".join(f"{number} {outcome}" for outcome, number in sorted(faults.get(fault, {}).items())) for fault in FAULTS
        ]
        lines.append(" ".join([f"{call:{width}}", *(f"{text or '-':22}" for text in texts)]).rstrip())
    totals = Counter(case.outcome for case in cases)
    return [*lines, f"{len(cases)} cases: " + ", ".join(f"{number} {outcome}" for outcome, number in totals.most_common())]


def main(words: Sequence[str]) -> int:
    """Run the campaign that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int, default=None, help="number of cases; default: all")
    parser.add_argument("--resumed", action="store_true", help="faults while a run resumes")
    parser.add_argument("--portion", default="1/1", help="which part of the cases: 2/3 is the second of three")
    parser.add_argument("--only", default="", help="regular expression for call and fault")
    parser.add_argument("--seed", type=int, default=None, help="chooses the sample and the flipped bits")
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(words)
    root = options.directory or Path(tempfile.mkdtemp(prefix="agnews-collectives-"))
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    reference = read_results(small_run.finish(root / "reference", *SETTINGS))
    calls, failed = list_calls(root / "calls"), None
    cases = list_cases(calls, seed)
    if options.resumed:
        failed = root / "failed"
        fail_in_last_step(failed, calls[0])
        usual = {case.call for case in cases}
        cases = [case for case in list_cases(list_calls(root / "resumed", failed), seed) if case.call not in usual]
    cases = [case for case in cases if re.search(options.only, f"{case.call} {case.fault}")]
    rng.shuffle(cases)
    # Each fault equally often in any sample.
    by_fault = [[case for case in cases if case.fault == fault] for fault in FAULTS]
    cases = [case for turn in itertools.zip_longest(*by_fault) for case in turn if case is not None][: options.sample]
    part, parts = map(int, options.portion.split("/"))
    cases = cases[part - 1 :: parts]
    begin = time.monotonic()
    for index, case in enumerate(cases):
        directory = root / f"case-{index}"
        run_case(case, directory, reference, failed)
        print(json.dumps(asdict(case), allow_nan=False), flush=True)
        if case.outcome in RIGHT:
            shutil.rmtree(directory)
    print("\n".join(make_table(cases)), flush=True)
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    if options.json is not None:
        options.json.write_text("\n".join(json.dumps(asdict(case), allow_nan=False) for case in cases) + "\n", encoding="utf-8")
    faults = [case for case in cases if case.outcome not in RIGHT]
    if not faults and options.directory is None:
        shutil.rmtree(root)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
