"""Features of a training that freezes more blocks at the begin of an epoch: the old features, run through these blocks.

The blocks run as the frozen part does: in its precision, packed, without dropout and autograd. Their output is kept in memory,
as features are, or else computed at every use.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from agnews_dist.data.batching.batch import Batch
from agnews_dist.features.manager import FeatureCache
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features, FeatureSource, Prefix
from agnews_dist.model.suffix import LastBlock


class FrozenBlocks(Prefix):
    """Blocks that are frozen during training: features of the frozen part below them take the place of token ids."""

    def __init__(self, below: Prefix, blocks: Mapping[int, nn.Module], **options: Any) -> None:
        """`below`: the frozen part, whose precision and path the blocks take; `options`: see `Prefix`."""
        super().__init__(below.wte, below.wpe, blocks, **options)
        self.h.to(below.wte.weight.dtype)
        self.fast_path, self.compiled = below.fast_path, below.compiled

    def forward(self, hidden_BTD: Tensor, /) -> Tensor:
        """Run the plain path on the features of right-padded texts."""
        with torch.no_grad():
            return self._run_blocks(hidden_BTD)

    def embed(self, rows_PD: Tensor, /, lengths_B: Sequence[int], *, num_filler: int = 0) -> Tensor:  # noqa: ARG002
        """Return a copy of the texts' rows of features, then filler rows: hidden_PD."""
        return functional.pad(rows_PD, (0, 0, 0, num_filler))


class GrowingFeatures:
    """Source of the training split's features, for a suffix of which more and more blocks are frozen."""

    def __init__(self, classifier: Classifier, base: FeatureSource, cache: FeatureCache | None = None) -> None:
        """`base`: features below the suffix. `cache`: keeps the output of blocks; None: it is computed at every use."""
        self._classifier, self._cache = classifier, cache
        self._source, self._num_frozen = base, 0

    def __call__(self, batch: Batch) -> Features:
        return self._source(batch)

    def extend(self) -> None:
        """Run the features through the blocks of the suffix that are frozen now and were not before. Collective."""
        blocks = self._copy_new_blocks()
        classifier = replace(self._classifier, prefix=blocks)
        kept = None if self._cache is None else self._cache.extend(classifier, self._source)
        self._source = kept or partial(_run_blocks, blocks, self._source)

    def _copy_new_blocks(self) -> FrozenBlocks:
        """Copy the blocks: in evaluations, those of the suffix may hold other weights."""
        suffix, begin = self._classifier.suffix, self._num_frozen
        self._num_frozen = suffix.num_frozen
        blocks = list(suffix.h.items())[begin : suffix.num_frozen]
        is_end = suffix.num_frozen == len(suffix.h)
        return FrozenBlocks(
            self._classifier.prefix,
            {int(number): copy.deepcopy(block.block if isinstance(block, LastBlock) else block) for number, block in blocks},
            last_token_only=is_end and suffix.pooling == "last",
            mean_eps=suffix.ln_f.eps if is_end and suffix.pooling == "mean" else None,
        )


def _run_blocks(blocks: FrozenBlocks, below: FeatureSource, batch: Batch) -> Features:
    return blocks.features(*below(batch))
