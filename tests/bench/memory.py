"""The memory estimate against the measured peak: whole runs of `agnews_dist.train` on random GPT-2 of a given size.

    PYTHONPATH=. python tests/bench/memory.py LOG.jsonl --tokenizer DIR [--only NAME ...]

Every case is a process (or several, under torchrun) of its own with fp32 weights drawn at random: two epochs of two steps of
synthetic text cut to equal lengths, so that micro-batches are as large as they may be, then scoring and the export. Estimate:
what the run's header says. Peak: `peak_memory_bytes` of its result.json, the largest of all ranks. On a CPU both hold
interpreter and libraries. `--tokenizer`: a directory with GPT-2's.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import GPT2Config

from agnews_dist.report.result_files import versions

SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "xl": (1600, 48, 25)}
"""Width, blocks, heads."""
CASES: dict[str, tuple[str, int, list[str]]] = {
    "small, 1 block": ("small", 1, ["--model.trainable_blocks", "1"]),
    "small, all": ("small", 1, ["--model.trainable_blocks", "all"]),
    "medium, 1 block": ("medium", 1, ["--model.trainable_blocks", "1"]),
    "medium, 6 blocks": ("medium", 1, ["--model.trainable_blocks", "6"]),
    "medium, all": ("medium", 1, ["--model.trainable_blocks", "all"]),
    "medium, all, checkpointing": (
        "medium",
        1,
        ["--model.trainable_blocks", "all", "--engine.activation_checkpointing", "true"],
    ),
    "xl, 1 block": ("xl", 1, ["--model.trainable_blocks", "1"]),
    "xl, 4 blocks": ("xl", 1, ["--model.trainable_blocks", "4"]),
    **{
        f"medium, 12 blocks, 2 ranks, {engine}": ("medium", 2, ["--model.trainable_blocks", "12", *flags])
        for engine, flags in {
            "ddp": [],
            "fsdp": ["--engine.backend", "fsdp"],
            "ZeRO-1": ["--engine.backend", "deepspeed", "--engine.zero_stage", "1"],
            "ZeRO-2": ["--engine.backend", "deepspeed"],
            "ZeRO-3": ["--engine.backend", "deepspeed", "--engine.zero_stage", "3"],
            "ZeRO-3, offload all": (["--engine.backend", "deepspeed", "--engine.zero_stage", "3", "--engine.offload", "all"]),
        }.items()
    },
}


def model_directory(tokenizer: Path, size: str, below: Path) -> Path:
    width, blocks, heads = SIZES[size]
    directory = below / size
    directory.mkdir()
    GPT2Config(n_embd=width, n_layer=blocks, n_head=heads).save_pretrained(directory)
    for path in tokenizer.glob("*"):
        if path.name != "config.json":
            (directory / path.name).symlink_to(path.resolve())
    return directory


def measure(name: str, tokenizer: Path) -> dict[str, object]:
    size, num_ranks, flags = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        below = Path(temporary)
        command = [sys.executable, "-m", "agnews_dist.train"]
        if num_ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
            command = [sys.executable, *launcher, "-m", "agnews_dist.train"]
        command += ["--model.name", str(model_directory(tokenizer, size, below)), "--model.init", "random"]
        command += ["--data.source", "synthetic", "--data.limit_train", str(256 * num_ranks), "--data.limit_validation", "32"]
        command += ["--data.limit_test", "32", "--data.cache_dir", str(below / "cache"), "--optim.epochs", "2"]
        command += ["--batch.max_tokens_per_rank", "3072", "--data.max_length", "24", "--engine.device", "cpu"]
        command += [
            "--batch.global_batch_size",
            str(128 * num_ranks),
            "--run.dir",
            str(below),
            "--run.name",
            "run",
            "--report.write",
            "false",
        ]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        said = re.search(r"about ([\d.]+) (GB|MB) per rank: (.*)", done.stdout)
        assert said is not None, done.stdout
        result = json.loads((below / "run" / "result.json").read_text())
    estimated = float(said[1]) * (1e9 if said[2] == "GB" else 1e6)
    peak = result["peak_memory_bytes"]
    return {"case": name, "estimate": estimated, "peak": peak, "ratio": round(estimated / peak, 3), "parts": said[3]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    given = parser.parse_args()
    with given.log.open("a", encoding="utf-8") as log:
        allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        log.write(json.dumps({"versions": versions(), "allocator": allocator}) + "\n")
        for name in given.only:
            line = json.dumps(measure(name, given.tokenizer))
            print(line, flush=True)
            print(line, file=log, flush=True)


if __name__ == "__main__":
    main()
