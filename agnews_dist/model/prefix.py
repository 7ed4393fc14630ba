"""The frozen part: token ids in, hidden states at the freeze boundary out; no autograd, no dropout.

Two ways to the same numbers. The fast one runs packed texts without padding, in small calls on a CPU and large ones on a GPU.
The plain one is Hugging Face's own forward on a padded batch, the reference (`engine.fast_path: false`).

No attention mask in either: the kernel is causal and padding is on the right, so a real token never sees what comes after it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from agnews_dist.data.batching.batch import Batch
from agnews_dist.model.last_token import last_token_block
from agnews_dist.model.packed import call_bounds, packed_attention, packed_block, side_by_side

CALL_TOKENS = {"cpu": 512, "cuda": 65536}
"""Tokens per packed call. On a CPU the activations of a call stay in a core's cache; a GPU must be filled. Constants: a knob
would let the hardware decide the last bits of a result."""


class Features(NamedTuple):
    """Texts at the freeze boundary, right-padded: all that the suffix takes."""

    hidden_BTD: Tensor
    """What is at or beyond a text's length is meaningless."""
    lengths_B: Tensor
    """Rows of each text, >= 1: its tokens; one where the suffix reads only the last token."""


FeatureSource = Callable[[Batch], Features]
"""A batch to its features on the device, without autograd."""


COMPILING_PAYS = {"cpu": float("inf"), "cuda": 5e16}
"""Floating-point operations of the whole frozen work from which torch.compile is worth its cold start. CPU: compiled calls
were no faster than eager ones (tests/bench/RESULTS.md). CUDA, not measured: 20 s of compiling against a tenth of 3 minutes."""


def run_block(block: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """One of Hugging Face's GPT-2 blocks, causal, without mask and cache. hidden_BTD to hidden_BTD."""
    output = cast("Tensor | tuple[Tensor, ...]", block(hidden_BTD))
    return output[0] if isinstance(output, tuple) else output  # transformers 5.0 returns a tuple


class Prefix(nn.Module):
    """Embeddings and the frozen blocks, always in eval mode.

    Parameter names are Hugging Face's without `transformer.`.
    """

    def __init__(
        self, wte: nn.Embedding, wpe: nn.Embedding, blocks: Mapping[int, nn.Module], *, last_token_only: bool = False
    ) -> None:
        """`blocks`: number of the block in the whole model -> the block, bottom to top. `last_token_only`: no block comes
        after these, so the fast path computes the last of them for the last token only."""
        super().__init__()
        self.wte = wte
        self.wpe = wpe
        self.h = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.fast_path = True
        self.compiled = False
        """Whether packed calls run through torch.compile."""
        self._last_token_only = last_token_only and len(blocks) > 0
        self.requires_grad_(False)
        self.eval()

    @property
    def one_row_per_text(self) -> bool:
        """Whether the fast path's features are the last token's alone."""
        return self.fast_path and self._last_token_only

    @property
    def row_bytes(self) -> int:
        """Of one row of features, which are of the frozen weights' type."""
        return self.wte.embedding_dim * self.wte.weight.dtype.itemsize

    @property
    def call_tokens(self) -> int:
        """Most tokens of one packed call (a longer text has a call of its own)."""
        return CALL_TOKENS[self.wte.weight.device.type]

    def choose_compiling(self, *, num_tokens: int, wanted: Literal["auto", "always", "never"]) -> None:
        """Run packed calls through torch.compile if asked to, or if there is so much to do that it pays.

        A token costs 24 D^2 operations per block. Of all texts, not of a rank's part: every rank decides alike.
        """
        num_operations = 24 * self.wte.embedding_dim**2 * len(self.h) * num_tokens
        pays = num_operations >= COMPILING_PAYS[self.wte.weight.device.type]
        self.compiled = wanted == "always" or (wanted == "auto" and pays)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The plain path: right-padded tokens_BT to hidden_BTD; what is at or beyond a text's length is meaningless."""
        with torch.no_grad():
            position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            hidden_BTD: Tensor = self.wte(tokens_BT) + self.wpe(position_T)
            for block in self.h.values():
                hidden_BTD = run_block(block, hidden_BTD)
            return hidden_BTD

    def rows(self, tokens_P: Tensor, lengths_B: Sequence[int]) -> Tensor:
        """The fast path's one call: texts of `lengths_B` tokens, end to end, to their rows of features, end to end."""
        device = tokens_P.device
        # Everything is in the weights' type: autocast would only cast back and forth, and only where a caller switched it on.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            lengths = np.asarray(lengths_B)
            position_P = np.arange(len(tokens_P)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            hidden_PD: Tensor = self.wte(tokens_P) + self.wpe(torch.from_numpy(position_P).to(device))
            attend = packed_attention(lengths_B, device, hidden_PD.dtype)
            blocks = list(self.h.values())
            for block in blocks[:-1] if self._last_token_only else blocks:
                hidden_PD = packed_block(block, hidden_PD, attend, compiled=self.compiled)
            if not self._last_token_only:
                return hidden_PD
            padded = nn.utils.rnn.pad_sequence(list(hidden_PD.split(list(lengths_B))), batch_first=True)
            return last_token_block(blocks[-1], padded, torch.from_numpy(lengths).to(device))

    def features(self, tokens_BT: Tensor, lengths_B: Tensor) -> Features:
        """Right-padded tokens_BT with `lengths_B` (>= 1) to what the suffix takes, by the path that is set."""
        if not self.fast_path:
            return Features(self(tokens_BT), lengths_B)
        lengths: list[int] = lengths_B.tolist()
        texts = [tokens_BT[row, :length] for row, length in enumerate(lengths)]
        calls = [
            partial(self.rows, torch.cat(texts[begin:end]), lengths[begin:end])
            for begin, end in call_bounds(lengths_B.cpu().numpy(), self.call_tokens)
        ]
        rows = torch.cat(side_by_side(calls, tokens_BT.device))
        if self._last_token_only:
            return Features(rows[:, None], torch.ones_like(lengths_B))
        return Features(nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True), lengths_B)

    def train(self, mode: bool = True) -> "Prefix":  # noqa: ARG002
        """Stay in eval mode whatever `mode` says: frozen features must not depend on chance."""
        return super().train(False)


def computed(prefix: Prefix) -> FeatureSource:
    """Features made by the frozen part at every use."""
    return lambda batch: prefix.features(batch.tokens_BT, batch.lengths_B)
