"""The frozen part: token ids in, hidden states at the freeze boundary out, without autograd and dropout.

It has two paths with equal results up to rounding. The fast path runs packed texts without padding, in small calls on a CPU and
large ones on a GPU. The plain path (`engine.fast_path: false`) is Hugging Face's own forward on a padded batch, the reference.

Neither uses an attention mask: attention is causal and padding is on the right, so no real token sees padding.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from agnews_dist.data.batching.batch import Batch
from agnews_dist.model.last_token import run_last_tokens
from agnews_dist.model.packed import cut_by_size, make_packed_attention, run_in_threads, run_packed_block
from agnews_dist.model.pooling import average_packed

CALL_TOKENS = {"cpu": 512, "cuda": 65536}
"""Tokens per packed call: few enough for a CPU core's cache, enough to fill a GPU.

Cached features come from calls that are filled up to this size. So all matrix products have one shape, and the rows of a text
have the same bits whatever texts share its call. Not a setting, as the shape decides the last bits of the features.
"""
ROW_MULTIPLE = 16
"""Features that are not cached come from calls that are filled up to a multiple of this number.

On the CPUs where it was measured (AVX-512, fp32 and bf16), products of 4 to 1,536 rows give a row the same bits. Products of 1
to 3 rows do not, nor do elementwise functions at the end of a tensor that does not fill the vector registers.
"""
MIN_COMPILED_OPERATIONS = {"cpu": float("inf"), "cuda": 5e16}
"""Floating-point operations of the frozen part from which torch.compile saves more time than it costs.

CPU: compiled calls were not faster than eager ones (tests/bench/RESULTS.md). CUDA: an estimate, a tenth of 3 minutes against
20 s of compiling.
"""


class Features(NamedTuple):
    """Texts at the freeze boundary, right-padded: the input of the suffix."""

    hidden_BTD: Tensor
    """Hidden states, or tokens_BT where the embeddings are trained; those in the padding have no meaning."""
    lengths_B: Tensor
    """Number of rows of each text, >= 1: its number of tokens, or 1 if the suffix reads only one row per text."""


FeatureSource = Callable[[Batch], Features]
"""A function from a batch to its features on the device, without autograd."""


def run_block(block: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """Run one of Hugging Face's GPT-2 blocks, causal, without mask and cache: hidden_BTD to hidden_BTD."""
    output = cast("Tensor | tuple[Tensor, ...]", block(hidden_BTD))
    return output[0] if isinstance(output, tuple) else output  # transformers 5.0 returns a tuple


class Prefix(nn.Module):
    """Embeddings and the frozen blocks, always in eval mode. Parameter names are Hugging Face's without `transformer.`."""

    def __init__(
        self,
        wte: nn.Embedding,
        wpe: nn.Embedding,
        blocks: Mapping[int, nn.Module],
        *,
        last_token_only: bool = False,
        mean_eps: float | None = None,
    ) -> None:
        """Freeze the modules; `blocks`: number of the block in the whole model -> the block, bottom to top.

        `last_token_only`: no block follows, so the fast path computes the last block for the last token only. `mean_eps`: no
        block follows, and the fast path computes the means of the states that are normalised with this epsilon.
        """
        super().__init__()
        self.wte, self.wpe = wte, wpe
        self.h = nn.ModuleDict({str(number): block for number, block in blocks.items()})
        self.fast_path = True
        self.compiled = False
        self._last_token_only = last_token_only and len(blocks) > 0
        self._mean_eps = mean_eps
        self.requires_grad_(False)
        self.eval()

    @property
    def one_row_per_text(self) -> bool:
        """True if the features of a text are one row: that of its last token, or the mean of all."""
        return self.fast_path and (self._last_token_only or self._mean_eps is not None)

    @property
    def computes_means(self) -> bool:
        """True if that row is the mean of all normalised hidden states."""
        return self.fast_path and self._mean_eps is not None

    @property
    def row_bytes(self) -> int:
        """Size of one row of features, which have the type of the frozen weights."""
        return self.wte.embedding_dim * self.wte.weight.dtype.itemsize

    @property
    def call_tokens(self) -> int:
        """Limit of tokens of one packed call. A longer text is a call of its own."""
        return CALL_TOKENS[self.wte.weight.device.type]

    def choose_compiling(self, *, num_tokens: int, wanted: Literal["auto", "always", "never"]) -> None:
        """Compile packed calls if `wanted` is always, or if it is auto and the work is large enough.

        A token costs 24 D^2 operations per block. `num_tokens` counts the tokens of all ranks, so that all decide the same.
        """
        num_operations = 24 * self.wte.embedding_dim**2 * len(self.h) * num_tokens
        saves_time = num_operations >= MIN_COMPILED_OPERATIONS[self.wte.weight.device.type]
        self.compiled = wanted == "always" or (wanted == "auto" and saves_time)

    def forward(self, tokens_BT: Tensor, /) -> Tensor:
        """Run the plain path: right-padded tokens_BT to hidden_BTD. Hidden states in the padding have no meaning."""
        with torch.no_grad():
            position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            return self._run_blocks(self.wte(tokens_BT) + self.wpe(position_T))

    def _run_blocks(self, hidden_BTD: Tensor) -> Tensor:
        for block in self.h.values():
            hidden_BTD = run_block(block, hidden_BTD)
        return hidden_BTD

    def embed(self, tokens_P: Tensor, /, lengths_B: Sequence[int], *, num_filler: int = 0) -> Tensor:
        """Return the input of the first block for texts of `lengths_B` tokens, end to end, then filler rows: hidden_PD."""
        lengths = np.asarray(lengths_B)
        position_P = np.arange(len(tokens_P)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position_P = torch.from_numpy(position_P).to(tokens_P.device)
        tokens_P, position_P = (functional.pad(values_P, (0, num_filler)) for values_P in (tokens_P, position_P))
        return self.wte(tokens_P) + self.wpe(position_P)

    def rows(self, tokens_P: Tensor, lengths_B: Sequence[int], *, min_rows: int = 0) -> Tensor:
        """Run one call of the fast path: texts of `lengths_B` tokens, end to end, to their rows of features, end to end.

        The matrix products have at least `min_rows` rows, and a multiple of ROW_MULTIPLE: filler rows follow the last text.
        """
        device, num_tokens = tokens_P.device, len(tokens_P)
        num_filler = max(min_rows - num_tokens, -num_tokens % ROW_MULTIPLE)
        # All tensors have the type of the weights. A caller's autocast would change the result.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            hidden_PD = self.embed(tokens_P, lengths_B, num_filler=num_filler)
            attend = make_packed_attention(lengths_B, device, hidden_PD.dtype)
            blocks = list(self.h.values())
            for block in blocks[:-1] if self._last_token_only else blocks:
                hidden_PD = run_packed_block(block, hidden_PD, attend, compiled=self.compiled)
            hidden_PD = hidden_PD[:num_tokens]
            if self._mean_eps is not None:
                return average_packed(hidden_PD, lengths_B, self._mean_eps)
            return run_last_tokens(blocks[-1], hidden_PD, lengths_B) if self._last_token_only else hidden_PD

    def features(self, tokens_BT: Tensor, lengths_B: Tensor) -> Features:
        """Compute the features of right-padded tokens_BT with `lengths_B` (>= 1), by the path that `fast_path` selects."""
        if not self.fast_path:
            return Features(self(tokens_BT), lengths_B)
        lengths: list[int] = lengths_B.tolist()
        texts = [tokens_BT[row, :length] for row, length in enumerate(lengths)]
        calls = [
            partial(self.rows, torch.cat(texts[begin:end]), lengths[begin:end])
            for begin, end in cut_by_size(lengths_B.cpu().numpy(), self.call_tokens)
        ]
        rows = torch.cat(run_in_threads(calls, tokens_BT.device))
        if self.one_row_per_text:
            return Features(rows[:, None], torch.ones_like(lengths_B))
        return Features(nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True), lengths_B)

    def train(self, mode: bool = True) -> "Prefix":  # noqa: ARG002
        """Ignore `mode` and stay in eval mode: dropout would make features random."""
        return super().train(False)


class NoPrefix(Prefix):
    """The frozen part of a model of which nothing is frozen: its features are the token ids themselves."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.h = nn.ModuleDict()
        self.fast_path, self.compiled = True, False
        self._last_token_only, self._mean_eps = False, None

    def choose_compiling(self, *, num_tokens: int, wanted: Literal["auto", "always", "never"]) -> None:
        """Do nothing: there is nothing to compile."""

    def features(self, tokens_BT: Tensor, lengths_B: Tensor) -> Features:
        """Return the token ids, on both paths."""
        return Features(tokens_BT, lengths_B)


def uncached_features(prefix: Prefix) -> FeatureSource:
    """Return a source that computes features at every use."""
    return lambda batch: prefix.features(batch.tokens_BT, batch.lengths_B)
