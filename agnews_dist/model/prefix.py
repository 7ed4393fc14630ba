"""The frozen part: token ids in, hidden states at the freeze boundary out; no autograd, no dropout.

No attention mask: the kernel is causal and padding is on the right, so a real token never sees what comes after it.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn


def run_block(block: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """One of Hugging Face's GPT-2 blocks, causal, without mask and cache. hidden_BTD to hidden_BTD."""
    output = cast("Tensor | tuple[Tensor, ...]", block(hidden_BTD))
    return output[0] if isinstance(output, tuple) else output  # transformers 5.0 returns a tuple


class Prefix(nn.Module):
    """Embeddings and the frozen blocks, always in eval mode.

    Parameter names are Hugging Face's without `transformer.`.
    """

    def __init__(self, wte: nn.Embedding, wpe: nn.Embedding, blocks: Mapping[int, nn.Module]) -> None:
        """`blocks`: number of the block in the whole model -> the block, bottom to top."""
        super().__init__()
        self.wte = wte
        self.wpe = wpe
        self.h = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.requires_grad_(False)
        self.eval()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Right-padded tokens_BT to hidden_BTD; what is at or beyond an example's length is meaningless."""
        with torch.no_grad():
            position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            hidden_BTD: Tensor = self.wte(tokens_BT) + self.wpe(position_T)
            for block in self.h.values():
                hidden_BTD = run_block(block, hidden_BTD)
            return hidden_BTD

    def train(self, mode: bool = True) -> "Prefix":  # noqa: ARG002
        """Stay in eval mode whatever `mode` says: frozen features must not depend on chance."""
        return super().train(False)
