"""From numbers to a finished run: header, running totals, the best epoch, and the files of the run's directory."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agnews_dist import collectives
from agnews_dist.clock import Clock
from agnews_dist.config import Config
from agnews_dist.data.sharing import Share, Tally
from agnews_dist.engine import Engine
from agnews_dist.events import Emit, RunDone
from agnews_dist.features.cache import FeatureCache
from agnews_dist.fingerprints import settings
from agnews_dist.memory import gigabytes
from agnews_dist.model.export import export_model
from agnews_dist.report.card import model_card
from agnews_dist.report.predictions import write_predictions
from agnews_dist.report.result import Result, Seconds, versions, write_json
from agnews_dist.scoring import ScoredSplit
from agnews_dist.sources import Sources
from agnews_dist.wrapped import Wrapped


class RunningTotals:
    """Tokens and seconds of the steps so far; the same on every rank but for the seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        """`seconds`: what the features took before the first step; tokens per second are those of all that training needed."""
        self.seconds = seconds
        self.tally = Tally()

    def add(self, share: Share, seconds: float) -> None:
        """Take in one step."""
        self.seconds += seconds
        self.tally.add(share)


class BestEpoch:
    """Keeps what trains as it was after the epoch with the highest validation accuracy; ties go to the lower loss."""

    def __init__(self, wrapped: Wrapped) -> None:
        self._wrapped = wrapped
        self.state: dict[str, Tensor] = {}
        """Its weights, on rank 0 alone: the others get theirs back from there."""
        self.epoch = 0
        self._step = 0
        self._scored: ScoredSplit | None = None

    @property
    def name(self) -> str:
        """Its directory among the checkpoints."""
        return f"best-{self._step:08d}"

    @property
    def scored(self) -> ScoredSplit:
        """The validation split as the best epoch scored it."""
        assert self._scored is not None
        return self._scored

    def entry(self) -> dict[str, object] | None:
        """What a checkpoint says of it, but for its tensors; None before the first epoch's end."""
        if self._scored is None:
            return None
        return {"name": self.name, "epoch": self.epoch, "step": self._step, **self._scored.rest()}

    def recall(self, entry: Mapping[str, Any], scored: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
        """Be what gave this `entry()`; `state`: read on rank 0 alone."""
        self.epoch, self._step = entry["epoch"], entry["step"]
        self._scored, self.state = ScoredSplit.of(scored, entry), state

    def offer(self, epoch: int, scored: ScoredSplit, *, step: int) -> None:
        """Keep a copy if this epoch, which ended with `step`, is better; every rank decides alike, from the same integers.
        Collective."""
        new, old = scored.scores, self._scored.scores if self._scored else None
        if old is None or (new.num_correct, -new.loss) > (old.num_correct, -old.loss):
            self.epoch, self._step, self._scored = epoch, step, scored
            # The older copy first: there is room for one.
            self.state = {}
            self.state = self._wrapped.full_state()

    def restore(self) -> None:
        """Put the best epoch's weights back. Collective."""
        self._wrapped.load(self.state)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: on the GPU what torch allocated, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Only Unix has it, and only a run on the CPU needs it.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_split(directory: Path, name: str, split: ScoredSplit) -> Path:
    """Write the predictions of one split, in file order; returns the file."""
    path = directory / f"predictions-{name}.jsonl"
    write_predictions(path, np.arange(len(split.labels_N)), split.labels_N, split.predictions_N, split.probabilities_NC)
    return path


def finish(
    config: Config,
    engine: Engine,
    sources: Sources,
    features: FeatureCache,
    scored: Mapping[str, ScoredSplit],
    *,
    directory: Path,
    best: BestEpoch,
    parameters: Mapping[str, tuple[int, int]],
    num_steps: int,
    totals: RunningTotals,
    prints: Mapping[str, str],
    clock: Clock,
    emit: Emit,
) -> None:
    """Write model, predictions and result.json on rank 0; a failure there is raised on all ranks."""
    world = engine.world
    peak = max(collectives.all_gather(peak_memory_bytes(engine.device)))
    figures, num_tokens = totals.tally.efficiency, totals.tally.real
    scores = {name: split.scores for name, split in scored.items()}

    def write() -> None:
        card = model_card(
            name=directory.name,
            base_model=config.model.name,
            dataset=config.data.source,
            class_names=sources.store.class_names,
            max_length=config.data.max_length,
            splits=scores,
            parameters=parameters,
            settings=settings(config),
            versions=versions(),
            fingerprints=prints,
        )
        export_model(
            directory / "model",
            sources.classifier,
            sources.tokenizer,
            trained=best.state,
            class_names=sources.store.class_names,
            max_length=config.data.max_length,
            card=card,
        )
        paths = {"model": str(directory / "model"), "result": str(directory / "result.json")}
        paths |= {f"{name} predictions": str(write_split(directory, name, split)) for name, split in scored.items()}
        seconds = clock.stop()
        result = Result(
            splits=scores,
            num_steps=num_steps,
            num_ranks=world.num_ranks,
            global_batch_size=config.batch.global_batch_size if config.batch.global_token_budget is None else None,
            global_token_budget=config.batch.global_token_budget,
            padding_efficiency=figures.padding,
            critical_path_efficiency=figures.critical_path,
            rank_balance=figures.rank_balance,
            seconds=Seconds(**seconds),
            tokens_per_second=num_tokens / totals.seconds,
            peak_memory_bytes=peak,
            feature_cache=features.choice.place,
            feature_cache_bytes=features.num_bytes,
            versions=versions(),
            fingerprints=prints,
        )
        write_json(directory / "result.json", result.to_dict())
        facts = {
            f"{name} accuracy": f"{split.accuracy:.4f} ({split.num_correct}/{split.num_examples})"
            for name, split in scores.items()
        }
        if features.num_bytes:
            facts["features"] = f"{gigabytes(features.num_bytes)} kept in {features.choice.place}"
        facts["best epoch"] = f"{best.epoch} of {config.optim.epochs}"
        facts["time"] = f"{seconds['total']:.1f} s, {num_tokens / totals.seconds:,.0f} tokens/s in training"
        emit(RunDone(facts=facts, paths=paths))

    collectives.agree(collectives.attempt(write) if world.is_main else None)


def write_scores(
    directory: Path,
    engine: Engine,
    name: str,
    scored: ScoredSplit,
    *,
    prints: Mapping[str, str],
    clock: Clock,
    emit: Emit,
) -> None:
    """What `evaluate` leaves: result.json and predictions of the split `name`, on rank 0; a failure is raised on all ranks."""
    peak = max(collectives.all_gather(peak_memory_bytes(engine.device)))

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = write_split(directory, name, scored)
        result = Result(
            splits={name: scored.scores},
            num_steps=0,
            num_ranks=engine.world.num_ranks,
            global_batch_size=None,
            global_token_budget=None,
            padding_efficiency=None,
            critical_path_efficiency=None,
            rank_balance=None,
            seconds=Seconds(**clock.stop()),
            tokens_per_second=None,
            peak_memory_bytes=peak,
            feature_cache=None,
            feature_cache_bytes=None,
            versions=versions(),
            fingerprints=prints,
        )
        write_json(directory / "result.json", result.to_dict())
        emit(RunDone(paths={"result": str(directory / "result.json"), "predictions": str(path)}))

    collectives.agree(collectives.attempt(write) if engine.world.is_main else None)
