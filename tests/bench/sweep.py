"""Fifteen members of a sweep against one run, and against fifteen trainings of Hugging Face Trainer.

    python tests/bench/sweep.py --output DIR [--rounds 2] [--trainers 3] [--quick]

The job is that of fast_path (GPT-2 small's shape, 256 AG News texts, batch 32, fp32, three epochs). Its weights are on disk, so
that all members share them. Each measurement is a process of its own, timed from its start to its end, imports included.
Trainings of Trainer that are not run are extrapolated from those that are. So are trials of its search with Optuna, with the
imports once. Each line of DIR/log.jsonl is written when its process has ended. `--quick` runs everything small.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
REPOSITORY = BENCH.parents[1]
sys.path.insert(0, str(BENCH / "fast_path"))

import job as jobs  # noqa: E402
from run import child_environment, cpu_model  # noqa: E402

RATES, SEEDS = "3e-4,1e-3,3e-3", "0..4"
NUM_MEMBERS = 15


def save_weights(model: Path) -> None:
    """Save random weights of the shape in `model`."""
    import torch
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    GPT2Model(GPT2Config.from_pretrained(model)).save_pretrained(model)


def arguments(job: Path, output: Path, cache: Path, name: str) -> list[str]:
    """Return the settings that all commands share."""
    settings = {
        "data.source": job / "data",
        "data.max_length": jobs.MAX_LENGTH,
        "data.cache_dir": cache,
        "model.name": job / "model",
        "batch.global_batch_size": jobs.BATCH,
        "optim.weight_decay": jobs.WEIGHT_DECAY,
        "optim.max_grad_norm": jobs.MAX_GRAD_NORM,
        "optim.epochs": 3,
        "engine.precision": "fp32",
        "engine.device": "cpu",
        "run.dir": output,
        "run.name": name,
        "report.write": "false",
    }
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, int, str]:
    """Run a process; return its seconds, its largest resident memory and its standard output."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{out[-2000:]}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024, out


class Benchmark:
    """The measurements, in their order, and the log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._job = options, options.output / "job"
        self._log = options.output / "log.jsonl"
        self._environment = child_environment(options.threads)
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def record(self, key: str, **figures: Any) -> None:
        """Write a line, and print it."""
        self.rows.setdefault(key, []).append(figures)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "load": round(os.getloadavg()[0], 2), **figures}) + "\n")
        print(f"{key}: {figures}", flush=True)

    def ours(self, key: str, cache: Path, *words: str) -> None:
        """Measure one command of ours; `words`: its name and what it has besides the common settings."""
        name = f"{key.replace(' ', '-')}-{len(self.rows.get(key, []))}"
        command = [
            sys.executable,
            "-m",
            "agnews_dist",
            words[0],
            *arguments(self._job, self._options.output / "runs", cache, name),
        ]
        seconds, peak, _ = measure([*command, *words[1:]], self._environment)
        figures: dict[str, Any] = {"seconds": round(seconds, 3), "peak_rss_bytes": peak, "command": " ".join(words)}
        report = self._options.output / "runs" / name / "sweep.json"
        if report.exists():
            figures["memory"] = json.loads(report.read_bytes())["memory"]
        results = sorted((self._options.output / "runs" / name / "members").glob("*.json"))
        if results:
            members = [json.loads(path.read_bytes()) for path in results]
            figures["member_seconds"] = [member["seconds"] for member in members]
            figures["steps"] = [member["num_steps"] for member in members]
        self.record(key, **figures)

    def trainer(self, number: int) -> None:
        """Measure Hugging Face Trainer with group_by_length."""
        work = self._options.output / "work"
        command = [sys.executable, str(BENCH / "fast_path/trainer.py"), str(self._job), str(work), "--epochs", "3"]
        seconds, peak, out = measure([*command, "--batches", "length"], self._environment)
        shutil.rmtree(work, ignore_errors=True)
        without_imports = json.loads(out.splitlines()[-1])["seconds"]
        figures = {"seconds": round(seconds, 3), "without_imports": without_imports, "peak_rss_bytes": peak}
        self.record("Trainer", **figures, number=number)

    def trainer_search(self, num_trials: int) -> None:
        """Measure Trainer's search with Optuna."""
        work = self._options.output / "work"
        script = str(BENCH / "fast_path/optuna_trainer.py")
        command = [sys.executable, script, str(self._job), str(work), "--epochs", "3", "--trials", str(num_trials)]
        seconds, peak, out = measure(command, self._environment)
        shutil.rmtree(work, ignore_errors=True)
        trials = json.loads(out.splitlines()[-1])["trial_seconds"]
        fixed = round(seconds - sum(trials), 3)
        self.record("Trainer with Optuna", seconds=round(seconds, 3), trial_seconds=trials, fixed=fixed, peak_rss_bytes=peak)

    def run(self) -> None:
        """Run everything, one process after the other."""
        quick = ["--quick"] if self._options.quick else []
        subprocess.run(
            [sys.executable, str(BENCH / "fast_path/job.py"), str(self._job), *quick], env=self._environment, check=True
        )
        # In a process of its own: the peak of a process on Linux begins with what the one that starts it has held.
        saving = multiprocessing.get_context("spawn").Process(target=save_weights, args=(self._job / "model",))
        saving.start()
        saving.join()
        if saving.exitcode:
            raise SystemExit("the model could not be written")
        for number in range(self._options.rounds):
            caches = [self._options.output / f"cache-{number}-{kind}" for kind in ("run", "sweep", "halving", "optuna")]
            sweep = ("sweep", "--optim.lr", RATES, "--run.seed", SEEDS)
            self.ours("one run", caches[0], "train", "--optim.lr", "1e-3")
            self.ours("15 members", caches[1], *sweep)
            self.ours("15 members halving", caches[2], *sweep, "--halving", "3")
            self.ours("15 members kept features", caches[1], *sweep)
            self.ours("3 members kept features", caches[1], "sweep", "--optim.lr", RATES)
            self.ours("15 members distilled", caches[1], *sweep, "--distil")
            search = ("sweep", "--optim.lr", "3e-4..3e-3", "--samples", str(NUM_MEMBERS), "--search", "optuna")
            self.ours("15 members by Optuna", caches[3], *search)
            for cache in caches:
                shutil.rmtree(cache, ignore_errors=True)
            shutil.rmtree(self._options.output / "runs", ignore_errors=True)
        for number in range(self._options.trainers):
            self.trainer(number)
        if self._options.trainers:
            self.trainer_search(self._options.trainers)

    def table(self) -> str:
        """Return the least seconds of each measurement, and the ratios."""
        best = {key: min(rows, key=lambda row: row["seconds"]) for key, rows in self.rows.items()}
        one = best["one run"]["seconds"]
        lines = ["| measurement | s | / one run | peak MiB |", "|---|---|---|---|"]
        for key, row in best.items():
            lines.append(
                f"| {key} | {row['seconds']:.2f} | {row['seconds'] / one:.2f} | {row['peak_rss_bytes'] / 2**20:,.0f} |"
            )
        kept = best["15 members kept features"]
        more = (kept["seconds"] - best["3 members kept features"]["seconds"]) / (NUM_MEMBERS - 3)
        pure = statistics.mean(kept["member_seconds"])
        lines += [
            "",
            f"one more member on kept features: {more:.3f} s, its pure training {pure:.3f} s, ratio {more / pure:.2f}",
        ]
        if "Trainer" in self.rows:
            mean = statistics.mean(row["seconds"] for row in self.rows["Trainer"])
            total, measured = NUM_MEMBERS * mean, len(self.rows["Trainer"])
            lines.append(f"15 Trainer trainings, from {measured} measured: {total:.0f} s")
            for key in ("15 members", "15 members halving"):
                lines.append(f"{key}: {total / best[key]['seconds']:.1f} times as fast")
            (search,) = self.rows["Trainer with Optuna"]
            total = search["fixed"] + NUM_MEMBERS * statistics.mean(search["trial_seconds"])
            lines.append(f"15 trials of Trainer with Optuna, from {len(search['trial_seconds'])} measured: {total:.0f} s")
            lines.append(f"15 members by Optuna: {total / best['15 members by Optuna']['seconds']:.1f} times as fast")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trainers", type=int, default=3, help="trainings of Hugging Face Trainer to measure")
    parser.add_argument("--quick", action="store_true", help="tiny model, few texts")
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True)
    benchmark = Benchmark(options)
    started = time.strftime("%F %T %Z")
    benchmark.record("job", command=" ".join(sys.argv), started=started, cpu=cpu_model(), versions=jobs.versions())
    del benchmark.rows["job"]
    benchmark.run()
    print(benchmark.table())


if __name__ == "__main__":
    main()
