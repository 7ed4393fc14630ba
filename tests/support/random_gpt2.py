"""A small Hugging Face GPT-2 with random weights, our classifier with the same weights, and ragged batches."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from agnews_dist.model.gpt2 import Backbone, Classifier, split_model

RELATIVE = 1e-5
NUM_CLASSES = 4


def random_reference(*, attention: str = "sdpa", **changes: object) -> GPT2ForSequenceClassification:
    """Return a small GPT-2 with random norms and biases, so that a test notices if one is left out."""
    shape: dict[str, object] = {
        "vocab_size": 97,
        "n_positions": 32,
        "n_embd": 24,
        "n_layer": 4,
        "n_head": 3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "num_labels": NUM_CLASSES,
        "attn_implementation": attention,
    }
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        model = GPT2ForSequenceClassification(GPT2Config(**(shape | changes)))
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def ours_like(
    reference: GPT2ForSequenceClassification, trainable_blocks: int | str, *, fast_path: bool = True, **options: Any
) -> Classifier:
    """Return a classifier with copies of the reference's weights; `options`: of `split_model`."""
    pooling = options.get("pooling", "last")
    backbone = Backbone(copy.deepcopy(reference.transformer), reference.score.weight.detach().clone(), None, pooling=pooling)
    classifier = split_model(backbone, trainable_blocks=trainable_blocks, num_classes=NUM_CLASSES, seed=0, **options)  # type: ignore[arg-type]
    classifier.use_fast_path(fast_path)
    return classifier


def ragged_batch(lengths: list[int], *, low: int, high: int, pad_id: int, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return random right-padded tokens_BT with ids in [low, high), and lengths_B; `extra`: additional columns of padding."""
    generator = torch.Generator().manual_seed(7)
    tokens_BT = torch.randint(low, high, (len(lengths), max(lengths) + extra), generator=generator)
    lengths_B = torch.tensor(lengths)
    tokens_BT[torch.arange(tokens_BT.shape[1]) >= lengths_B[:, None]] = pad_id
    return tokens_BT, lengths_B


def mask_of(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    return (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]).long()


def assert_close(actual: Tensor, expected: Tensor, what: str, relative: float = RELATIVE) -> None:
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= relative, f"{what}: relative error {error:.2e}"
