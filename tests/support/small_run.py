"""A training of some seconds on generated text and a random model, and its results that no interruption may change."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2Model

from agnews_dist.data.synthetic import generate
from agnews_dist.model.embedded import embedded_tokenizer, scale_embeddings
from support.jobs import NUM_RANKS, ForkedJob
from support.processes import TIMEOUT, wait_until
from support.timeline import Timeline

EPOCHS = 2
RANK_TIMEOUT = 10
"""engine.timeout_seconds: a rank that is silent for this long has failed."""
SIZES = {"train": 608, "validation": 150, "test": 150}
MAX_LENGTH = 64
GLOBAL_BATCH = 16
EPOCH_STEPS = SIZES["train"] // GLOBAL_BATCH
NUM_STEPS = EPOCHS * EPOCH_STEPS


@cache
def write_inputs() -> Path:
    """Write `rows` and `model` to a new directory, removed at the end of this process.

    With `synthetic` and `embedded` every rank would generate the text and train the tokenizer again, half of its CPU time.
    """
    directory = Path(tempfile.mkdtemp(prefix="small-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / "rows").mkdir()
    for split, size in SIZES.items():
        rows = [json.dumps({"text": text, "label": label}) for text, label in generate(size, 0, split)]
        (directory / "rows" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tokenizer = embedded_tokenizer()
    tokenizer.save_pretrained(directory / "model")
    shape = {"n_positions": MAX_LENGTH, "n_embd": 96, "n_layer": 3, "n_head": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2Model(GPT2Config(vocab_size=len(tokenizer), **shape, bos_token_id=0, eos_token_id=0))
    scale_embeddings(model)
    # Not `save_pretrained`: that imports an installed DeepSpeed, which prints.
    model.config.save_pretrained(directory / "model")
    save_file(model.state_dict(), directory / "model" / "model.safetensors", metadata={"format": "pt"})
    return directory


def run_directory(directory: Path) -> Path:
    """Return the directory of the run `small` below `directory`."""
    return directory / "runs" / "small"


def settings() -> dict[str, object]:
    """Return the settings of the training, without its duration and places."""
    return {
        "data.source": str(write_inputs() / "rows"),
        "data.max_length": MAX_LENGTH,
        "model.name": str(write_inputs() / "model"),
        "batch.global_batch_size": GLOBAL_BATCH,
        "optim.lr": 2e-3,
    }


def arguments(directory: Path, *more: str) -> list[str]:
    """Return the command line of the run; options in `more` win."""
    return [
        *(word for key, value in settings().items() for word in (f"--{key}", str(value))),
        *("--optim.epochs", str(EPOCHS), "--checkpoint.every_steps", "7", "--engine.timeout_seconds", str(RANK_TIMEOUT)),
        *("--run.dir", str(directory / "runs"), "--run.name", "small", "--data.cache_dir", str(directory / "cache")),
        *("--report.write", "false"),
        *more,
    ]


def start(directory: Path, *more: str, num_ranks: int = NUM_RANKS, fault: str = "", **environ: str) -> ForkedJob:
    """Start an attempt; its ranks write to `directory`/log.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    log.unlink(missing_ok=True)
    return ForkedJob(arguments(directory, *more), log, num_ranks, fault=fault, **environ)


def read_log(directory: Path) -> str:
    """Return the output of the last attempt."""
    log = directory / "log.txt"
    return log.read_text() if log.exists() else ""


def wait_for(job: ForkedJob, directory: Path, codes: Sequence[int] | int = 0, timeout: float = TIMEOUT) -> str:
    """Wait for an end with these exit codes (one for all ranks, or one per rank); return the output."""
    try:
        if not wait_until(job.has_ended, timeout, every=0.05):
            job.kill(with_stacks=True)
            raise AssertionError(f"not ended after {timeout:.0f} s:\n{read_log(directory)[-8000:]}")
        expected = [codes] * len(job.pids) if isinstance(codes, int) else list(codes)
        assert job.codes() == expected, f"exit codes {job.codes()}:\n{read_log(directory)[-8000:]}"
    finally:
        job.kill()
    return read_log(directory)


def finish(directory: Path, *more: str, num_ranks: int = NUM_RANKS, fault: str = "", **environ: str) -> Path:
    """Run an attempt to its end; return the run's directory."""
    wait_for(start(directory, *more, num_ranks=num_ranks, fault=fault, **environ), directory)
    return run_directory(directory)


def read_results(run: Path) -> dict[str, Any]:
    """Return all results of a run that do not depend on the time."""
    timeless = [
        {key: value for key, value in event.items() if key not in ("time", "seconds")}
        for event in Timeline(run).events()
        if event["event"] in ("StepDone", "EvalDone", "NonFinite")
    ]
    return {
        "weights": (run / "model" / "model.safetensors").read_bytes(),
        "predictions": [path.read_bytes() for path in sorted(run.glob("predictions-*.jsonl"))],
        "scores": json.loads((run / "result.json").read_text())["splits"],
        "steps": timeless,
        "status": json.loads((run / "status.json").read_text())["state"],
    }


def differences(run: Path, other: Path) -> list[str]:
    """Return the names of results that differ. pytest would compare megabytes of contents line by line."""
    left, right = read_results(run), read_results(other)
    return [name for name in left if left[name] != right[name]]


def read_status(directory: Path) -> dict[str, Any]:
    """Return status.json of the run below `directory`."""
    return json.loads((run_directory(directory) / "status.json").read_text())
