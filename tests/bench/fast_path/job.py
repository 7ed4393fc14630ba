"""The job that every contestant does, prepared on disk: the texts, the tokenizer, GPT-2's shape; and how a contestant reports.

    python job.py DIR [--quick]

DIR/model holds tokenizer and config.json, DIR/data the texts in the hub's layout, DIR/job.json what there is to compute.
"""

import argparse
import hashlib
import importlib
import json
import os
import resource
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

SHARED = Path(os.environ.get("AGNEWS_SHARED", Path(__file__).resolve().parents[4] / "shared"))
NUM_TEXTS = {"train": 256, "validation": 4}
"""Training needs a validation split; each of its texts costs ours time that is not taken off."""
NUM_QUICK_TEXTS = {"train": 64, "validation": 4}
SEED = 0
BATCH, LR, WEIGHT_DECAY, MAX_GRAD_NORM, MAX_LENGTH = 32, 1e-3, 0.01, 1.0, 256
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")

LATE = ("torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "deepspeed")


def versions() -> dict[str, str]:
    """Of Python and what decides the speed."""
    return {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}}


def import_late_ones(*more: str) -> None:
    """What torch and transformers import only at their first use, and `more`: no part of the job."""
    import torch

    if not torch.cuda.is_available():
        # Where it is installed, transformers imports DeepSpeed, which looks for a GPU and says so on standard output.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in (*LATE, *more):
        # What is not installed (scipy is nobody's requirement here) cannot be imported late either.
        with suppress(ImportError):
            importlib.import_module(name)


def packages_since(known_modules: set[str]) -> list[str]:
    """Top-level packages of what was imported since."""
    return sorted({name.partition(".")[0] for name in set(sys.modules) - known_modules})


def report(job: dict[str, Any], known_modules: set[str], **figures: Any) -> None:
    """Print a contestant's line. `known_modules`: the names in sys.modules when its clock was started."""
    import torch

    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures |= {
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "threads": torch.get_num_threads(),
        "late_imports": len(set(sys.modules) - known_modules),
        "texts_sha256": job["texts_sha256"],
        "versions": versions(),
    }
    print("\n" + json.dumps(figures), flush=True)


def load(directory: Path) -> dict[str, Any]:
    """What `prepare` wrote of the job."""
    return json.loads((directory / "job.json").read_text(encoding="utf-8"))


def real_rows(split: str) -> list[tuple[str, int]]:
    """A fixed choice of AG News rows."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(SHARED / "data" / "ag_news" / f"{split}-00000-of-00001.parquet").to_pydict()
    chosen = Random(SEED).sample(range(len(rows["text"])), NUM_TEXTS[split])
    return [(rows["text"][i], rows["label"][i]) for i in chosen]


def prepare(directory: Path, *, quick: bool) -> dict[str, Any]:
    """Write the job below `directory`; `quick`: a tiny model and few synthetic texts, from the repository alone."""
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer, GPT2Config

    from agnews_dist.data.synthetic import generate
    from agnews_dist.model.embedded import embedded_config, embedded_tokenizer

    if quick:
        tokenizer, config = embedded_tokenizer(), embedded_config()
        rows = {split: generate(count, SEED, split) for split, count in NUM_QUICK_TEXTS.items()}
    else:
        tokenizer, config = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2"), GPT2Config()
        rows = {split: real_rows(split) for split in NUM_TEXTS}
    (directory / "data").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory / "model")
    config.save_pretrained(directory / "model")
    lengths: dict[str, list[int]] = {}
    for split, found in rows.items():
        texts, labels = [text for text, _ in found], [label for _, label in found]
        table = pyarrow.table({"text": texts, "label": labels})
        pyarrow.parquet.write_table(table, directory / "data" / f"{split}-00000-of-00001.parquet")
        ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, split_special_tokens=True)["input_ids"]
        lengths[split] = [len(text) for text in ids]
    job = {
        "quick": quick,
        "texts": {split: len(found) for split, found in lengths.items()},
        "tokens": {split: sum(found) for split, found in lengths.items()},
        "longest": max(lengths["train"]),
        "texts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "blocks": config.n_layer,
        "width": config.n_embd,
        "settings": {"batch": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM},
        "max_length": MAX_LENGTH,
    }
    (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return job


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(json.dumps(prepare(args.directory, quick=args.quick)))
