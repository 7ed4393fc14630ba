"""The inputs of `out_head` over all training rows, where no block is trained: computed in one pass, and their mean and spread.

The pass has fixed groups of rows. Each group is one rank's, and sums are added up in the order of the groups. So the sums have
the same bits on any number of ranks, unless the features themselves are sharded over devices.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.model.suffix import Standard, Suffix

NUM_GROUPS = 64
"""Groups of rows; more ranks than this would have nothing to do."""
CONSTANT = 1e-6
"""Deviation, relative to the root mean square, below which a dimension counts as constant: fp32 resolves no more."""


class HeadInputs(NamedTuple):
    """Inputs of some training rows."""

    group: int
    ids_B: Ints
    inputs_BD: Tensor


@torch.no_grad()
def compute_head_inputs(
    suffix: Suffix, table: TokenTable, features: FeatureSource, engine: Engine, owner_N: Ints | None
) -> Iterator[HeadInputs]:
    """Yield the inputs of this rank's rows, each row on one rank. Collective: iterate to the end.

    `owner_N`: the rank that can read each row's features; None: every rank can read all.
    """
    rank, num_ranks = engine.world.rank, engine.world.num_ranks
    batches = [(number % NUM_GROUPS, ids_B) for number, ids_B in enumerate(evaluation_batches(table))]
    if owner_N is None:
        plan = [(group, ids_B) for group, ids_B in batches if group % num_ranks == rank]
    else:
        plan = [(group, ids_B[owner_N[ids_B] == rank]) for group, ids_B in batches]
    plan = [(group, ids_B) for group, ids_B in plan if len(ids_B)]
    suffix.eval()
    for group, ids_B in plan:
        yield HeadInputs(group, ids_B, suffix(*features(table.batch(ids_B)), stops_before_head=True))
    if engine.is_forward_collective:
        # The other ranks compute more batches, and cannot gather the weights without this rank.
        most = int(max(count for (count,) in collectives.gather_numbers([len(plan)])))
        for _ in range(most - len(plan)):
            suffix(*features(table.batch(np.empty(0, np.int64))), stops_before_head=True)


def measure_standard(
    suffix: Suffix, table: TokenTable, features: FeatureSource, engine: Engine, owner_N: Ints | None
) -> Standard:
    """Measure mean and standard deviation of each input over the training rows, equal on every rank. Collective.

    A constant input keeps its scale. Without a bias in `out_head` the mean could not be folded into the weights, so it is 0.
    """
    width, has_bias = suffix.out_head.in_features, len(list(suffix.out_head.parameters())) > 1
    sums: dict[int, NDArray[np.float64]] = {}
    for group, _, inputs_BD in compute_head_inputs(suffix, table, features, engine, owner_N):
        wide_BD = inputs_BD.double()
        both = torch.stack([wide_BD.sum(dim=0), wide_BD.square().sum(dim=0)]).cpu().numpy()
        sums[group] = sums.get(group, 0.0) + both
    of_ranks = collectives.all_gather(sums)
    total = np.zeros((2, width))
    for group in range(NUM_GROUPS):
        for of_rank in of_ranks:
            if group in of_rank:
                total += of_rank[group]
    mean_D, square_D = total / len(table)
    deviation_D = np.sqrt(np.maximum(square_D - mean_D**2, 0))
    deviation_D[deviation_D <= CONSTANT * np.sqrt(square_D)] = 1.0
    if not has_bias:
        mean_D = np.zeros_like(mean_D)
    return Standard(*(torch.from_numpy(each).float().to(engine.device) for each in (mean_D, deviation_D)))
