"""What a checkpoint costs: bytes, seconds until it is on the disk, and how long training stands still, against other programs.

    OMP_NUM_THREADS=2 PYTHONPATH=. python tests/bench/checkpoints.py --directory DIR [--layers 12] [--width 768] [--rounds 5]

GPT-2's shape with random weights; the last block, the final norm and a head train, after one step of AdamW. Taking turns:
ours (`CheckpointManager`), accelerate's `save_state`, Trainer's `_save_checkpoint`. Ours fsyncs all files and directories
and writes a manifest; the others leave the bytes to the page cache, so a third figure is theirs with `os.sync()` after it.
Then a training loop with kept features, with a checkpoint every `--every` steps and without any, taking turns: the ratio is
what saving costs. JSON lines.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model, Trainer, TrainingArguments

from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.model.gpt2 import Backbone, split_model
from agnews_dist.report.event_log import EventLog
from agnews_dist.report.result_files import versions
from agnews_dist.training.best_weights import BestWeights
from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings
from agnews_dist.training.optim import build_optimizer

TEXTS, TOKENS, CLASSES = 32, 56, 4


def config_of(layers: int, width: int) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, num_labels=CLASSES, pad_token_id=50256)


class Ours:
    """The trained part of the shape, as a run has it, and its checkpoints."""

    def __init__(self, config: GPT2Config, directory: Path, *, every_steps: int | None = None) -> None:
        engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        suffix = split_model(Backbone(GPT2Model(config), None, None), trainable_blocks=1, num_classes=CLASSES, seed=0).suffix
        optimizer = build_optimizer(suffix, lr=1e-4, weight_decay=0.01)
        self.strategy = engine.prepare(suffix, optimizer, max_grad_norm=1.0)
        directory.mkdir(parents=True)
        self.manager = CheckpointManager(
            lambda: directory / "checkpoints",
            self.strategy,
            CheckpointSettings(keep=2, every_steps=every_steps, every_minutes=None),
            metadata={},
            log=EventLog(directory / "events.jsonl"),
            emit=lambda event: None,
        )
        self.best, self.num_steps = BestWeights(self.strategy), 0
        self.hidden_BTD = torch.randn(TEXTS, TOKENS, config.n_embd)
        self.lengths_B, self.labels_B = torch.full((TEXTS,), TOKENS), torch.arange(TEXTS) % CLASSES

    def step(self) -> None:
        with self.strategy.accumulate(is_last=True):
            logits_BC = self.strategy(self.hidden_BTD, self.lengths_B)
            self.strategy.backward(nn.functional.cross_entropy(logits_BC, self.labels_B))
        self.strategy.update()
        self.num_steps += 1

    def save(self) -> None:
        self.manager.save(self.num_steps, {}, self.best, is_scored=False)


class Texts(Dataset):
    def __len__(self) -> int:
        return TEXTS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((TOKENS,), index + 1), "labels": torch.tensor(index % CLASSES)}


def huggingface(config: GPT2Config) -> GPT2ForSequenceClassification:
    model = GPT2ForSequenceClassification(config)
    model.requires_grad_(False)
    for part in (model.transformer.h[-1], model.transformer.ln_f, model.score):
        part.requires_grad_(True)
    return model


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    for name, default in (("layers", 12), ("width", 768), ("rounds", 5), ("steps", 60), ("every", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    given.directory.mkdir(parents=True)
    config = config_of(given.layers, given.width)
    print(json.dumps({**vars(given), "directory": None, "threads": torch.get_num_threads(), "versions": versions()}))
    compare_saves(given, config)
    compare_loops(given, config)


def compare_saves(given: argparse.Namespace, config: GPT2Config) -> None:
    ours = Ours(config, given.directory / "ours")
    ours.step()
    ours.save()  # allocates the buffers
    ours.manager.wait()

    accelerator, theirs = Accelerator(cpu=True), huggingface(config)
    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    model, optimizer = accelerator.prepare(theirs, torch.optim.AdamW(trained, lr=1e-4))
    tokens = torch.stack([Texts()[index]["input_ids"] for index in range(TEXTS)])
    accelerator.backward(model(input_ids=tokens, labels=torch.arange(TEXTS) % CLASSES).loss)
    optimizer.step()

    arguments = TrainingArguments(
        str(given.directory / "trainer"),
        max_steps=1,
        per_device_train_batch_size=TEXTS,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        save_total_limit=2,
    )
    trainer = Trainer(huggingface(config), arguments, train_dataset=Texts())
    trainer.train()

    found: dict[str, dict[str, list[float]]] = {}
    for number in range(given.rounds):
        os.sync()
        ours.num_steps += 1
        stall = seconds_of(ours.save)
        durable = stall + seconds_of(ours.manager.wait)
        newest = given.directory / "ours" / "checkpoints" / f"step-{ours.num_steps:08d}"
        note(found, "ours", stall, durable, size_of(newest))

        os.sync()
        place = given.directory / f"accelerate-{number}"
        stall = seconds_of(lambda place=place: accelerator.save_state(str(place)))
        note(found, "accelerator.save_state", stall, stall + seconds_of(os.sync), size_of(place))
        shutil.rmtree(place)

        os.sync()
        trainer.state.global_step = number + 2
        stall = seconds_of(lambda: trainer._save_checkpoint(trainer.model, trial=None))
        place = given.directory / "trainer" / f"checkpoint-{number + 2}"
        note(found, "Trainer", stall, stall + seconds_of(os.sync), size_of(place))
    for name, figures in found.items():
        medians = {f"median_{key}": round(median(values), 4) for key, values in figures.items()}
        ratios = {f"{key}_over_ours": round(median(values) / median(found["ours"][key]), 2) for key, values in figures.items()}
        print(json.dumps({"save": name, **medians, **ratios, "all": figures}), flush=True)


def note(found: dict[str, dict[str, list[float]]], name: str, stall: float, durable: float, num_bytes: int) -> None:
    for key, value in {"stall": stall, "durable": durable, "bytes": num_bytes}.items():
        found.setdefault(name, {}).setdefault(key, []).append(round(value, 5))


def compare_loops(given: argparse.Namespace, config: GPT2Config) -> None:
    found: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(given.rounds):
        for name in found:
            every = given.every if name == "with" else None
            ours = Ours(config, given.directory / f"loop-{name}-{number}", every_steps=every)
            for _ in range(3):
                ours.step()
            ours.num_steps = 0
            begin = time.perf_counter()
            for _ in range(given.steps):
                ours.step()
                if every is not None and ours.manager.is_due(ours.num_steps):
                    ours.save()
            found[name].append(round(time.perf_counter() - begin, 4))
            ours.manager.wait()
            shutil.rmtree(given.directory / f"loop-{name}-{number}")
    ratio = round(median(found["with"]) / median(found["without"]), 4)
    print(json.dumps({"loop": found, "checkpoints": given.steps // given.every, "median_with_over_without": ratio}))


if __name__ == "__main__":
    main()
