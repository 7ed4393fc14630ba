"""Hugging Face Trainer's own search with Optuna on the same job; one JSON line with the seconds of each trial.

python optuna_trainer.py JOB OUTPUT --trials 3 --epochs 3
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import job as jobs
from trainer import build_model, tokenised, training_arguments
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.job / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = tokenised(args.job, tokenizer, fixed=False, limit=None)
    ends = [time.perf_counter()]

    def record_end(_: Any) -> float:
        ends.append(time.perf_counter())
        return 0.0

    trainer = Trainer(
        model_init=lambda _: build_model(args.job / "model", tokenizer, attention="sdpa", activation=None),
        args=training_arguments(
            args.output,
            args.epochs,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            per_device_eval_batch_size=jobs.BATCH,
            eval_strategy="epoch",
        ),
        train_dataset=rows,
        # A few rows, as ours has for validation.
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 3e-4, 3e-3, log=True)},
        compute_objective=record_end,
        n_trials=args.trials,
        backend="optuna",
        direction="minimize",
    )
    # One evaluation after each epoch.
    seconds = [round(end - begin, 3) for begin, end in pairwise(ends[:: args.epochs])]
    print("\n" + json.dumps({"trial_seconds": seconds, "versions": jobs.versions(), "argv": sys.argv[1:]}))


if __name__ == "__main__":
    main()
