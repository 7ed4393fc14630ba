"""A whole `train` command against a plain torch loop with Hugging Face's classifier: weighted, smoothed, cut by max_steps.

With `model.freeze_schedule` the loop calls `requires_grad_(False)` at the begin of an epoch. The model has no dropout.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_run
from support.events import read_events
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings

NUM_STEPS, NUM_WARMUP, LR, SMOOTHING, CLIP, CLASSES = 30, 6, 3e-3, 0.15, 0.5, 4
OPTIONS = {
    "optim.class_weights": "balanced",
    "optim.label_smoothing": SMOOTHING,
    "optim.max_steps": NUM_STEPS,
    "optim.evaluate_every": 100,
    "optim.warmup_ratio": NUM_WARMUP / NUM_STEPS,
    "optim.schedule": "cosine",
    "optim.lr": LR,
    "optim.max_grad_norm": CLIP,
    "batch.max_tokens_per_rank": 250,
}
Rows = list[dict[str, Any]]


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_inputs(directory: Path) -> tuple[Path, Path]:
    """Write imbalanced rows and a classifier without dropout, whose head the training keeps."""
    source, model, rows = small_run.write_inputs(), directory / "model", directory / "rows"
    shutil.copytree(source / "model", model)
    shutil.copytree(source / "rows", rows)
    kept = [row for i, row in enumerate(read_rows(rows / "train.jsonl")) if i % (3 * row["label"] + 1) == 0]
    (rows / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    shape = json.loads((model / "config.json").read_text())
    config = GPT2Config(**shape | {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "num_labels": CLASSES})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        classifier = GPT2ForSequenceClassification(config)
    classifier.transformer.load_state_dict(load_file(model / "model.safetensors"))
    # Not `save_pretrained`: that imports an installed DeepSpeed, which prints.
    config.architectures = [type(classifier).__name__]
    config.save_pretrained(model)
    save_file(classifier.state_dict(), model / "model.safetensors", metadata={"format": "pt"})
    return model, rows


def encode(tokenizer: Any, rows: Rows) -> dict[str, torch.Tensor]:
    options = {"padding": True, "truncation": True, "max_length": small_run.MAX_LENGTH, "return_tensors": "pt"}
    return dict(tokenizer([row["text"] for row in rows], **options))


def train_reference(
    directory: Path, rows: Rows, test: Rows, schedule: Sequence[int]
) -> tuple[list[float], np.ndarray, dict[str, torch.Tensor]]:
    """Train Hugging Face's module; return the loss of each step, the probabilities of `test`, and the weights.

    `schedule`: trained blocks of each epoch; the last number repeats.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token  # no text holds it
    model = GPT2ForSequenceClassification.from_pretrained(directory, pad_token_id=tokenizer.pad_token_id)
    # Its own head has no bias, and ours begins with zeros.
    weight = model.score.weight.detach().clone()
    model.score = torch.nn.Linear(weight.shape[1], CLASSES)
    model.score.load_state_dict({"weight": weight, "bias": torch.zeros(CLASSES)})
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[: -schedule[0]].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = {"params": [each for each in trained if each.ndim > 1], "weight_decay": 0.01}
    optimizer = torch.optim.AdamW([decayed, {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0}])
    inputs, labels_N = encode(tokenizer, rows), torch.tensor([row["label"] for row in rows])
    weights_C = len(rows) / (CLASSES * torch.bincount(labels_N).float())
    assert weights_C.max() > 3 * weights_C.min()
    settings, lengths_N = PlanSettings(global_batch_size=small_run.GLOBAL_BATCH), inputs["attention_mask"].sum(1).numpy()
    batches = [(epoch, ids) for epoch in range(9) for ids in plan(lengths_N, settings, epoch=epoch).global_batches()]
    assert batches[NUM_STEPS][0] >= len(schedule)
    losses = []
    for step, (epoch, batch) in enumerate(batches[:NUM_STEPS]):
        ids = torch.as_tensor(np.array(batch))
        model.transformer.h[: -schedule[min(epoch, len(schedule) - 1)]].requires_grad_(False)
        decay = 0.5 * (1 + math.cos(math.pi * (step - NUM_WARMUP) / (NUM_STEPS - NUM_WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = LR * ((step + 1) / NUM_WARMUP if step < NUM_WARMUP else decay)
        optimizer.zero_grad()
        logits_BC = model(**{name: value[ids] for name, value in inputs.items()}).logits
        options = {"weight": weights_C, "label_smoothing": SMOOTHING}
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_N[ids], **options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        probabilities_NC = model(**encode(tokenizer, test)).logits.double().softmax(1).numpy()
        return losses, probabilities_NC, model.state_dict()


@pytest.mark.parametrize(("schedule", "num_ranks"), [("1", 2), ("2,1", 1), ("2,1", 2)])
def test_train_equals_a_plain_loop(tmp_path: Path, schedule: str, num_ranks: int) -> None:
    model, rows = write_inputs(tmp_path)
    words = [str(word) for key, value in OPTIONS.items() for word in (f"--{key}", value)]
    files = ("--model.name", str(model), "--data.source", str(rows))
    blocks = [int(number) for number in schedule.split(",")]
    freezing = ("--model.trainable_blocks", str(blocks[0]))
    if len(blocks) > 1:
        freezing = (*freezing, "--model.freeze_schedule", schedule)
    run = small_run.finish(tmp_path, *files, *words, *freezing, num_ranks=num_ranks)
    of_train, of_test = (read_rows(rows / f"{split}.jsonl") for split in ("train", "test"))
    losses, expected_NC, weights = train_reference(model, of_train, of_test, blocks)
    found = [row["probabilities"] for row in read_rows(run / "predictions-test.jsonl")]
    np.testing.assert_allclose(found, expected_NC, rtol=0, atol=1e-5)
    assert [event["loss"] for event in read_events(run / "events.jsonl", "StepDone")] == pytest.approx(losses, abs=1e-5)
    # Of the key's bias the true gradient is zero, and Adam makes full steps of its rounding errors.
    exported = load_file(run / "model" / "model.safetensors")
    for name in weights:
        if name.startswith("transformer.h.") and not name.endswith("attn.bias"):
            torch.testing.assert_close(
                exported[name], weights[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
