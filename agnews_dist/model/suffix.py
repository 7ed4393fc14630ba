"""The trainable part: hidden states at the freeze boundary in, class logits of the last real token out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agnews_dist.model.last_token import last_rows, last_token_block
from agnews_dist.model.prefix import run_block


class Suffix(nn.Module):
    """The last blocks, the final norm and `out_head`, in fp32, all trainable.

    Parameter names map 1:1 to Hugging Face's GPT2ForSequenceClassification: `h.<number>.*` and `ln_f.*` with
    `transformer.` before them, `out_head.weight` is `score.weight`; `out_head.bias` has no counterpart (export.py folds
    it into `ln_f.bias`).
    """

    def __init__(self, blocks: Mapping[int, nn.Module], ln_f: nn.LayerNorm, out_head: nn.Linear) -> None:
        """`blocks`: number of the block in the whole model -> the block, bottom to top; may be empty."""
        super().__init__()
        self.h = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.ln_f = ln_f
        self.out_head = out_head
        self.fast_path = True
        """Whether the last block is computed for the last token only; the others always run in full."""
        self.requires_grad_(True)

    def forward(self, hidden_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """`Features` of texts to logits_BC, in the dtype of the weights."""
        # The residual stream in the weights' precision, even if the frozen part computed in bf16.
        hidden_BTD = hidden_BTD.to(self.ln_f.weight.dtype)
        blocks = list(self.h.values())
        last = blocks.pop() if blocks and self.fast_path else None
        for block in blocks:
            hidden_BTD = run_block(block, hidden_BTD)
        last_BD = last_rows(hidden_BTD, lengths_B) if last is None else last_token_block(last, hidden_BTD, lengths_B)
        # One row per example costs nothing, and logits rounded to bf16 would cost accuracy in the loss.
        with torch.autocast(last_BD.device.type, enabled=False):
            logits_BC: Tensor = self.out_head(self.ln_f(last_BD.to(self.ln_f.weight.dtype)))
        return logits_BC
