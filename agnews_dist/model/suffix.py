"""The trainable part: hidden states at the freeze boundary in, class logits of the last real token out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

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
        last = max(blocks, default=None)
        modules = {str(i): LastBlock(block) if i == last else block for i, block in blocks.items()}
        self.h = nn.ModuleDict(modules)
        self.ln_f = ln_f
        self.out_head = out_head
        self._activations = [block.get_submodule("mlp.act") for block in blocks.values()]
        self.use_fast_path(True)
        self.autocast_dtype: torch.dtype | None = None
        """In which products are computed; None: in that of the weights. Here and not around the call: DeepSpeed switches
        a surrounding autocast off."""
        self.checkpointing = False
        """Whether training computes the blocks' activations again in the backward pass instead of keeping them."""
        self.requires_grad_(True)

    def use_fast_path(self, fast_path: bool) -> None:
        """Whether the last block is computed for the last token only; the others run in full, here with the fused GELU.

        Hugging Face's step-by-step `gelu_new` would keep six tensors four times as wide as the block for the backward pass.
        """
        self.fast_path = fast_path
        for block, activation in zip(self.h.values(), self._activations, strict=True):
            is_slow = fast_path and isinstance(activation, NewGELUActivation)
            block.get_submodule("mlp").act = nn.GELU(approximate="tanh") if is_slow else activation

    def forward(self, hidden_BTD: Tensor, lengths_B: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """`Features` of texts to logits_BC, in the dtype of the weights.

        `keys_B` (int64, see `example_keys`): from them alone the last block draws its dropout masks on the fast path. The other
        blocks, and the plain path, always draw from torch's random state, which whoever wants to repeat a step seeds before it.
        """
        device, dtype = hidden_BTD.device.type, self.autocast_dtype
        # The residual stream in the weights' precision, even if the frozen part computed in another.
        hidden_BTD = hidden_BTD.to(self.ln_f.weight.dtype)
        blocks = list(self.h.values())
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            for block in blocks[:-1]:
                hidden_BTD = self._run(run_block, block, hidden_BTD)
            if blocks:
                last_BD = self._run(blocks[-1], hidden_BTD, lengths_B, self.fast_path, keys_B)
            else:
                last_BD = last_rows(hidden_BTD, lengths_B)
        # One row per example costs nothing, and logits rounded to bf16 would cost accuracy in the loss.
        with torch.autocast(device, enabled=False):
            logits_BC: Tensor = self.out_head(self.ln_f(last_BD.to(self.ln_f.weight.dtype)))
        return logits_BC

    def _run(self, part: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not (self.checkpointing and self.training):
            return part(*arguments)
        # Features need no gradient, and the older, reentrant way would then give none to the weights either.
        again: Tensor = checkpoint(part, *arguments, use_reentrant=False)
        return again


class LastBlock(nn.Module):
    """The last block for what is read of it, the last token; holds the parts of Hugging Face's block under the same names.

    A module of its own, as an engine that divides weights over ranks fetches them when a module is called.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self._whole = (block,)  # in a tuple, as its parts are registered already

    @property
    def whole(self) -> nn.Module:
        """Hugging Face's block."""
        return self._whole[0]

    def forward(self, hidden_BTD: Tensor, lengths_B: Tensor, fast_path: bool, keys_B: Tensor | None = None) -> Tensor:
        """hidden_BTD to last_BD; without `fast_path` through Hugging Face's own forward of all tokens, without keys."""
        if fast_path:
            return last_token_block(self, hidden_BTD, lengths_B, keys_B)
        return last_rows(run_block(self.whole, hidden_BTD), lengths_B)
