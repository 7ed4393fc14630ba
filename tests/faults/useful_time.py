"""The useful share of a run that is killed again and again: `kills.py --curve`.

A training of minutes on two ranks (AG News rows, a small GPT-2, features kept on disk, the default interval of checkpoints)
runs once without a kill. Then KILL ends both ranks every so many seconds, and the same command starts at once, until the run
is finished. Ranks are forked from a process that has loaded the libraries (support/fork_server.py): no start imports them.
"""

import json
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from support.jobs import ForkedJob
from support.processes import SHARED, wait_until
from support.small_run import read_results
from support.timeline import Timeline

MAX_WITHOUT_PROGRESS = 8
"""Attempts in a row that reach no later checkpoint, after which a run counts as stuck."""


@dataclass
class Curve:
    """One run, killed every `interval` seconds (0: never)."""

    interval: float
    seconds: float = 0.0
    """From the first start to the end."""
    starts: int = 0
    seconds_to_step: list[float] = field(default_factory=list)
    """From each kill to the next step."""
    repeated: list[int] = field(default_factory=list)
    """Steps that each kill made necessary again."""
    is_stuck: bool = False
    differing: list[str] = field(default_factory=list)
    """Results that differ from those of the run without a kill."""


def run_with_kills(directory: Path, epochs: int, interval: float) -> Curve:
    """Run a training to its end, killed every `interval` seconds."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    words = ["--data.source", str(SHARED / "data" / "ag_news"), "--model.name", str(SHARED / "checkpoints" / "gpt2-mini")]
    words += ["--run.dir", str(directory / "runs"), "--run.name", "small", "--data.cache_dir", str(directory.parent / "cache")]
    words += ["--engine.feature_cache", "disk", "--optim.epochs", str(epochs), "--data.limit_train", "4000"]
    words += ["--data.limit_test", "200"]
    curve, timeline, begin = Curve(interval), Timeline(directory / "runs" / "small"), time.time()
    killed_at, saved, num_stuck = 0.0, 0, 0
    while True:
        started_at = time.time()
        job = ForkedJob(words, directory / "log.txt")
        curve.starts += 1
        try:
            has_ended = wait_until(job.has_ended, interval or 3600.0, every=0.05)
            if not has_ended:
                job.signal("all", signal.SIGKILL)
                now = time.time()
        finally:
            job.kill()
        steps = {step["step"]: _seconds(step) for step in timeline.of("StepDone") if _seconds(step) > started_at}
        if killed_at and steps:
            curve.seconds_to_step.append(round(min(steps.values()) - killed_at, 2))
        if has_ended:
            assert job.codes() == [0, 0], (directory / "log.txt").read_text()[-4000:]
            break
        num_stuck = num_stuck + 1 if timeline.saved() <= saved else 0
        # Where an attempt made no step, the kill before it counts further.
        killed_at, saved = now if steps or not killed_at else killed_at, timeline.saved()
        if steps:
            curve.repeated.append(max(steps) - saved)
        if num_stuck == MAX_WITHOUT_PROGRESS:
            curve.is_stuck = True
            break
    curve.seconds = round(time.time() - begin, 1)
    return curve


def _seconds(event: dict[str, str]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def measure(root: Path, epochs: int, intervals: list[float], output: Path | None) -> int:
    """Print a table of useful time by interval; return 1 if a run is stuck or ends with other results."""
    run_with_kills(root / "warm", 1, 0)  # tokens and features are computed
    curves = [run_with_kills(root / "0", epochs, 0)]
    whole = read_results(root / "0" / "runs" / "small")
    print(f"without kills: {curves[0].seconds:.0f} s, {whole['steps'][-2]['step']:,} steps", flush=True)
    columns = ("killed every", "starts", "useful share", "kill to next step: median, most", "steps repeated: mean, most")
    print("   ".join(columns), flush=True)
    for interval in intervals:
        curve = run_with_kills(root / f"{interval:g}", epochs, interval)
        curves.append(curve)
        if not curve.is_stuck:
            results = read_results(root / f"{interval:g}" / "runs" / "small")
            curve.differing = [name for name, value in whole.items() if results[name] != value]
        share = "no progress" if curve.is_stuck else f"{curves[0].seconds / curve.seconds:.2f}"
        waits, repeated = curve.seconds_to_step or [0.0], curve.repeated or [0]
        same = f"other {', '.join(curve.differing)}" if curve.differing else "same bits"
        print(
            f"{interval:8g} s {curve.starts:11} {share:>13} {statistics.median(waits):17.1f} s, {max(waits):.1f} s "
            f"{statistics.mean(repeated):23.0f}, {max(repeated)}   {same}",
            flush=True,
        )
    if output is not None:
        output.write_text("".join(json.dumps(asdict(curve), allow_nan=False) + "\n" for curve in curves), encoding="utf-8")
    is_wrong = any(curve.is_stuck or curve.differing for curve in curves)
    print("a run is stuck or ends with other results" if is_wrong else "all runs end with the same bits", file=sys.stderr)
    return int(is_wrong)
