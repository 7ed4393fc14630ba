"""The trainable part: hidden states at the freeze boundary in, class logits of a text out."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from agnews_dist.model.last_token import run_last_token_block, select_last_rows
from agnews_dist.model.pooling import GainAndShift, Pooling, average_padded
from agnews_dist.model.prefix import run_block


class Standard(NamedTuple):
    """Mean and standard deviation of the inputs of `out_head` over the training rows, fp32 on the device."""

    mean_D: Tensor
    deviation_D: Tensor

    def apply(self, inputs_BD: Tensor) -> Tensor:
        """Return inputs with mean 0 and variance 1."""
        return (inputs_BD - self.mean_D.to(inputs_BD.dtype)) / self.deviation_D.to(inputs_BD.dtype)


class Embeddings(NamedTuple):
    """The embeddings of a GPT-2 and the dropout after them."""

    wte: nn.Embedding
    wpe: nn.Embedding
    drop: nn.Dropout


class Suffix(nn.Module):
    """The last blocks, the final norm and `out_head`, in fp32, all trainable.

    Parameters correspond to those of Hugging Face's GPT2ForSequenceClassification: `h.<number>.*` and `ln_f.*` to
    `transformer.h.<number>.*` and `transformer.ln_f.*`, `out_head.weight` to `score.weight`. `out_head.bias` has no
    counterpart: export.py folds it into `ln_f.bias`. With embeddings, `wte.weight` and `wpe.weight` are parameters too.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        ln_f: nn.LayerNorm,
        out_head: nn.Linear,
        *,
        pooling: Pooling = "last",
        embeddings: Embeddings | None = None,
    ) -> None:
        """`blocks`: number of the block in the whole model -> the block, bottom to top; may be empty.

        `embeddings`: are trained too, so the features are token ids.
        """
        super().__init__()
        self.has_embeddings = embeddings is not None
        if embeddings is not None:
            self.wte, self.wpe, self.drop = embeddings
        last = max(blocks, default=None) if pooling == "last" else None
        modules = {str(i): LastBlock(block) if i == last else block for i, block in blocks.items()}
        self.h = nn.ModuleDict(modules)
        self.pooling: Pooling = pooling
        self.ln_f, self.out_head = ln_f if pooling == "last" else GainAndShift(ln_f), out_head
        self._activations = [block.get_submodule("mlp.act") for block in blocks.values()]
        self.use_fast_path(True)
        self.autocast_dtype: torch.dtype | None = None
        """Type of the products; None is the type of the weights. Set here, as DeepSpeed disables a caller's autocast."""
        self.standard: Standard | None = None
        """Standardises the inputs of `out_head`; None: they stay as they are. Not trained, and folded away by the export."""
        self.num_frozen = 0
        """Lowest blocks that are frozen during training: the features are their output, and they do not run here."""
        self.checkpointing = False
        """True if the backward pass recomputes the blocks' activations (activation checkpointing)."""
        self.requires_grad_(True)

    def use_fast_path(self, fast_path: bool) -> None:
        """Switch the fast path: the last block runs for the last token only, the others with a fused GELU.

        Hugging Face's `gelu_new` works step by step and would keep six tensors of the MLP's width for the backward pass.
        """
        self.fast_path = fast_path
        for block, activation in zip(self.h.values(), self._activations, strict=True):
            can_fuse = fast_path and isinstance(activation, NewGELUActivation)
            block.get_submodule("mlp").act = nn.GELU(approximate="tanh") if can_fuse else activation

    @property
    def reads_means(self) -> bool:
        """True if the features are means of normalised hidden states: no block runs here, and the frozen part pools."""
        return self.pooling == "mean" and self.fast_path and len(self.h) == self.num_frozen

    def freeze(self, num_frozen: int) -> list[nn.Parameter]:
        """Freeze the lowest blocks, so that their output must be the features from now on; return the weights of them all."""
        self.num_frozen = num_frozen
        return [weight for block in list(self.h.values())[:num_frozen] for weight in block.parameters()]

    @contextmanager
    def whole(self) -> Generator[None]:
        """Run all blocks inside the `with` block, from the features below them."""
        num_frozen, self.num_frozen = self.num_frozen, 0
        try:
            yield
        finally:
            self.num_frozen = num_frozen

    def forward(
        self, hidden_BTD: Tensor, lengths_B: Tensor, keys_B: Tensor | None = None, *, stops_before_head: bool = False
    ) -> Tensor:
        """Compute logits_BC, in the type of the weights, from the features of texts.

        On the fast path a last block of one token draws its dropout masks from `keys_B` alone (int64, see `example_keys`).
        The blocks of all tokens, and the plain path, use torch's random state, which must be seeded to repeat a step.
        `stops_before_head`: return the inputs of `out_head` instead.
        """
        device, dtype = hidden_BTD.device.type, self.autocast_dtype
        if self.has_embeddings:
            positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
            hidden_BTD = self.drop(self.wte(hidden_BTD) + self.wpe(positions_T))
        # The residual stream has the precision of the weights, even if the frozen part computed in another.
        hidden_BTD = hidden_BTD.to(self.ln_f.weight.dtype)
        row_BD: Tensor | None = None
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            for block in list(self.h.values())[self.num_frozen :]:
                if isinstance(block, LastBlock):
                    row_BD = self._run(block, hidden_BTD, lengths_B, self.fast_path, keys_B)
                else:
                    hidden_BTD = self._run(run_block, block, hidden_BTD)
        # In full precision: one row per example is cheap, and logits rounded to bf16 would make the loss less accurate.
        with torch.autocast(device, enabled=False):
            if row_BD is None and (self.pooling == "last" or self.reads_means):
                row_BD = select_last_rows(hidden_BTD, lengths_B)
            elif row_BD is None:
                row_BD = average_padded(hidden_BTD.to(self.ln_f.weight.dtype), lengths_B, self.ln_f.eps)
            inputs_BD: Tensor = self.ln_f(row_BD.to(self.ln_f.weight.dtype))
            if self.standard is not None:
                inputs_BD = self.standard.apply(inputs_BD)
            logits_BC: Tensor = inputs_BD if stops_before_head else self.out_head(inputs_BD)
        return logits_BC

    def _run(self, part: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not (self.checkpointing and self.training):
            return part(*arguments)
        # Not reentrant: that variant gives the weights no gradient if no input needs one, and features need none.
        output: Tensor = checkpoint(part, *arguments, use_reentrant=False)
        return output


class LastBlock(nn.Module):
    """The last block, of which only the last token is read. Its parts are those of Hugging Face's block, with the same names.

    It is a module because FSDP and ZeRO gather sharded weights when a module is called.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self._block = (block,)  # in a tuple, so that its parts are not registered twice

    @property
    def block(self) -> nn.Module:
        return self._block[0]

    def forward(self, hidden_BTD: Tensor, lengths_B: Tensor, fast_path: bool, keys_B: Tensor | None = None) -> Tensor:
        """Compute last_BD from hidden_BTD; without `fast_path`, run Hugging Face's block on all tokens and ignore `keys_B`."""
        if fast_path:
            return run_last_token_block(self, hidden_BTD, lengths_B, keys_B)
        return select_last_rows(run_block(self.block, hidden_BTD), lengths_B)
