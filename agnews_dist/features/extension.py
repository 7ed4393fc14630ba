"""Features of a training that freezes more blocks at the begin of an epoch: the old features, run through these blocks.

The blocks run as the frozen part does: in its precision, packed, without dropout and autograd. Their output is kept in memory,
as features are, or else computed at every use.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from agnews_dist.data.batching.batch import Batch
from agnews_dist.features.manager import FeatureCache
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import Features, FeatureSource, FrozenBlocks
from agnews_dist.model.suffix import LastBlock

SPLITS = ("train", "validation")
"""Splits that a training reads again and again. Others are scored with the best weights."""


class SplitSources(Protocol):
    """Features of several splits."""

    def source(self, split: str) -> FeatureSource:
        """Return the source of a split's features."""
        ...


class GrowingFeatures:
    """Features for a suffix of which more and more blocks are frozen.

    While `num_frozen` of the suffix is 0 they are those below all its blocks: at first, and once the best weights are restored.
    """

    def __init__(self, classifier: Classifier, base: Callable[[str], FeatureSource], cache: FeatureCache | None = None) -> None:
        """`base`: from a split to the features below the suffix. `cache`: keeps the output of blocks; None: it is not kept."""
        self._classifier, self._base, self._cache = classifier, base, cache
        self._sources = {split: base(split) for split in SPLITS}
        self._num_frozen = 0

    def source(self, split: str) -> FeatureSource:
        """Return the source of a split's features. It follows the suffix."""
        return partial(self._read, split)

    def extend(self) -> None:
        """Run the features through the blocks of the suffix that are frozen now and were not before. Collective."""
        blocks = self._copy_new_blocks()
        kept = self._cache.extend(replace(self._classifier, prefix=blocks), self._sources) if self._cache is not None else None
        for split, below in self._sources.items():
            self._sources[split] = partial(_run_blocks, blocks, below) if kept is None else kept.source(split)

    def _read(self, split: str, batch: Batch) -> Features:
        source = self._sources[split] if self._classifier.suffix.num_frozen else self._base(split)
        return source(batch)

    def _copy_new_blocks(self) -> FrozenBlocks:
        """Copy the blocks: when the best weights are restored, those of the suffix change."""
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
