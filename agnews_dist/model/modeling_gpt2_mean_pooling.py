"""GPT-2 for sequence classification from the mean over a text's real tokens. Hugging Face's class reads the last token alone.

This file is a part of every model that agnews_dist exports with `model.pooling mean`. It needs torch and transformers only:

    AutoModelForSequenceClassification.from_pretrained(DIRECTORY, trust_remote_code=True)
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


class GPT2MeanPoolingConfig(GPT2Config):
    """GPT-2's config under another type, so that no program takes the model for one that reads the last token."""

    model_type = "gpt2_mean_pooling"


class GPT2MeanPoolingForSequenceClassification(GPT2ForSequenceClassification):
    """logits = score(mean of the final norm's output over the real tokens). The weights have Hugging Face's names."""

    config_class = GPT2MeanPoolingConfig

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **arguments: Any
    ) -> SequenceClassifierOutput:
        """Compute logits of right-padded texts. Without a mask, every token but `config.pad_token_id` is real."""
        arguments["return_dict"] = True
        pad_id = self.config.pad_token_id
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids) if pad_id is None else (input_ids != pad_id).long()
        hidden_BTD: Tensor = self.transformer(input_ids, attention_mask=attention_mask, **arguments).last_hidden_state
        real_BT1 = attention_mask[:, :, None].to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * real_BT1).sum(dim=1) / real_BT1.sum(dim=1)
        logits_BC: Tensor = self.score(mean_BD)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits_BC, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)  # pyright: ignore[reportArgumentType]
