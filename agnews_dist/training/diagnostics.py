"""Checks and traces around training: deterministic mode, overfitting one batch, a dry run of the largest step, a profile."""

import copy
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from agnews_dist.data.batching.loader import StepBatches, TokenTable
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, OverfitChecked, Profiled, Progress, ignore_event
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.storage.capacity import is_out_of_memory
from agnews_dist.training.losses import PLAIN, StepSettings, example_losses, forward_losses
from agnews_dist.training.optim import build_optimizer

OVERFIT_EXAMPLES = 8
OVERFIT_STEPS = 100


def make_deterministic() -> None:
    """Switch the whole process to deterministic algorithms and anomaly detection. Call it before the first CUDA work."""
    # cuBLAS needs a fixed workspace to be deterministic, and reads this only once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)


def overfit_one_batch(classifier: Classifier, table: TokenTable, engine: Engine, *, lr: float) -> OverfitChecked:
    """Train a copy of the suffix, without dropout, on a few examples until it classifies them all.

    A model that cannot do this is broken: shifted labels, cut gradients, an absurd learning rate. A long run would only
    hide it.

    Raises:
        UserError: a block is trainable, and some example is still wrong after `OVERFIT_STEPS` steps.
    """
    suffix = copy.deepcopy(classifier.suffix).to(engine.device).eval()
    batch = table.batch(torch.arange(min(OVERFIT_EXAMPLES, len(table))).numpy())
    optimizer = build_optimizer(suffix, lr=lr, weight_decay=0.0)
    features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    num_examples = len(batch.labels_B)
    losses: list[float] = []
    accuracy = 0.0
    for _ in range(OVERFIT_STEPS):
        logits_BC = suffix(*features)
        loss = example_losses(logits_BC, batch).sum() / num_examples
        losses.append(loss.item())
        accuracy = (logits_BC.argmax(dim=1) == batch.labels_B).double().mean().item()
        if accuracy == 1.0 and losses[-1] < 0.1:
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    # Norm and head alone may fail without a fault: the frozen part may give two texts nearly equal last tokens.
    if accuracy < 1.0 and len(classifier.suffix.h):
        raise UserError(
            f"run.debug: {num_examples} examples not learnt in {OVERFIT_STEPS} steps (accuracy {accuracy:.2f}, loss "
            f"{losses[0]:.3f} -> {losses[-1]:.3f}). Check optim.lr ({lr}), the labels, and model.trainable_blocks."
        )
    return OverfitChecked(
        num_examples=num_examples, num_steps=len(losses) - 1, first_loss=losses[0], last_loss=losses[-1], accuracy=accuracy
    )


def dry_run(
    classifier: Classifier, batches: StepBatches, engine: Engine, emit: Emit = ignore_event, *, settings: StepSettings = PLAIN
) -> None:
    """Run forward and backward of one step, with memory allocated for the optimizer's moments. `settings`: of its loss.

    Weights, gradients and random state stay as they were. Call it before `engine.prepare`: then no rank communicates, and
    none waits for a rank that ran out of memory.

    Raises:
        SharedError: on all ranks, if any rank ran out of memory.
    """
    rows, tokens = max((batch.tokens_BT.shape for batch in batches.micro_batches), key=lambda shape: shape.numel())
    task = f"dry run of the largest step ({rows} x {tokens} tokens)"

    def run() -> None:
        try:
            _forward_and_backward(classifier, batches, engine, settings)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"largest step ({rows} x {tokens} tokens at once): out of memory. Lower batch.max_tokens_per_rank, "
                "data.max_length or model.trainable_blocks."
            ) from error

    emit(Progress(task=task, done=0, total=1))
    collectives.raise_if_any_failed(collectives.catch(run))
    emit(Progress(task=task, done=1, total=1))


def _forward_and_backward(classifier: Classifier, batches: StepBatches, engine: Engine, settings: StepSettings) -> None:
    suffix, device = classifier.suffix, engine.device
    was_training = suffix.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            suffix.train()
            moments = [torch.zeros_like(parameter) for parameter in suffix.parameters() for _ in range(2)]
            for batch in batches.micro_batches:
                features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
                forward_losses(suffix, features, batch, dropout_key=None, settings=settings).sum().backward()
            del moments
    finally:
        suffix.zero_grad(set_to_none=True)
        suffix.train(was_training)


WAIT, WARM_UP, ACTIVE = 2, 1, 4
"""Steps skipped (allocator, lazy initialisation), steps for the profiler itself, steps recorded."""


@contextmanager
def profile_steps(
    is_enabled: bool, directory: Path, device: torch.device, num_steps: int, emit: Emit
) -> Generator[Callable[[], object], None, None]:
    """Profile a few of the steps inside the `with` block and write `<directory>/profile/trace.json`.

    The block calls the yielded function after every step. `num_steps`: steps of the whole run; a run shorter than the usual
    window is recorded from its first step.
    """
    if not is_enabled:
        yield lambda: None
        return

    def write(recorded: profile) -> None:
        path = directory / "profile" / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
        sort_by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=sort_by, row_limit=12, max_name_column_width=48)
        emit(Profiled(path=str(path), top_operators=table))

    wait = WAIT if num_steps >= WAIT + WARM_UP + ACTIVE else 0
    warm_up = min(WARM_UP, num_steps - 1)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    window = schedule(wait=wait, warmup=warm_up, active=min(ACTIVE, num_steps - wait - warm_up), repeat=1)
    with profile(activities=activities, schedule=window, on_trace_ready=write, record_shapes=True) as recorder:
        yield recorder.step
