"""Hugging Face Trainer on the same job, from tokenising to the saved model, timed after all imports; one JSON line.

    python trainer.py JOB OUTPUT --epochs 3 --batches length

The options below are what `run.py --settings` tries; their defaults are what the comparison runs with.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import job as jobs
import pyarrow.parquet
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

FIXED_LENGTH = 128


class Laps(TrainerCallback):
    """Seconds of every epoch and step."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.steps.append(round(now - self.last, 3))
        self.last = now

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.epochs.append(round(time.perf_counter() - self.begin, 3))


def tokenised(job: Path, tokenizer: Any, *, fixed: bool, limit: int | None) -> Dataset:
    """The training texts; `fixed`: all padded to one length."""
    rows = pyarrow.parquet.read_table(job / "data" / "train-00000-of-00001.parquet").to_pydict()
    length = {"padding": "max_length", "max_length": FIXED_LENGTH} if fixed else {"max_length": jobs.MAX_LENGTH}
    columns = dict(tokenizer(rows["text"][:limit], truncation=True, **length))
    lengths = [len(ids) for ids in columns["input_ids"]]
    return Dataset.from_dict({**columns, "label": rows["label"][:limit], "length": lengths})


def build_model(directory: Path, tokenizer: Any, *, attention: str, activation: str | None) -> Any:
    """GPT-2 with random weights; the last block, the final norm and the head train."""
    config = GPT2Config.from_pretrained(directory, num_labels=4, use_cache=False, attn_implementation=attention)
    if activation is not None:
        config.activation_function = activation
    model = GPT2ForSequenceClassification(config)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    for part in (model.transformer.h[-1], model.transformer.ln_f, model.score):
        part.requires_grad_(True)
    return model


def without_dropout_where_frozen(model: Any) -> None:
    """No dropout below the last block, as ours has it. Trainer has no setting for this."""
    for part in (model.transformer.drop, *model.transformer.h[:-1]):
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


def training_arguments(output: Path, epochs: int, **more: Any) -> TrainingArguments:
    """The settings of the job, and `more`."""
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=jobs.BATCH,
        num_train_epochs=epochs,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=jobs.WEIGHT_DECAY,
        max_grad_norm=jobs.MAX_GRAD_NORM,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batches", choices=["length", "random", "fixed"], required=True)
    parser.add_argument("--limit", type=int, help="only so many texts")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--activation", help="default: GPT-2's gelu_new, step by step")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quiet-frozen", action="store_true", help="no dropout in what is frozen")
    args = parser.parse_args()
    jobs.import_late_ones()

    job, known, laps = jobs.load(args.job), set(sys.modules), Laps()
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.job / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = tokenised(args.job, tokenizer, fixed=args.batches == "fixed", limit=args.limit)
    tokenized_at = time.perf_counter()
    torch.manual_seed(jobs.SEED)
    model = build_model(args.job / "model", tokenizer, attention=args.attention, activation=args.activation)
    if args.quiet_frozen:
        without_dropout_where_frozen(model)
    trainer = Trainer(
        model=model,
        args=training_arguments(
            args.output,
            args.epochs,
            learning_rate=jobs.LR,
            optim=args.optim,
            seed=jobs.SEED,
            train_sampling_strategy="group_by_length" if args.batches == "length" else "random",
            dataloader_num_workers=args.workers,
            dataloader_persistent_workers=args.workers > 0,
            torch_compile=args.compile,
            eval_strategy="no",
            logging_strategy="epoch",
            logging_nan_inf_filter=False,
        ),
        train_dataset=rows,
        data_collator=default_data_collator if args.batches == "fixed" else DataCollatorWithPadding(tokenizer),
        callbacks=[laps],
    )
    built_at = time.perf_counter()
    trainer.train()
    trained_at = time.perf_counter()
    trainer.save_model()
    tokenizer.save_pretrained(args.output)
    end = time.perf_counter()

    jobs.report(
        job,
        known,
        contestant=args.batches,
        epochs=args.epochs,
        seconds=round(end - start, 3),
        epoch_seconds=laps.epochs,
        step_seconds=laps.steps,
        loss=[round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        parts={
            "tokenize": round(tokenized_at - start, 3),
            "model": round(built_at - tokenized_at, 3),
            "train": round(trained_at - built_at, 3),
            "save": round(end - trained_at, 3),
        },
        trainable_parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        late_modules=jobs.packages_since(known),
    )


if __name__ == "__main__":
    main()
