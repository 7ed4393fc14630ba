"""Kills real two-rank trainings at random instants, several times in a row, and compares what they end with bit for bit.

    PYTHONPATH=tests python tests/faults/kills.py --kills 60 --through_torchrun 10 [--seed 7] [--directory DIR] [--json FILE]

Every phase gets its share (tokenise, features, train, save, evaluate, export), and so do the ways: TERM, USR1, USR2, INT, KILL
and STOP, to one rank or to all; through torchrun, to the agent too. After each, every process must have ended by itself in
time, and the run's status must say so; killed often enough, a run is left alone, and then its weights, predictions, scores
and logged steps must equal those of a run that was never killed. A line per kill, and a summary; exit code 1 at a difference.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.jobs import ForkedJob, TorchrunJob, wait_until
from support.small_run import EPOCHS, NUM_STEPS, TIMEOUT, arguments, finish, outcome
from support.timeline import PHASES, Timeline

from agnews_dist.run.status import Status, read_status

SECONDS_TO_STOP = 30.0
"""What the user was promised."""
GRACEFUL = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2, "INT": signal.SIGINT}
HARD = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}
DELAYS = {"tokenise": 2.0, "features": 1.0, "train": 2.0, "save": 0.01, "evaluate": 0.1, "export": 0.3}
"""Seconds after a phase's beginning up to which a kill may come."""


@dataclass
class Kill:
    """One of them, and what came of it."""

    run: int
    through: str
    how: str
    target: str
    aimed: str
    hit: str = ""
    step: int = 0
    seconds: float = 0.0
    """Until the last process had ended."""
    repeated: int = 0
    """Steps done that no checkpoint held."""
    status: str | None = None
    codes: list[int | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def is_at(timeline: Timeline, phase: str, step: int) -> bool:
    """Whether the run is in `phase`, after `step` steps or more."""
    return timeline.phase(NUM_STEPS, EPOCHS) == phase and timeline.steps >= step


def strike(kill: Kill, directory: Path, place: str, rng: random.Random) -> bool:
    """Start an attempt and hit it; False if it ended before it could be hit."""
    run, log = directory / "runs" / "small", directory / "log.txt"
    if kill.aimed == "tokenise":
        shutil.rmtree(directory / "cache", ignore_errors=True)
    if kill.aimed == "features":
        shutil.rmtree(directory / "cache" / "features", ignore_errors=True)
    timeline, earlier = Timeline(run), read_status(run)
    job = (TorchrunJob if kill.through == "torchrun" else ForkedJob)(
        arguments(directory, "--engine.feature_cache", place), log
    )
    try:
        delay = rng.uniform(0, DELAYS[kill.aimed])
        if kill.through == "torchrun" and not wait_until(lambda: job.ended() or len(job.workers()) > 1, 60):
            kill.faults.append("torchrun starts no workers")
            return True
        if kill.aimed != "tokenise":
            epoch = rng.randrange(EPOCHS) + 1 if kill.aimed == "evaluate" else 0
            # Saving is short; else the two ranks should have their cores.
            every = 0.002 if kill.aimed == "save" else 0.02
            at_least = epoch * NUM_STEPS // EPOCHS
            assert wait_until(lambda: job.ended() or is_at(timeline, kill.aimed, at_least), 120, every=every)
        wait_until(job.ended, delay)
        kill.hit, kill.step = timeline.phase(NUM_STEPS, EPOCHS), timeline.steps
        if job.ended():
            return False
        number = {**GRACEFUL, **HARD}[kill.how]
        start = time.monotonic()
        hit = job.hit(kill.target, number)
        if kill.how == "STOP" and kill.target == "all":
            # Nothing is left that could notice: a machine that hangs and is then reset.
            job.kill()
        besides = hit if kill.how == "STOP" else []
        if not wait_until(lambda: job.ended(besides), limit(kill) + 15, every=0.01):
            kill.faults.append("does not end")
        kill.seconds = time.monotonic() - start
        kill.codes = job.codes()
    finally:
        job.kill()
    check(kill, timeline, log, earlier)
    return True


def limit(kill: Kill) -> float:
    """Seconds within which everything has to end: torchrun, once a rank failed, waits 30 s for one that is suspended."""
    return SECONDS_TO_STOP + (TIMEOUT + 10 if kill.through == "torchrun" and kill.how == "STOP" else 0)


def check(kill: Kill, timeline: Timeline, log: Path, earlier: Status | None) -> None:
    """What must hold after every kill; `earlier`: the status before this attempt."""
    if kill.seconds > limit(kill):
        kill.faults.append(f"took {kill.seconds:.0f} s to stop")
    status = read_status(timeline.directory)
    kill.status = status.state if status is not None else None
    done = max(timeline.steps, kill.step)
    kill.repeated = done - timeline.saved() if kill.status != "finished" else 0
    # A process that does not watch yet dies of the signal, and nothing has begun.
    has_begun = kill.hit != "tokenise" or status != earlier
    # The ranks of an agent that is killed live, see that it is gone, and save.
    if (kill.how in GRACEFUL and not (kill.through == "torchrun" and kill.target == "all")) or kill.target == "agent":
        if kill.status not in ("preempted", "finished") and has_begun:
            kill.faults.append(f"status {kill.status} after {kill.how} to {kill.target}")
        if kill.repeated > 0:
            kill.faults.append(f"{kill.repeated} steps were done and not saved")
        right = [75, 75] if kill.status != "finished" else [0, 0]
        is_unborn = not has_begun and any(code is not None and code < 0 for code in kill.codes)
        if kill.through == "forked" and kill.codes != right and not is_unborn:
            kill.faults.append(f"exit codes {kill.codes}")
    elif kill.how in HARD:
        if kill.status == "preempted" and kill.hit != "tokenise":
            kill.faults.append("status preempted after a hard end")
        survivors = [code for code in kill.codes if code is not None and code >= 0]
        if kill.status != "finished" and any(code == 0 for code in survivors):
            kill.faults.append(f"a survivor ended with 0: {kill.codes}")
    if kill.faults:
        print(log.read_text()[-6000:], file=sys.stderr)


def deck(rng: random.Random, cards: list[Any], size: int) -> list[Any]:
    """`size` cards: every one as often as any other, in random order."""
    drawn = [cards[index % len(cards)] for index in range(-(-size // len(cards)) * len(cards))][:size]
    rng.shuffle(drawn)
    return drawn


def plan_kills(rng: random.Random, num_kills: int, through_torchrun: int) -> list[Kill]:
    """Which there will be; a run's own are sorted by phase."""
    phases = deck(rng, list(PHASES), num_kills)
    hows = deck(
        rng, ["TERM", "KILL", "STOP", "TERM", "KILL", "USR1", "TERM", "KILL", "STOP", "USR2", "TERM", "INT"], num_kills
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
    """Up to `size` kills for one run, taken out of `todo`, in the order of their phases."""
    drawn: list[Kill] = []
    for kill in list(todo):
        phases = {kill.aimed, *(other.aimed for other in drawn)}
        # Where features are not kept there is no phase of computing them.
        if len(drawn) < size and not {"features", "evaluate"} <= phases:
            drawn.append(kill)
            todo.remove(kill)
    return sorted(drawn, key=lambda kill: PHASES.index(kill.aimed))


def main() -> int:
    """The whole campaign; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--through_torchrun", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    root = options.directory or Path(tempfile.mkdtemp(prefix="agnews-kills-"))
    references: dict[str, dict[str, Any]] = {}
    for place in ("host", "disk", "off"):
        (root / f"reference-{place}").mkdir(parents=True)
        references[place] = outcome(finish(root / f"reference-{place}", "--engine.feature_cache", place))
    todo = plan_kills(rng, options.kills, options.through_torchrun)
    kills: list[Kill] = []
    begin, number = time.monotonic(), 0
    differing: list[str] = []
    while todo:
        number += 1
        in_a_row = draw(todo, rng.randint(2, 4))
        # With kept features an evaluation is over before it can be hit.
        evaluates = any(kill.aimed == "evaluate" for kill in in_a_row)
        place = "off" if evaluates else rng.choice(["host", "disk"])
        directory = root / f"run-{number}"
        directory.mkdir()
        for kill in in_a_row:
            kill.run = number
            if strike(kill, directory, place, rng):
                kills.append(kill)
                print(json.dumps(asdict(kill)), flush=True)
            else:
                todo.append(kill)
                print(f"run {number} ended before it could be hit in {kill.aimed}", flush=True)
        reached = outcome(finish(directory, "--engine.feature_cache", place))
        wrong = [name for name, value in references[place].items() if reached[name] != value]
        if wrong:
            differing.append(
                f"run {number} ({directory}) ends with other {', '.join(wrong)} than a run that was not killed"
            )
            print(differing[-1], flush=True)
        else:
            shutil.rmtree(directory)
    summary = summarise(kills, number, time.monotonic() - begin, seed)
    print("\n".join(summary), flush=True)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"seed": seed, "kills": [asdict(kill) for kill in kills], "differing": differing})
        )
    faults = differing + [f"{kill}" for kill in kills if kill.faults]
    print("\n".join(faults) or "every run ended bit-equal to one that was not killed", flush=True)
    if not faults and options.directory is None:
        shutil.rmtree(root)
    return 1 if faults else 0


def summarise(kills: list[Kill], num_runs: int, seconds: float, seed: int) -> list[str]:
    """Counts, time to stop, work repeated: by way."""
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
            value: sum(getattr(kill, name) == value for kill in kills)
            for value in {getattr(kill, name) for kill in kills}
        }
        lines.append(f"{name}: " + ", ".join(f"{value} {count}" for value, count in sorted(counts.items())))
    return lines


if __name__ == "__main__":
    sys.exit(main())
