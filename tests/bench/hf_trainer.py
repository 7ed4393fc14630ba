"""Hugging Face Trainer on the same job: the reference that `accuracy.py` compares with.

One process trains `GPT2ForSequenceClassification` with the same trainable parts (last block, final norm, head), data, batch
size, learning rate and schedule, and prints one JSON line: seed, validation accuracy and loss, seconds.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, GPT2ForSequenceClassification, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/, checkpoints/ (AGNEWS_SHARED)")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    start = time.perf_counter()
    checkpoint = args.shared / "checkpoints" / "gpt2-mini"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = load_dataset(str(args.shared / "data" / "ag_news"))
    rows = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=256), batched=True, remove_columns=["text"]
    )

    torch.manual_seed(args.seed)
    model = GPT2ForSequenceClassification.from_pretrained(checkpoint, num_labels=4, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    for part in (model.transformer.h[-1], model.transformer.ln_f, model.score):
        part.requires_grad_(True)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=64,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=args.seed,
            data_seed=args.seed,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())},
    )
    trainer.train()
    epochs = [e for e in trainer.state.log_history if "eval_accuracy" in e]
    best = max(epochs, key=lambda e: e["eval_accuracy"])
    print(
        json.dumps(
            {
                "what": "hf_trainer",
                "seed": args.seed,
                "accuracy": epochs[-1]["eval_accuracy"],
                "best_accuracy": best["eval_accuracy"],
                "accuracy_per_epoch": [e["eval_accuracy"] for e in epochs],
                "loss": epochs[-1]["eval_loss"],
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
