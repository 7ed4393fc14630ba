"""Hidden states of every layer of the frozen model, pooled per text, in one pass: the input of a probe.

Layer 0 is the sum of the embeddings, and layer i is the output of block i. The last layer comes again after the final norm.
Each layer is pooled in two ways, so a text leaves a few rows and never its whole residual stream.

A view is a layer with a pooling. Shape letter: L views.
"""

from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.batching.shares import plan_evaluation
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ModelError
from agnews_dist.events import Emit, Progress
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.packed import cut_by_size, make_packed_attention, run_in_threads, run_packed_block
from agnews_dist.model.prefix import Prefix

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")
"""Row of the last real token, and mean over the real tokens."""
BATCH_TOKENS = 16_384
"""Tokens between two reports of progress: a few calls for each thread."""

Floats = NDArray[np.float32]


class View(NamedTuple):
    """A layer with a pooling."""

    layer: int
    pooling: Pooling
    is_normed: bool = False
    """After the final norm."""

    @property
    def layer_name(self) -> str:
        """The number of the layer: `5`, or `6 + norm`."""
        return f"{self.layer} + norm" if self.is_normed else str(self.layer)


class PooledRows(NamedTuple):
    """A rank's share of the pooled rows of a split, in the order in which they were computed."""

    ids_N: Ints
    values_LND: Floats


def list_views(num_blocks: int) -> list[View]:
    """List the views of a model, bottom to top.

    >>> [f"{view.layer_name} {view.pooling}" for view in list_views(1)]
    ['0 last', '0 mean', '1 last', '1 mean', '1 + norm last', '1 + norm mean']
    """
    layers = [*((layer, False) for layer in range(num_blocks + 1)), (num_blocks, True)]
    return [View(layer, pooling, is_normed) for layer, is_normed in layers for pooling in POOLINGS]


def pool_layers(classifier: Classifier, table: TokenTable, rows_N: Ints, engine: Engine, *, emit: Emit) -> PooledRows:
    """Compute every view of this rank's share of `rows_N`. All blocks of the classifier must be in its prefix.

    Calls depend on the lengths alone, so the bits do not depend on the number of ranks.

    Raises:
        ModelError: a value is not finite.
    """
    prefix, norm = classifier.prefix, classifier.suffix.ln_f
    plan = plan_evaluation(table.lengths_N[rows_N], max_tokens=max(BATCH_TOKENS, prefix.call_tokens))
    plan = [rows_N[ids] for ids in plan[engine.world.rank :: engine.world.num_ranks]]
    ids_N = np.concatenate([np.empty(0, np.int64), *plan])
    views = list_views(len(prefix.h))
    values_LND = np.empty((len(views), len(ids_N), prefix.wte.embedding_dim), np.float32)
    task, done = f"frozen model, {table.name}", 0
    for ids_B in plan:
        emit(Progress(task=task, done=done, total=len(ids_N), unit="rows"))
        tokens_P, lengths_B = table.pack(ids_B)
        ends_P = np.concatenate([[0], np.cumsum(lengths_B)])
        calls = [
            partial(_pool_call, prefix, norm, tokens_P[ends_P[begin] : ends_P[end]], lengths_B[begin:end])
            for begin, end in cut_by_size(np.asarray(lengths_B), prefix.call_tokens)
        ]
        values_LND[:, done : done + len(ids_B)] = torch.cat(run_in_threads(calls, engine.device), dim=1).numpy()
        done += len(ids_B)
    emit(Progress(task=task, done=done, total=len(ids_N), unit="rows"))
    for view, values_ND in zip(views, values_LND, strict=True):
        if not np.isfinite(values_ND).all():
            raise ModelError(
                f"engine.precision {engine.precision}: layer {view.layer_name} has values that are not finite. Set "
                "--engine.precision fp32, or use another model."
            )
    return PooledRows(ids_N, values_LND)


def _pool_call(prefix: Prefix, norm: nn.Module, tokens_P: Tensor, lengths_B: list[int]) -> Tensor:
    """Run one call of packed texts through all blocks; return values_LBD in float32, on the CPU."""
    lengths = torch.tensor(lengths_B, device=tokens_P.device)
    with torch.no_grad(), torch.autocast(tokens_P.device.type, enabled=False):
        hidden_PD = prefix.embed(tokens_P, lengths_B)
        attend = make_packed_attention(lengths_B, hidden_PD.device, hidden_PD.dtype)
        pooled = [_pool(hidden_PD, lengths)]
        for block in prefix.h.values():
            hidden_PD = run_packed_block(block, hidden_PD, attend)
            pooled.append(_pool(hidden_PD, lengths))
        pooled.append(_pool(norm(hidden_PD.float()), lengths))
        return torch.cat(pooled).cpu()


def _pool(hidden_PD: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the last row and the mean of each text, in the order of `POOLINGS`. Sums are in float64."""
    last_BD = hidden_PD[lengths_B.cumsum(0) - 1].float()
    mean_BD = torch.segment_reduce(hidden_PD.double(), "mean", lengths=lengths_B, axis=0)
    return torch.stack([last_BD, mean_BD.float()])


def gather_view(part: PooledRows, number: int) -> Floats:
    """Return one view of all ranks' rows, in ascending order of their ids: values_ND. Collective."""
    parts = collectives.all_gather((part.ids_N, part.values_LND[number]))
    order_N = np.argsort(np.concatenate([ids_N for ids_N, _ in parts]))
    return np.concatenate([values_ND for _, values_ND in parts])[order_N]
