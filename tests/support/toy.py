"""A small GPT-2 with random weights and ragged random examples, the same in every process."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

from agnews_dist.data.tokens import TokenSplit
from agnews_dist.model.gpt2 import Backbone, Classifier, split_model
from agnews_dist.model.modeling_gpt2_mean_pooling import GPT2MeanPoolingForSequenceClassification

VOCABULARY, CLASSES = 97, 4
CLASS_WEIGHTS = (0.3, 1.0, 7.0, 2.1)


def toy_model(dropout: float = 0.0) -> GPT2Model:
    torch.manual_seed(11)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=24,
        n_layer=3,
        n_head=3,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2Model(config).eval()


def toy_classifier(trainable_blocks: int = 1, dropout: float = 0.0, num_classes: int = CLASSES, **options: Any) -> Classifier:
    """Return our classifier with the weights of `toy_model`; `options`: of `split_model`."""
    backbone = Backbone(toy_model(dropout), None, None)
    classifier = split_model(backbone, trainable_blocks=trainable_blocks, num_classes=num_classes, seed=5, **options)
    if classifier.suffix.out_head.bias is not None:
        torch.nn.init.normal_(classifier.suffix.out_head.bias, generator=torch.Generator().manual_seed(3))
    return classifier


def toy_split(lengths: list[int]) -> TokenSplit:
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCABULARY - 1, sum(lengths)).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = rng.integers(0, CLASSES, len(lengths)).astype(np.int64)
    return TokenSplit(name="toy", tokens=tokens, offsets=offsets, labels=labels, num_truncated=0)


def toy_reference_model(
    lengths: list[int], trainable_blocks: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Return Hugging Face's classifier in eval mode with our weights and trainable parameters, tokens_NT and mask_NT.

    With mean pooling it is the exported one, which tests/unit/model/test_pooling.py compares with plain torch.
    """
    classifier, rows = toy_classifier(trainable_blocks, **options), toy_split(lengths)
    config = GPT2Config(**classifier.config.to_dict() | {"num_labels": CLASSES, "pad_token_id": VOCABULARY - 1})
    is_mean = options.get("pooling") == "mean"
    model = (GPT2MeanPoolingForSequenceClassification if is_mean else GPT2ForSequenceClassification)(config)
    model.transformer.load_state_dict(toy_model().state_dict())
    # Hugging Face's head has no bias, so it is replaced by one that has.
    model.score = torch.nn.Linear(config.n_embd, CLASSES)
    model.score.load_state_dict(classifier.suffix.out_head.state_dict())
    model.to(dtype).eval()
    ours = classifier.suffix.state_dict()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(our_name(name) in ours)
    ids = torch.full((len(lengths), max(lengths)), VOCABULARY - 1)
    mask = torch.zeros_like(ids)
    for row, (begin, length) in enumerate(zip(rows.offsets[:-1], lengths, strict=True)):
        ids[row, :length] = torch.from_numpy(rows.tokens[begin : begin + length].astype(np.int64))
        mask[row, :length] = 1
    return model, ids, mask


def our_name(name: str) -> str:
    """Return the suffix's name of a Hugging Face parameter."""
    return name.removeprefix("transformer.").replace("score.", "out_head.")


def toy_reference_logits(lengths: list[int]) -> torch.Tensor:
    """Return logits_BC of Hugging Face's classifier in fp32."""
    model, tokens_NT, mask_NT = toy_reference_model(lengths)
    return model(input_ids=tokens_NT, attention_mask=mask_NT).logits.detach()


def reference_gradients(lengths: list[int], trainable_blocks: int = 1, **loss: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of Hugging Face's classifier, by our names: mean cross-entropy over the whole batch, in fp64.

    `loss`: more arguments of torch's `cross_entropy`.
    """
    model, tokens_NT, mask_NT = toy_reference_model(lengths, trainable_blocks, torch.float64)
    logits_BC = model(input_ids=tokens_NT, attention_mask=mask_NT).logits
    torch.nn.functional.cross_entropy(logits_BC, torch.from_numpy(toy_split(lengths).labels), **loss).backward()
    return {our_name(name): value.grad for name, value in model.named_parameters() if value.requires_grad}


def toy_reference_groups(weights: Mapping[str, torch.Tensor], weight_decay: float, rates: Mapping[str, float]) -> list[dict]:
    """Return one parameter group per weight for torch's AdamW: only matrices decay.

    `rates`: beginning of Hugging Face's name -> learning rate; the others have the optimizer's.
    """
    groups = []
    for name, weight in weights.items():
        own_rate = [rate for prefix, rate in rates.items() if name.startswith(prefix)]
        group = {"params": [weight], "weight_decay": weight_decay if weight.ndim >= 2 else 0.0}
        groups.append(group | ({"lr": own_rate[0]} if own_rate else {}))
    return groups
