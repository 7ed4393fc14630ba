"""Tiny saved GPT-2s in Hugging Face's layout, with tokenizers and files that people bring."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from agnews_dist.model.embedded import END_OF_TEXT, embedded_tokenizer


def save_tiny_model(
    directory: Path, *, num_classes: int = 0, template: str | None = None, **changes: Any
) -> GPT2ForSequenceClassification | GPT2LMHeadModel:
    """Save a language model, or a classifier; `template`: of the tokenizer's post-processor. `changes`: of config.json.

    A key of `tokenizer_` changes tokenizer_config.json.
    """
    tokenizer = embedded_tokenizer()
    if template:
        special = [(END_OF_TEXT, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer.save_pretrained(directory)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_head=2, n_layer=2, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, **({"num_labels": num_classes} if num_classes else {}),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(config) if num_classes else GPT2LMHeadModel(config)
    model.save_pretrained(directory)
    edit_json(directory / "config.json", **{key: value for key, value in changes.items() if not key.startswith("tokenizer_")})
    own = {key.removeprefix("tokenizer_"): value for key, value in changes.items() if key.startswith("tokenizer_")}
    edit_json(directory / "tokenizer_config.json", **own)
    return model.eval()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes, indent=1), encoding="utf-8")


def rename_weights(directory: Path, prefix: str, *, inner: str = "", as_bin: bool = False) -> None:
    """Put a prefix before every weight's name, and `inner` after `transformer.`; `as_bin`: in pytorch_model.bin."""
    path = directory / "model.safetensors"
    state = {prefix + name.replace("transformer.", f"transformer.{inner}"): weight for name, weight in load_file(path).items()}
    path.unlink()
    if as_bin:
        torch.save(state, directory / "pytorch_model.bin")
    else:
        save_file(state, path, metadata={"format": "pt"})


def keep_lm_head_only(directory: Path) -> None:
    """Store the tied weights under the head's name alone."""
    path = directory / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, path, metadata={"format": "pt"})
