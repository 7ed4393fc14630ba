"""Distributed fine-tuning of a partially frozen GPT-2 into a text classifier.

    text -> tokens -> plan -> batch -> frozen prefix -> trainable suffix -> loss -> evaluation -> checkpoint -> report

A part imports only parts below it:

    __main__.py    command line: agnews-dist COMMAND, python -m agnews_dist COMMAND, torchrun -m agnews_dist COMMAND
    train.py       entry of `torchrun -m agnews_dist.train`
    commands/      one module per command (train, evaluate, predict, report, runs, plan and others)
    api/           the package from Python: fit, load, a whole training as a function
    experiments/   many trainings or fits on one set of features: sweeps, probes
    preflight/     checks before a job: machine, disks, hub, memory, network, ranks
    run/           one run: objects from settings, directory, resume, status, results
    training/      the loop: steps, optimizer, checkpoints, best weights, diagnostics
    report/        what people and scripts read: console, event log, result files, model card
      pages/       the report of a run, and comparisons of runs
      trackers/    TensorBoard, W&B, MLflow, trackio: one process each
    features/      the frozen part's output: where it is kept, computing, sharing and evicting it
    evaluation/    scores of a split, intervals, tests, calibration, baselines, label errors, predictions for texts
    model/         GPT-2: load, freeze, split into prefix and suffix, last token only, export
    engine/        how the trainable part runs: device, precision, DDP, FSDP2, DeepSpeed
    data/          rows from files or the hub, tokens, token cache
      batching/    which examples form each global batch, how ranks share it, loader, sampler
    config/        every setting: schema, values, YAML files
    distributed/   ranks of a job: launcher variables, rendezvous, collectives, heartbeats, stop requests
    storage/       files: atomic publishing, locks, free space
    events.py      everything that a run reports
    errors.py      errors that the user can fix

docs/method.md explains the method, docs/reading.md lists eight files to read first, docs/python.md describes the names below.
Importing this package loads nothing heavy: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agnews_dist.api.finished_run import Run
    from agnews_dist.api.fitting import fit
    from agnews_dist.api.loaded_model import LoadedModel, Prediction, load

__version__ = "0.1.0"
__all__ = ["LoadedModel", "Prediction", "Run", "__version__", "fit", "load"]

_MODULES = {
    "fit": "agnews_dist.api.fitting",
    "load": "agnews_dist.api.loaded_model",
    "LoadedModel": "agnews_dist.api.loaded_model",
    "Prediction": "agnews_dist.api.loaded_model",
    "Run": "agnews_dist.api.finished_run",
}
"""Public name -> module that defines it."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from agnews_dist.data.hugging_face import silence_imports

    with silence_imports():
        value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
