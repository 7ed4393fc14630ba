"""A small classifier that Hugging Face loads, made without files."""

from pathlib import Path

import torch

from agnews_dist.data.synthetic import CLASS_NAMES
from agnews_dist.model.export import export_model
from agnews_dist.model.gpt2 import load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer


def save_classifier(directory: Path, *, max_length: int) -> None:
    """Export it with large head weights, so that predictions differ and a wrong order is seen."""
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=len(CLASS_NAMES), seed=0)
    with torch.no_grad():
        classifier.suffix.out_head.weight.mul_(20)
    export_model(directory, classifier, tokenizer, class_names=CLASS_NAMES, max_length=max_length, card="# card")
