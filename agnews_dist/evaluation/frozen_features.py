"""Last-token features of the frozen model, before any training: the input of a cheap baseline."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.data.batching.shares import plan_evaluation
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.metrics import in_file_order
from agnews_dist.model.prefix import FeatureSource

MAX_TRAIN_ROWS = 10_000
MAX_SCORED_ROWS = 20_000
"""Rows that are gathered on rank 0; every rank of a node has a copy for a moment."""
BATCH_TOKENS = 16_384

Floats = NDArray[np.float32]


class FrozenFeatures(NamedTuple):
    """Hidden states of the last token, after the final norm of the untrained model; H is the model's width."""

    train_rows_N: Ints
    """Rows of train that were chosen."""
    train_NH: Floats
    splits: Mapping[str, Floats]
    """Split -> features of all its rows, in file order. A split with too many rows is left out."""


def compute_frozen_features(
    suffix: nn.Module,
    tables: Mapping[str, TokenTable],
    engine: Engine,
    source: Callable[[str], FeatureSource],
    *,
    owner_N: Ints | None,
    seed: int,
) -> FrozenFeatures:
    """Compute the features of some training rows and of all rows of the other splits. Collective.

    Args:
        suffix: the untrained part above the freeze boundary, without its head, on the engine's device.
        tables: split -> tokens, with a split `train`.
        source: returns the cached features of a split at the freeze boundary.
        owner_N: the rank that can read each training row; None: every rank can.
        seed: of the choice of training rows.
    """
    rank, num_ranks = engine.world.rank, engine.world.num_ranks
    train = tables["train"]
    num_rows = min(len(train), MAX_TRAIN_ROWS)
    chosen_N = np.sort(np.random.default_rng(seed).permutation(len(train))[:num_rows])
    lengths_N = train.lengths_N[chosen_N]
    plan = [chosen_N[ids] for ids in plan_evaluation(lengths_N, max_tokens=BATCH_TOKENS)]
    if owner_N is None:
        own = plan[rank::num_ranks]
    else:
        own = [ids for ids in (each[owner_N[each] == rank] for each in plan) if len(ids)]
    rows_N, train_NH = _gather(suffix, train, own, source("train"))
    order_N = np.argsort(rows_N)
    splits: dict[str, Floats] = {}
    for name, table in tables.items():
        if name != "train" and len(table) <= MAX_SCORED_ROWS:
            ids_N, features_NH = _gather(suffix, table, evaluation_batches(table)[rank::num_ranks], source(name))
            splits[name] = features_NH[in_file_order(ids_N, len(table))]
    return FrozenFeatures(rows_N[order_N], train_NH[order_N], splits)


@torch.no_grad()
def _gather(suffix: nn.Module, table: TokenTable, plan: list[Ints], source: FeatureSource) -> tuple[Ints, Floats]:
    """Compute the rows of this rank's plan, and gather those of all ranks."""
    parts = [suffix(*source(table.batch(ids_B))).float().cpu().numpy() for ids_B in plan]
    own = (np.concatenate(plan), np.concatenate(parts)) if plan else None
    gathered = [each for each in collectives.all_gather(own) if each is not None]
    return np.concatenate([ids_N for ids_N, _ in gathered]), np.concatenate([features_NH for _, features_NH in gathered])
