"""The files that a finished run leaves: predictions, result.json, exported model."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from agnews_dist.config.schema import Config
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ModelError, UserError
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Emit, RunDone, Scores, begin_phase
from agnews_dist.features.manager import FeatureCache
from agnews_dist.model.export import export_model
from agnews_dist.report.model_card import ModelCard
from agnews_dist.report.result_files import Result, Seconds, versions, write_json, write_predictions
from agnews_dist.run.attempt import Attempt
from agnews_dist.run.fingerprints import weight_settings
from agnews_dist.run.setup import TrainingInputs
from agnews_dist.storage.capacity import gigabytes, peak_resident_bytes
from agnews_dist.training.loop import Trainer
from agnews_dist.training.timing import StageTimer


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process ever held: torch's allocations on a GPU, resident memory on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def write_results(
    config: Config,
    engine: Engine,
    inputs: TrainingInputs,
    features: FeatureCache,
    trainer: Trainer,
    split_scores: Mapping[str, SplitScores],
    *,
    attempt: Attempt,
) -> RunDone | None:
    """Write predictions, result.json and the model of a training, on rank 0, and record that it is finished. Collective.

    Return the last event of the run, on rank 0.
    """
    directory, monitors = attempt.directory, attempt.monitors
    peak = max(collectives.all_gather(peak_memory_bytes(engine.device)))
    scores = select_scored(split_scores)

    def write() -> RunDone:
        monitors.emit(begin_phase("write the results"))
        paths = {"model": str(directory / "model"), "result": str(directory / "result.json")}
        paths |= {f"{name} predictions": str(write_predictions(directory, name, split)) for name, split in split_scores.items()}
        seconds = monitors.timer.totals()
        efficiency, num_tokens = trainer.totals.tally.efficiency, trainer.totals.tally.real
        tokens_per_second = num_tokens / trainer.totals.seconds
        result = Result(
            splits=scores,
            num_steps=trainer.step,
            num_ranks=engine.world.num_ranks,
            global_batch_size=config.batch.global_batch_size if config.batch.global_token_budget is None else None,
            global_token_budget=config.batch.global_token_budget,
            padding_efficiency=efficiency.padding,
            critical_path_efficiency=efficiency.critical_path,
            rank_balance=efficiency.rank_balance,
            seconds=Seconds(**seconds),
            tokens_per_second=tokens_per_second,
            peak_memory_bytes=peak,
            feature_cache=features.choice.place,
            feature_cache_bytes=features.num_bytes,
            versions=versions(),
            fingerprints=inputs.fingerprints,
        )
        write_json(directory / "result.json", result.to_dict())
        if not math.isfinite(scores["validation"].loss):
            raise UserError(
                f"validation loss {scores['validation'].loss} at every evaluation: such weights are not exported. Lower "
                "optim.lr or optim.max_grad_norm, or try engine.precision fp32."
            )
        # Last: a failing export must lose no scores.
        try:
            inputs.weight_files.check(monitors.emit)
            monitors.emit(begin_phase("export the model"))
            export_trained(config, inputs, trainer.best.weights, split_scores, directory)
        except ModelError as error:
            raise ModelError(
                f"export of {directory.name}: it failed, and the scores are in {directory}. {error} The same command with "
                f"--run.name {directory.name} exports again."
            ) from error
        facts = {
            name: f"accuracy {each.accuracy:.4f} ({each.num_correct:,} of {each.num_examples:,}), macro F1 {each.macro_f1:.4f}"
            for name, each in scores.items()
        }
        if features.num_bytes:
            place = features.choice.place
            facts["features"] = f"{gigabytes(features.num_bytes)} kept {'on' if place == 'disk' else 'in'} {place}"
        best, metric = trainer.best, config.optim.best_metric
        facts["best weights"] = f"step {best.step:,} of {trainer.step:,}, in epoch {best.epoch}, by validation {metric}"
        facts["time"] = f"{seconds['total']:.1f} s, {tokens_per_second:,.0f} tokens/s in training"
        # Before the other ranks exit with 0, and before the report, without which the run is complete.
        attempt.finish(trainer.step, trainer.end_reason)
        return RunDone(facts=facts, paths=paths)

    outcome = collectives.catch(write) if engine.world.is_main else None
    collectives.wait_for_main(f"writes the results to {directory}")
    return collectives.raise_if_any_failed(outcome)


def select_scored(splits: Mapping[str, SplitScores]) -> dict[str, Scores]:
    """Return the scores of the splits that have labels."""
    return {name: split.scores for name, split in splits.items() if split.scores is not None}


def export_trained(
    config: Config,
    inputs: TrainingInputs,
    weights: Mapping[str, Tensor],
    split_scores: Mapping[str, SplitScores],
    directory: Path,
    note: str = "",
) -> None:
    """Export trained weights as a directory that Hugging Face loads, with its model card and a `note` in it."""
    card = ModelCard(
        name=directory.name,
        base_model=config.model.name,
        dataset=config.data.source,
        class_names=inputs.class_names,
        max_length=config.data.max_length,
        splits=select_scored(split_scores),
        parameters=inputs.parameters,
        settings=weight_settings(config),
        versions=versions(),
        fingerprints=inputs.fingerprints,
        note=note,
    ).to_markdown()
    export_model(
        directory / "model",
        inputs.classifier,
        inputs.tokenizer,
        trained=weights,
        class_names=inputs.class_names,
        max_length=config.data.max_length,
        card=card,
    )


def write_scores(
    directory: Path,
    engine: Engine,
    name: str,
    split: SplitScores,
    *,
    fingerprints: Mapping[str, str],
    timer: StageTimer,
    emit: Emit,
) -> None:
    """Write result.json and predictions of the split that `evaluate` scored, on rank 0. Collective."""
    peak = max(collectives.all_gather(peak_memory_bytes(engine.device)))

    def write() -> None:
        emit(begin_phase("write the results"))
        directory.mkdir(parents=True, exist_ok=True)
        path = write_predictions(directory, name, split)
        result = Result(
            splits=select_scored({name: split}),
            num_steps=0,
            num_ranks=engine.world.num_ranks,
            seconds=Seconds(**timer.totals()),
            peak_memory_bytes=peak,
            versions=versions(),
            fingerprints=fingerprints,
        )
        write_json(directory / "result.json", result.to_dict())
        emit(RunDone(paths={"result": str(directory / "result.json"), "predictions": str(path)}))

    collectives.raise_if_any_failed(collectives.catch_on_main(write, f"writes the results to {directory}"))
