"""Last-token features of the frozen model, before any training: the input of a cheap baseline."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Rows of which every rank has the features for a moment."""
SCORED_SHARE = 0.6
"""Share of the time for the scored splits, which are of use only as a whole."""
BATCH_TOKENS = 16_384

Floats = NDArray[np.float32]


class FrozenFeatures(NamedTuple):
    """Hidden states of the last token, after the final norm of the untrained model; H is the model's width."""

    train_rows_N: Ints
    """Rows of train that were chosen, and for which there was time."""
    train_NH: Floats
    splits: Mapping[str, Floats]
    """Split -> features of all its rows, in file order. One with too many rows, or without enough time, is left out."""


Part = tuple[Ints, Floats]
"""Row numbers and their features."""


def compute_frozen_features(
    suffix: nn.Module,
    tables: Mapping[str, TokenTable],
    engine: Engine,
    source: Callable[[str], FeatureSource],
    *,
    owner_N: Ints | None,
    seed: int,
    max_seconds: float,
) -> FrozenFeatures | str:
    """Compute the features of some training rows and of all rows of the other splits. Collective.

    Args:
        suffix: the untrained part above the freeze boundary, without its head. It is moved to the engine's device.
        tables: split -> tokens, with a split `train`.
        source: returns the cached features of a split at the freeze boundary.
        owner_N: the rank that can read each training row; None: every rank can.
        seed: of the choice of training rows.
        max_seconds: time of each rank. What is not done by then is left out.

    Returns:
        The features, or the reason why a rank could not compute its own.
    """
    rank, num_ranks = engine.world.rank, engine.world.num_ranks
    begin = time.monotonic()

    def compute() -> dict[str, Part]:
        suffix.to(engine.device)
        plans = {name: evaluation_batches(table)[rank::num_ranks] for name, table in tables.items() if _is_small(name, table)}
        parts = {
            name: _compute(suffix, tables[name], plan, source(name), begin + SCORED_SHARE * max_seconds)
            for name, plan in plans.items()
        }
        plan = _plan_train(tables["train"], owner_N, rank=rank, num_ranks=num_ranks, seed=seed)
        return {**parts, "train": _compute(suffix, tables["train"], plan, source("train"), begin + max_seconds)}

    try:
        outcome = compute()
    except Exception as error:  # the run is complete without them
        outcome = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    gathered = collectives.all_gather(outcome)
    failures = [each for each in gathered if isinstance(each, str)]
    if failures:
        return failures[0]
    parts = [each for each in gathered if not isinstance(each, str)]
    joined = {name: _join([each[name] for each in parts]) for name in parts[0]}
    rows_N, train_NH = joined.pop("train")
    order_N = np.argsort(rows_N)
    whole = {name: each for name, each in joined.items() if len(each[0]) == len(tables[name])}
    splits = {name: values_NH[in_file_order(ids_N, len(ids_N))] for name, (ids_N, values_NH) in whole.items()}
    return FrozenFeatures(rows_N[order_N], train_NH[order_N], splits)


def _is_small(name: str, table: TokenTable) -> bool:
    return name != "train" and len(table) <= MAX_SCORED_ROWS


def _plan_train(train: TokenTable, owner_N: Ints | None, *, rank: int, num_ranks: int, seed: int) -> Iterator[Ints]:
    """Yield this rank's batches of the chosen training rows in a random order, as the time may end before the last."""
    rng = np.random.default_rng(seed)
    chosen_N = rng.permutation(len(train))[:MAX_TRAIN_ROWS]
    plan = [chosen_N[ids] for ids in plan_evaluation(train.lengths_N[chosen_N], max_tokens=BATCH_TOKENS)]
    for number in rng.permutation(len(plan)).tolist():
        if owner_N is not None:
            own = plan[number][owner_N[plan[number]] == rank]
        else:
            own = plan[number] if number % num_ranks == rank else chosen_N[:0]
        if len(own):
            yield own


@torch.no_grad()
def _compute(
    suffix: nn.Module, table: TokenTable, plan: Sequence[Ints] | Iterator[Ints], source: FeatureSource, deadline: float
) -> Part:
    """Compute the batches of a plan until the deadline."""
    ids, parts = [np.empty(0, np.int64)], list[Floats]()
    for ids_B in plan:
        if time.monotonic() > deadline:
            break
        ids.append(ids_B)
        parts.append(suffix(*source(table.batch(ids_B))).float().cpu().numpy())
    return np.concatenate(ids), np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _join(parts: Sequence[Part]) -> Part:
    filled = [part for part in parts if len(part[0])] or parts[:1]
    return np.concatenate([ids_N for ids_N, _ in filled]), np.concatenate([values_NH for _, values_NH in filled])
