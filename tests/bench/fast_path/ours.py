"""Ours: `agnews_dist.train` from its door to the saved model in one process, timed after all imports; one JSON line.

    python ours.py JOB OUTPUT --epochs 3 [--plain]

Evaluation is taken off the time, as result.json gives it. An epoch is what passes from the end of the evaluation before it to
its last step; the first begins with its first step, so that computing the frozen part is in no epoch but in `parts`.
"""

import argparse
import importlib
import json
import pkgutil
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import job as jobs

import agnews_dist

LATE = ("datasets", "docstring_parser", "torch.profiler", "scipy.io")


def import_everything() -> None:
    """The whole package, and what it and torch import only at the first use."""
    for module in pkgutil.walk_packages(agnews_dist.__path__, "agnews_dist."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    jobs.import_late_ones(*LATE)


def arguments(job: Path, output: Path, epochs: int, *, plain: bool) -> list[str]:
    """Of `python -m agnews_dist.train`."""
    settings = {
        "data.source": job / "data",
        "data.max_length": jobs.MAX_LENGTH,
        "data.cache_dir": output / "cache",
        "model.name": job / "model",
        "model.init": "random",
        "batch.global_batch_size": jobs.BATCH,
        "optim.lr": jobs.LR,
        "optim.weight_decay": jobs.WEIGHT_DECAY,
        "optim.max_grad_norm": jobs.MAX_GRAD_NORM,
        "optim.epochs": epochs,
        "engine.precision": "fp32",
        "engine.device": "cpu",
        "run.dir": output,
        "run.name": "run",
        "report.write": "false",
    }
    if plain:
        settings["engine.fast_path"] = "false"
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


def per_epoch(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Seconds, mean loss and tokens of each epoch, from what the run said."""
    epochs: list[dict[str, float]] = []
    scored_at: float | None = None
    steps: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "StepDone":
            steps.append(event)
        elif event["event"] == "EvalDone" and steps:
            begin = scored_at or at(steps[0]) - steps[0]["seconds"]
            examples = sum(step["num_examples"] for step in steps)
            epochs.append(
                {
                    "seconds": round(at(steps[-1]) - begin, 3),
                    "loss": sum(step["loss"] * step["num_examples"] for step in steps) / examples,
                    "tokens": sum(step["num_tokens"] for step in steps),
                }
            )
            scored_at, steps = at(event), []
    return epochs


def at(event: dict[str, Any]) -> float:
    """When it was said, in seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--plain", action="store_true", help="engine.fast_path false")
    args = parser.parse_args()
    import_everything()
    from agnews_dist.__main__ import main as run_command

    job, known = jobs.load(args.job), set(sys.modules)
    start = time.perf_counter()
    exit_code = run_command(["train", *arguments(args.job, args.output, args.epochs, plain=args.plain)])
    wall = time.perf_counter() - start
    if exit_code:
        sys.exit(exit_code)

    run = args.output / "run"
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (header,) = (event for event in events if event["event"] == "RunStarted")
    epochs = per_epoch(events)
    assert len(epochs) == args.epochs
    jobs.report(
        job,
        known,
        contestant="plain" if args.plain else "ours",
        epochs=args.epochs,
        seconds=round(wall - result["seconds"]["eval"], 3),
        epoch_seconds=[epoch["seconds"] for epoch in epochs],
        loss=[round(epoch["loss"], 4) for epoch in epochs],
        tokens_per_epoch=epochs[0]["tokens"],
        parts=result["seconds"],
        features=header["facts"]["features"],
        trainable_parameters=sum(trainable for trainable, _ in header["parameters"].values()),
        late_modules=jobs.packages_since(known),
    )


if __name__ == "__main__":
    main()
