"""A campaign that kills two-rank trainings at random instants and compares their final results bit for bit.

    PYTHONPATH=tests python tests/faults/kills.py --kills 60 --through_torchrun 10 [--seed 7] [--directory DIR] [--json FILE]

    PYTHONPATH=tests python tests/faults/kills.py --curve 5,10,20,60 [--epochs 40] [--json FILE]

Kills are spread evenly over the phases: tokenise, features, train, save, evaluate, export. They send TERM, USR1, USR2, INT,
HUP, QUIT, KILL or STOP to one rank, to all, or to the agent of torchrun. After a kill every process must end by itself in
time, and status.json must be right. A run is killed several times, then left to finish. Its weights, predictions, scores and
logged steps must equal those of a run that was never killed. It prints a line per kill and a summary; exit code 1 at a fault.
`--curve` measures the useful time instead (useful_time.py).
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.jobs import ForkedJob, TorchrunJob
from support.processes import TIMEOUT, wait_until
from support.small_run import EPOCHS, NUM_STEPS, RANK_TIMEOUT, arguments, finish, read_results
from support.timeline import PHASES, Timeline
from useful_time import measure

from agnews_dist.run.status import Status, read_status

SECONDS_TO_STOP = 30.0
"""Time in which a run stops, as documented."""
GRACEFUL = {name: signal.Signals[f"SIG{name}"] for name in ("TERM", "USR1", "USR2", "INT", "HUP", "QUIT")}
HARD = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}
DELAYS = {"tokenise": 1.0, "features": 0.5, "train": 1.0, "save": 0.01, "evaluate": 0.1, "export": 0.05}
"""Longest time in seconds between the beginning of a phase and the kill."""


@dataclass
class Kill:
    """A kill and its outcome."""

    run: int
    through: str
    how: str
    target: str
    aimed: str
    hit: str = ""
    step: int = 0
    seconds: float = 0.0
    """Time until the last process had ended."""
    repeated: int = 0
    """Number of steps that no checkpoint had."""
    status: str | None = None
    codes: list[int | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def number_of(how: str) -> signal.Signals:
    """Return the signal of a kill."""
    return {**GRACEFUL, **HARD}[how]


def is_at(timeline: Timeline, phase: str, step: int) -> bool:
    """Return whether the run is in `phase` after at least `step` steps."""
    return timeline.phase(NUM_STEPS, EPOCHS) == phase and timeline.steps >= step


def has_finished(run: Path) -> bool:
    """Return whether the run has written its results and its last status."""
    status = read_status(run)
    return status is not None and status.state == "finished"


def kill_attempt(kill: Kill, directory: Path, place: str, rng: random.Random) -> bool:
    """Start an attempt and kill it; return False if it ended first."""
    run, log = directory / "runs" / "small", directory / "log.txt"
    if kill.aimed == "tokenise":
        shutil.rmtree(directory / "cache", ignore_errors=True)
    if kill.aimed == "features":
        shutil.rmtree(directory / "cache" / "features", ignore_errors=True)
    timeline, earlier = Timeline(run), read_status(run)
    job = (TorchrunJob if kill.through == "torchrun" else ForkedJob)(arguments(directory, "--engine.feature_cache", place), log)
    try:
        delay = rng.uniform(0, DELAYS[kill.aimed])
        if kill.through == "torchrun" and not wait_until(lambda: job.has_ended() or len(job.workers()) > 1):
            kill.faults.append("torchrun starts no workers")
            return True
        if kill.aimed != "tokenise":
            epoch = rng.randrange(EPOCHS) + 1 if kill.aimed == "evaluate" else 0
            # Saving is short. In longer phases frequent polling would take cores from the ranks.
            every = 0.002 if kill.aimed == "save" else 0.02
            at_least = epoch * NUM_STEPS // EPOCHS
            assert wait_until(lambda: job.has_ended() or is_at(timeline, kill.aimed, at_least), every=every)
        wait_until(job.has_ended, delay, every=0.002)
        kill.hit, kill.step = timeline.phase(NUM_STEPS, EPOCHS), timeline.steps
        if job.has_ended():
            return False
        start = time.monotonic()
        pids = job.signal(kill.target, number_of(kill.how))
        if not pids:
            return False
        if kill.how == "STOP" and kill.target == "all":
            # No process is left to notice: a machine that hangs and is then reset.
            job.kill()
        suspended = pids if kill.how == "STOP" else []
        # Nobody misses a suspended rank of a finished run, and torchrun waits for it without end.
        if not wait_until(lambda: job.has_ended(suspended) or (suspended and has_finished(run)), TIMEOUT, every=0.01):
            kill.faults.append("does not end")
        kill.seconds = time.monotonic() - start
        kill.codes = job.codes()
    finally:
        job.kill()
    check(kill, timeline, log, earlier)
    return True


def limit(kill: Kill) -> float:
    """Return the seconds in which all must end."""
    if kill.through == "torchrun" and kill.how == "STOP":
        # After a failure torchrun waits 30 s for a suspended rank. The other one may still import when that is suspended.
        return SECONDS_TO_STOP + RANK_TIMEOUT + (20 if kill.hit == "tokenise" else 10)
    return SECONDS_TO_STOP


def check(kill: Kill, timeline: Timeline, log: Path, earlier: Status | None) -> None:
    """Check the state after a kill; `earlier`: the status before this attempt."""
    if kill.seconds > limit(kill):
        kill.faults.append(f"took {kill.seconds:.0f} s to stop")
    status = read_status(timeline.directory)
    kill.status = status.state if status is not None else None
    done = max(timeline.steps, kill.step)
    kill.repeated = done - timeline.saved() if kill.status != "finished" else 0
    has_begun = kill.hit != "tokenise" or status != earlier
    # Ranks survive their agent, notice that it is gone, and save.
    if (kill.how in GRACEFUL and not (kill.through == "torchrun" and kill.target == "all")) or kill.target == "agent":
        if kill.status not in ("preempted", "finished") and has_begun:
            kill.faults.append(f"status {kill.status} after {kill.how} to {kill.target}")
        if kill.repeated > 0:
            kill.faults.append(f"{kill.repeated} steps were done and not saved")
        right = [75, 75] if kill.status != "finished" else [0, 0]
        # Before its handlers are set a process dies of the signal, and the other rank notices.
        is_before_start = not has_begun and any(code is not None and code < 0 for code in kill.codes)
        # A rank that has finished its run restores the handlers, and may die of the signal before it exits.
        is_after_end = kill.status == "finished" and set(kill.codes) <= {0, -number_of(kill.how)}
        if kill.through == "forked" and kill.codes != right and not is_before_start and not is_after_end:
            kill.faults.append(f"exit codes {kill.codes}")
    elif kill.how in HARD:
        if kill.status == "preempted" and kill.hit != "tokenise":
            kill.faults.append("status preempted after a hard end")
        survivors = [code for code in kill.codes if code is not None and code >= 0]
        if kill.status != "finished" and any(code == 0 for code in survivors):
            kill.faults.append(f"a survivor ended with 0: {kill.codes}")
    if kill.faults:
        print(log.read_text()[-6000:], file=sys.stderr)


def deal(rng: random.Random, cards: list[Any], size: int) -> list[Any]:
    """Return `size` cards in random order, each about equally often."""
    drawn = [cards[index % len(cards)] for index in range(-(-size // len(cards)) * len(cards))][:size]
    rng.shuffle(drawn)
    return drawn


def plan_kills(rng: random.Random, num_kills: int, through_torchrun: int) -> list[Kill]:
    """Return the kills of the campaign."""
    phases = deal(rng, list(PHASES), num_kills)
    hows = deal(
        rng,
        ["TERM", "KILL", "STOP", "TERM", "KILL", "USR1", "TERM", "HUP", "KILL", "STOP", "USR2", "QUIT", "TERM", "INT"],
        num_kills,
    )
    torchruns = set(rng.sample(range(num_kills), through_torchrun))
    kills = []
    for index, (phase, how) in enumerate(zip(phases, hows, strict=True)):
        targets = ["agent", "agent", "rank 0", "rank 1"] if index in torchruns else ["rank 0", "rank 1", "all"]
        if how == "STOP":
            targets = ["rank 0", "rank 1"]
        through = "torchrun" if index in torchruns else "forked"
        kills.append(Kill(0, through, how, rng.choice(targets), phase))
    return kills


def draw(todo: list[Kill], size: int) -> list[Kill]:
    """Take up to `size` kills for one run out of `todo`; return them in the order of their phases."""
    drawn: list[Kill] = []
    for kill in list(todo):
        phases = {kill.aimed, *(other.aimed for other in drawn)}
        # A run that keeps no features has no phase that computes them.
        if len(drawn) < size and not {"features", "evaluate"} <= phases:
            drawn.append(kill)
            todo.remove(kill)
    return sorted(drawn, key=lambda kill: PHASES.index(kill.aimed))


def main(words: Sequence[str]) -> int:
    """Run the campaign that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--through_torchrun", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--curve", default="", help="seconds between kills; measures the useful time")
    parser.add_argument("--epochs", type=int, default=40, help="of the run of --curve")
    options = parser.parse_args(words)
    if options.curve:
        root = options.directory or Path(tempfile.mkdtemp(prefix="agnews-curve-"))
        return measure(root, options.epochs, [float(word) for word in options.curve.split(",")], options.json)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    root = options.directory or Path(tempfile.mkdtemp(prefix="agnews-kills-"))
    # Results do not depend on where features are kept.
    reference = read_results(finish(root / "reference"))
    todo = plan_kills(rng, options.kills, options.through_torchrun)
    kills: list[Kill] = []
    begin, number = time.monotonic(), 0
    differing: list[str] = []
    while todo:
        number += 1
        in_a_row = draw(todo, rng.randint(2, 4))
        # With kept features an evaluation is too short to be killed.
        evaluates = any(kill.aimed == "evaluate" for kill in in_a_row)
        place = "off" if evaluates else rng.choice(["host", "disk"])
        directory = root / f"run-{number}"
        directory.mkdir()
        for kill in in_a_row:
            kill.run = number
            if kill_attempt(kill, directory, place, rng):
                kills.append(kill)
                print(json.dumps(asdict(kill)), flush=True)
            else:
                todo.append(kill)
                print(f"run {number} ended before it could be hit in {kill.aimed}", flush=True)
        results = read_results(finish(directory, "--engine.feature_cache", place))
        wrong = [name for name, value in reference.items() if results[name] != value]
        if wrong:
            differing.append(f"run {number} ({directory}) ends with other {', '.join(wrong)} than a run that was not killed")
            print(differing[-1], flush=True)
        else:
            shutil.rmtree(directory)
    summary = summarise(kills, number, time.monotonic() - begin, seed)
    print("\n".join(summary), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"seed": seed, "kills": [asdict(kill) for kill in kills], "differing": differing}))
    faults = differing + [f"{kill}" for kill in kills if kill.faults]
    print("\n".join(faults) or "every run ended bit-equal to one that was not killed", flush=True)
    if not faults and options.directory is None:
        shutil.rmtree(root)
    return 1 if faults else 0


def summarise(kills: list[Kill], num_runs: int, seconds: float, seed: int) -> list[str]:
    """Return lines with counts, times to stop and repeated steps per signal."""
    lines = [f"{len(kills)} kills of {num_runs} runs in {seconds / 60:.1f} min, seed {seed}"]
    for how in (*GRACEFUL, *HARD):
        mine = [kill for kill in kills if kill.how == how]
        if mine:
            times, repeated = [kill.seconds for kill in mine], [kill.repeated for kill in mine]
            lines.append(
                f"{how:5} {len(mine):3} kills  seconds to stop: median {statistics.median(times):.1f}, most {max(times):.1f}  "
                f"steps repeated: mean {statistics.mean(repeated):.1f}, most {max(repeated)}"
            )
    for name in ("through", "hit", "target"):
        counts = {
            value: sum(getattr(kill, name) == value for kill in kills) for value in {getattr(kill, name) for kill in kills}
        }
        lines.append(f"{name}: " + ", ".join(f"{value} {count}" for value, count in sorted(counts.items())))
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
