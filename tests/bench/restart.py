"""The time from a kill to the next step, next to that of the imports and of reading the checkpoint.

    PYTHONPATH=tests python tests/bench/restart.py [--ranks 2] [--rounds 5] [--feature_cache auto]

A training (AG News rows, a small GPT-2) is killed again and again while it trains; the same command starts at once. In turn
with every restart as many processes import what the training imports, and read the newest checkpoint. The time to the next step
ends with the time stamp of its event. Prints medians and their ratio.
"""

import argparse
import ast
import inspect
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from support.fork_server import rank_variables
from support.processes import SHARED, environment, wait_until
from support.timeline import Timeline

from agnews_dist.commands import train
from agnews_dist.training.checkpoint import list_checkpoints


def imports_of_training() -> str:
    """Return the import statements of the command, those of its function `run` included."""
    tree = ast.parse(inspect.getsource(train))
    return "\n".join(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def start(command: Sequence[str], num_ranks: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """Start `num_ranks` processes with the variables of a launcher; their output is appended to `log`."""
    with log.open("ab") as file:
        return [
            subprocess.Popen([sys.executable, *command], env={**environment(), **own}, stdout=file, stderr=subprocess.STDOUT)
            for own in (rank_variables(num_ranks) if num_ranks > 1 else [{}])
        ]


def import_and_read(checkpoint: Path, num_ranks: int, log: Path) -> float:
    """Return the seconds until `num_ranks` processes have imported what the training imports, and read a checkpoint."""
    code = (
        f"{imports_of_training()}\nfrom pathlib import Path\nfrom agnews_dist.training.checkpoint import read_checkpoint\n"
        f"read_checkpoint(Path({str(checkpoint)!r}))\nprint('read', time.time())"
    )
    log.unlink()
    begin = time.time()
    processes = start(["-c", code], num_ranks, log)
    assert all(process.wait() == 0 for process in processes), log.read_text()[-4000:]
    # Without the end of the interpreter, which a restart does not wait for.
    return max(float(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("read ")) - begin


def last_step(timeline: Timeline) -> tuple[int, float]:
    """Return the last logged step and its time."""
    events = timeline.of("StepDone")
    return (events[-1]["step"], datetime.fromisoformat(events[-1]["time"]).timestamp()) if events else (0, 0.0)


def restart(command: Sequence[str], num_ranks: int, timeline: Timeline, log: Path) -> float:
    """Start the training, kill it once it has trained for a while; return the seconds from its start to its first step."""
    last, begin = last_step(timeline)[1], time.time()
    processes = start(command, num_ranks, log)
    first = 0.0

    def has_trained() -> bool:
        nonlocal first
        assert all(process.poll() is None for process in processes), log.read_text()[-4000:]
        # Rank 0 logs a step every second.
        times = [datetime.fromisoformat(event["time"]).timestamp() for event in timeline.of("StepDone")]
        first = first or next((when for when in times if when > max(last, begin)), 0.0)
        return bool(first) and time.time() - first > 2.0 and bool(list_checkpoints(timeline.directory / "checkpoints"))

    assert wait_until(has_trained, every=0.1)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
    return first - begin


def main(words: Sequence[str]) -> int:
    """Measure what the module's docstring describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--feature_cache", default="auto")
    options = parser.parse_args(words)
    root = Path(tempfile.mkdtemp(prefix="agnews-restart-"))
    log, run = root / "log.txt", root / "runs" / "killed"
    command = ["-m", "agnews_dist.train", "--data.source", str(SHARED / "data" / "ag_news"), "--optim.epochs", "400"]
    command += ["--model.name", str(SHARED / "checkpoints" / "gpt2-mini"), "--engine.feature_cache", options.feature_cache]
    command += [
        "--run.dir",
        str(run.parent),
        "--run.name",
        run.name,
        "--data.cache_dir",
        str(root / "cache"),
        "--report.write",
        "false",
    ]
    timeline = Timeline(run)
    print(f"first start: {restart(command, options.ranks, timeline, log):.2f} s to the first step", flush=True)
    restarts: list[float] = []
    imports: list[float] = []
    for _ in range(options.rounds):
        imports.append(import_and_read(list_checkpoints(run / "checkpoints")[0], options.ranks, log))
        restarts.append(restart(command, options.ranks, timeline, log))
        print(f"imports and checkpoint {imports[-1]:.2f} s   kill to next step {restarts[-1]:.2f} s", flush=True)
    ratio = statistics.median(restarts) / statistics.median(imports)
    print(f"medians {statistics.median(imports):.2f} s and {statistics.median(restarts):.2f} s: {ratio:.2f} times")
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
