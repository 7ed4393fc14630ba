"""The fast path against Hugging Face Trainer: one command, one log, one table.

    python tests/bench/fast_path/run.py --output DIR [--install-peers] [--resume] [--settings | --quick]

Every contestant is a process of its own, one after the other, on `--threads` threads, and compiles anew what it compiles. The
machine's matrix products are measured before, between and after. Each line of DIR/log.jsonl is written when its process has
ended; `--resume` goes on with what is missing. `--settings` instead tries Trainer's settings, one epoch each; `--quick` runs
everything small, to see that it works.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
sys.path.insert(0, str(HERE))

from summary import tables  # noqa: E402

TIMEOUT_SECONDS = 3600
LENGTH, RANDOM, FIXED = (("--batches", batches) for batches in ("length", "random", "fixed"))
CHANGED = ("--activation", "gelu_pytorch_tanh", "--quiet-frozen")
"""Not Trainer's settings but changes to the model: a fused GELU, and no dropout in what is frozen, as ours has it."""


class Contest(NamedTuple):
    """One process: `key` names it in the log, `script` with `options` is what runs."""

    key: str
    script: str
    options: tuple[str, ...] = ()


def full() -> list[Contest]:
    """Everything that RESULTS.md shows; ours three times, since it is short, among the others."""

    def ours(epochs: int, run: int) -> Contest:
        return Contest(f"ours, {epochs} epochs, run {run}", "ours.py", ("--epochs", str(epochs)))

    def trainer(epochs: int, *options: str) -> Contest:
        name = " ".join(option.removeprefix("--") for option in options)
        return Contest(f"trainer, {epochs} epochs, {name}", "trainer.py", ("--epochs", str(epochs), *options))

    rounds = [
        [ours(3, 1), trainer(3, *LENGTH)],
        [ours(3, 2), trainer(3, *RANDOM)],
        [ours(3, 3), trainer(3, *FIXED)],
        [ours(10, 1), trainer(10, *LENGTH)],
        [ours(10, 2), trainer(3, *LENGTH, *CHANGED)],
        [ours(10, 3), Contest("plain, 1 epoch", "ours.py", ("--epochs", "1", "--plain"))],
    ]
    products = [Contest(f"products {i}", "products.py") for i in range(len(rounds) + 1)]
    return [products[0], *(contest for i, some in enumerate(rounds) for contest in (*some, products[i + 1]))]


def settings() -> list[Contest]:
    """Trainer's settings, one epoch each (two where compiling has to pay); the first again at the end shows the noise."""
    tried: dict[str, tuple[str, ...]] = {
        "as it is": (),
        "2 workers": ("--workers", "2"),
        "adamw_torch": ("--optim", "adamw_torch"),
        "eager attention": ("--attention", "eager"),
        "fused gelu": CHANGED[:2],
        "no dropout where frozen": CHANGED[2:],
        "fused gelu, no dropout where frozen": CHANGED,
        "compiled": ("--compile",),
        "as it is, again": (),
    }
    return [
        Contest(name, "trainer.py", ("--epochs", "2" if name == "compiled" else "1", *LENGTH, *options))
        for name, options in tried.items()
    ]


def quick() -> list[Contest]:
    """Each script once in every way that `full` uses."""
    return [
        Contest("products 0", "products.py", ("--seconds", "0.01")),
        Contest("ours, 3 epochs, run 1", "ours.py", ("--epochs", "3")),
        Contest("plain, 1 epoch", "ours.py", ("--epochs", "1", "--plain")),
        Contest("trainer, 3 epochs, length", "trainer.py", ("--epochs", "3", *LENGTH)),
        Contest("trainer, 1 epochs, fixed", "trainer.py", ("--epochs", "1", *FIXED)),
        Contest("trainer, 1 epochs, random changed", "trainer.py", ("--epochs", "1", *RANDOM, *CHANGED)),
    ]


def run(contest: Contest, job: Path, output: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The contestant's line, or what it said when it failed."""
    arguments = [str(HERE / contest.script), str(job)]
    if contest.script != "products.py":
        arguments.append(str(output))
    row: dict[str, Any] = {"key": contest.key, "command": " ".join([contest.script, *contest.options])}
    row["load_before"] = round(os.getloadavg()[0], 2)
    try:
        done = subprocess.run(
            [sys.executable, *arguments, *contest.options],
            env=environment | {"TORCHINDUCTOR_CACHE_DIR": str(output / "compiled")},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return row | {"failed": f"no end after {TIMEOUT_SECONDS} s"}
    finally:
        shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        return row | {"failed": f"exit code {done.returncode}: {done.stderr[-2000:]}"}
    return row | json.loads(done.stdout.splitlines()[-1]) | {"load_after": round(os.getloadavg()[0], 2)}


def cpu_model() -> str:
    """As Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def read(log: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def append(log: Path, row: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def child_environment(threads: int) -> dict[str, str]:
    """Of every contestant: so many threads, no network, the package of this repository."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    return {**os.environ, **fixed, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what the log holds")
    parser.add_argument("--install-peers", action="store_true", help="pip install the versions of requirements.txt first")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--settings", action="store_true", help="try Trainer's settings")
    what.add_argument("--quick", action="store_true", help="tiny model, few texts")
    args = parser.parse_args()
    output = args.output.resolve()
    log, job = output / "log.jsonl", output / "job"
    if log.exists() and not args.resume:
        parser.error(f"{log} exists: one log cannot hold two runs. Give another --output, or --resume.")
    if args.install_peers:
        subprocess.run([sys.executable, "-m", "pip", "install", "-r", str(HERE / "requirements.txt")], check=True)
    environment = child_environment(args.threads)
    output.mkdir(parents=True, exist_ok=True)
    preparing = [sys.executable, str(HERE / "job.py"), str(job), *(["--quick"] if args.quick else [])]
    prepared = subprocess.run(preparing, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    header = {
        "job": json.loads(prepared.stdout.splitlines()[-1]),
        "settings": args.settings,
        "threads": args.threads,
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
    }
    rows = read(log) if log.exists() else []
    if rows and {key: rows[0][key] for key in header} != header:
        parser.error(f"{log} is of another job or machine: its lines could not be compared. Give another --output.")
    if not rows:
        rows.append({"command": " ".join(["run.py", *sys.argv[1:]]), "started": time.strftime("%F %T %Z"), **header})
        append(log, rows[0])
    known = {row["key"] for row in rows[1:] if "failed" not in row}
    for contest in settings() if args.settings else quick() if args.quick else full():
        if contest.key in known:
            continue
        row = run(contest, job, output / "work", environment)
        append(log, row)
        rows.append(row)
        print(f"{contest.key}: {row.get('seconds') or row.get('gigaflops') or row.get('failed')}", flush=True)
    shutil.rmtree(job, ignore_errors=True)
    done = {row["key"] for row in rows[1:] if "failed" not in row}
    print("\n" + tables(rows))
    return int(any(row["key"] not in done for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(main())
