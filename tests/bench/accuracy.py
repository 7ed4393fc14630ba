"""Accuracy on the shared real rows with the shared small trained GPT-2: ours, a random start, Hugging Face Trainer.

    python tests/bench/accuracy.py --output DIR [--what ours random hf_trainer] [--seeds 0 1 2] [--vary optim.lr=3e-3 ...]

Every run is a process of its own with the same settings (batch 32, AdamW, learning rate 1e-3 with linear decay, weight decay
0.01, clipping at 1.0, three epochs, last block + final norm + head). One JSON line per run goes to DIR/log.jsonl and to the
screen; a table of means and standard errors ends it. The figures belong in RESULTS.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {"batch.global_batch_size": "32", "optim.lr": "1e-3", "optim.epochs": "3", "optim.weight_decay": "0.01"}


def ours(shared: Path, output: Path, init: str, seed: int, ranks: int, settings: dict[str, str]) -> dict[str, object]:
    """Train with `torchrun --nproc_per_node=ranks -m agnews_dist.train` and read its result.json."""
    name = f"{init}-{seed}"
    arguments = ["--model.name", str(shared / "checkpoints" / "gpt2-mini"), "--model.init", init]
    arguments += ["--data.source", str(shared / "data" / "ag_news"), "--run.seed", str(seed)]
    arguments += ["--run.dir", str(output), "--run.name", name, "--run.overwrite", "--report.write", "false"]
    arguments += [part for key, value in settings.items() for part in (f"--{key}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    subprocess.run([*launcher, "-m", "agnews_dist.train", *arguments], check=True, cwd=REPOSITORY, stdout=sys.stderr)
    result = json.loads((output / name / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (output / name / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    per_epoch = [event["accuracy"] for event in events if event["event"] == "EvalDone"]
    validation = result["splits"]["validation"]
    return {
        "accuracy": per_epoch[-1],
        "best_accuracy": validation["accuracy"],
        "accuracy_per_epoch": per_epoch,
        "loss": validation["loss"],
        "seconds": result["seconds"],
        "critical_path_efficiency": result["critical_path_efficiency"],
    }


def hf_trainer(shared: Path, output: Path, seed: int) -> dict[str, object]:
    """The same job by Hugging Face Trainer, one process."""
    script = Path(__file__).with_name("hf_trainer.py")
    command = [sys.executable, str(script), "--shared", str(shared), "--seed", str(seed), "--output", str(output / "hf")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--what", nargs="+", default=["ours", "random", "hf_trainer"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--vary", nargs="*", default=[], metavar="KEY=VALUE", help="settings of ours that differ")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    shared = Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared"))
    args.output.mkdir(parents=True, exist_ok=True)
    varied = dict(pair.split("=", 1) for pair in args.vary)
    found: dict[str, list[float]] = {}
    for what in args.what:
        for seed in args.seeds:
            start = time.perf_counter()
            if what == "hf_trainer":
                row = hf_trainer(shared, args.output, seed)
            else:
                init = "pretrained" if what == "ours" else "random"
                row = ours(shared, args.output, init, seed, args.ranks, SETTINGS | varied)
            row = {"what": what, "varied": varied, "seed": seed, **row, "wall_seconds": round(time.perf_counter() - start, 1)}
            found.setdefault(what, []).append(float(str(row["best_accuracy"])))
            print(json.dumps(row), flush=True)
            with (args.output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
    for what, values in found.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"{what:<12} best-epoch accuracy {statistics.mean(values):.4f} +- {error:.4f} ({len(values)} seeds)")


if __name__ == "__main__":
    main()
