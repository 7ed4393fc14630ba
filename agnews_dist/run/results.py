"""From numbers to a finished run: header, running totals, the best epoch, and the files of the run's directory."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from agnews_dist.config.schema import Config
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Emit, RunDone
from agnews_dist.features.manager import FeatureCache
from agnews_dist.model.export import export_model
from agnews_dist.report.model_card import model_card
from agnews_dist.report.result_files import Result, Seconds, versions, write_json, write_predictions
from agnews_dist.run.fingerprints import settings
from agnews_dist.run.setup import TrainingInputs
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.training.best_epoch import BestEpoch, RunningTotals
from agnews_dist.training.timing import StageTimer


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: on the GPU what torch allocated, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Only Unix has it, and only a run on the CPU needs it.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_split(directory: Path, name: str, split: SplitScores) -> Path:
    """Write the predictions of one split, in file order; returns the file."""
    path = directory / f"predictions-{name}.jsonl"
    write_predictions(path, np.arange(len(split.labels_N)), split.labels_N, split.predictions_N, split.probabilities_NC)
    return path


def finish(
    config: Config,
    engine: Engine,
    sources: TrainingInputs,
    features: FeatureCache,
    scored: Mapping[str, SplitScores],
    *,
    directory: Path,
    best: BestEpoch,
    parameters: Mapping[str, tuple[int, int]],
    num_steps: int,
    totals: RunningTotals,
    prints: Mapping[str, str],
    timer: StageTimer,
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
        seconds = timer.stop()
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

    collectives.raise_if_any_failed(collectives.catch(write) if world.is_main else None)


def write_scores(
    directory: Path,
    engine: Engine,
    name: str,
    scored: SplitScores,
    *,
    prints: Mapping[str, str],
    timer: StageTimer,
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
            seconds=Seconds(**timer.stop()),
            tokens_per_second=None,
            peak_memory_bytes=peak,
            feature_cache=None,
            feature_cache_bytes=None,
            versions=versions(),
            fingerprints=prints,
        )
        write_json(directory / "result.json", result.to_dict())
        emit(RunDone(paths={"result": str(directory / "result.json"), "predictions": str(path)}))

    collectives.raise_if_any_failed(collectives.catch(write) if engine.world.is_main else None)
