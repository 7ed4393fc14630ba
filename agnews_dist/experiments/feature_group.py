"""Model, tokens and features that many trainings share, opened once by all ranks."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from agnews_dist.config.schema import Config
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.rows import Ints
from agnews_dist.data.token_cache import TokenSplit
from agnews_dist.distributed import collectives
from agnews_dist.distributed.slurm import find_array_task
from agnews_dist.engine.device import check_compiler
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.memory import Setup, Shape
from agnews_dist.errors import UserError
from agnews_dist.features.manager import FeatureCache
from agnews_dist.features.placement import RequestedPlace
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.preflight.memory_check import check_fits
from agnews_dist.run import setup
from agnews_dist.run.memory_setup import build_memory_setup, describe_steps
from agnews_dist.run.setup import TrainingInputs
from agnews_dist.storage.capacity import resident_bytes
from agnews_dist.training.loop import Monitors


@dataclass(frozen=True)
class FeatureGroup:
    """Everything that trainings with the same features share, on one rank. The untrained suffix stays untrained."""

    inputs: TrainingInputs
    tables: Mapping[str, TokenTable]
    features: Callable[[str], FeatureSource]
    """Returns the source of a split's features."""
    kept: str
    """Place of the features, and why."""
    engine: Engine
    """The engine of this rank alone."""

    shape: Shape
    memory: Setup
    """Sizes of a training with the features and classes; `runtime_bytes` with the model in memory."""

    def measure_steps(self, sizes: Setup, config: Config) -> Setup:
        """Return `sizes` with the largest micro-batch that the texts make."""
        loader = setup.build_loader(config, self.inputs.classifier, self.tables["train"], self.engine.world)
        rows, tokens = max((each.tokens_BT.shape for each in loader.largest_step(0).micro_batches), key=lambda of: of.numel())
        return replace(sizes, max_tokens_per_rank=rows * tokens, texts_per_rank=rows, max_length=tokens)

    def select(self, rows: Mapping[str, tuple[str, Ints]]) -> "FeatureGroup":
        """Return a group of other splits: name -> (split of this group, its rows, in that order).

        A row's number is its position among the selected ones, as if there were no others.
        """
        splits, device = self.inputs.store.splits, self.engine.device
        pad_id = setup.pad_id_of(self.inputs.tokenizer)
        tables = {
            name: TokenTable(select_rows(splits[of], rows_N, name), pad_id=pad_id, device=device)
            for name, (of, rows_N) in rows.items()
        }
        sources = {name: _select_features(self.features(of), rows_N, device) for name, (of, rows_N) in rows.items()}
        return replace(self, tables=tables, features=sources.__getitem__)


def _select_features(source: FeatureSource, rows_N: Ints, device: torch.device) -> FeatureSource:
    """Return the source of some rows' features, by their new numbers."""
    # The last entry is for filler rows, whose id is -1.
    old_N = torch.from_numpy(np.append(rows_N, -1)).to(device)
    return lambda batch: source(replace(batch, ids_B=old_N[batch.ids_B]))


def select_rows(split: TokenSplit, rows_N: Ints, name: str) -> TokenSplit:
    """Copy the tokens of some rows, in that order."""
    lengths_N = split.lengths[rows_N]
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    index_P = np.repeat(split.offsets[rows_N] - offsets[:-1], lengths_N) + np.arange(offsets[-1])
    return TokenSplit(name, np.asarray(split.tokens)[index_P], offsets, split.labels[rows_N], 0)


def open_feature_group(
    config: Config,
    engine: Engine,
    monitors: Monitors,
    stack: ExitStack,
    *,
    num_trainings: int,
    check: Callable[[TrainingInputs], None] = lambda _: None,
    announce: Callable[[FeatureGroup], None] = lambda _: None,
) -> FeatureGroup:
    """Load model and tokens, and compute or open the features. Collective. `stack` releases them.

    `num_trainings`: trainings that will read the features; 0: only scores do. `check`: called with the inputs. `announce`:
    called before the features are computed, when their size is known.

    Raises:
        UserError: any fault of the files, or features that not every rank can read.
    """
    world, emit, alone = engine.world, monitors.emit, engine.without_others()
    if config.engine.backend != "ddp":
        raise UserError(f"engine.backend {config.engine.backend}: each training is on one rank, unsharded. Leave it out.")

    def load() -> tuple[Shape, Setup, TrainingInputs]:
        check_compiler(config.engine.compile)
        files = setup.read_model_files(config.model, config.data)
        shape, sizes = build_memory_setup(config, world, files.config)
        sizes = replace(sizes, **describe_steps(config, alone.world, use_cuda=sizes.device == "cuda"))
        check_fits(shape, sizes, world)
        inputs = setup.load_training_inputs(config, world, emit, monitors.timer, files)
        check(inputs)
        return shape, sizes, inputs

    shape, sizes, inputs = collectives.raise_if_any_failed(collectives.catch(load))
    collectives.check_equal(inputs.fingerprints)
    tables = setup.place_inputs(config, inputs, engine)
    place = _choose_place(config, engine)
    features = setup.open_features(config, inputs, tables, engine, requested=place, num_trainings=num_trainings, shards=False)
    stack.callback(features.close)
    # On a CPU also the pages of a file count that the rank has read.
    cache_bytes = features.num_bytes if features.choice.place == "device" or sizes.device == "cpu" else 0
    own = {"num_classes": len(inputs.class_names), "cache_bytes": cache_bytes, "runtime_bytes": resident_bytes()}
    sizes = replace(sizes, **own)
    group = FeatureGroup(inputs, tables, features.source, _describe_place(features), alone, shape, sizes)
    collectives.raise_if_any_failed(collectives.catch(partial(announce, group)))
    with monitors.timer.stage("prefix"):
        features.build(emit)
    if features.choice.has_no_room and num_trainings > 1:
        raise UserError(
            f"engine.feature_cache: features of {num_trainings:,} trainings would be {features.choice.reason}. Free some "
            "space, set another data.cache_dir, or accept the time by --engine.feature_cache off."
        )
    return replace(group, kept=_describe_place(features))


def _describe_place(features: FeatureCache) -> str:
    return f"{features.choice.place}: {features.choice.reason}"


def _choose_place(config: Config, engine: Engine) -> RequestedPlace:
    """Return where features are to be kept: every rank reads all of them, so ranks cannot divide them."""
    wanted, num_ranks = config.engine.feature_cache, engine.world.num_ranks
    if num_ranks > 1 and wanted == "device":
        raise UserError("engine.feature_cache device: each rank would hold a part, and trains alone. Set host, disk or auto.")
    if wanted == "auto" and find_array_task(os.environ)[1] > 1:
        return "disk"  # the tasks of a job array share them
    return "host" if num_ranks > 1 and wanted == "auto" and engine.device.type == "cuda" else wanted
