"""`fit`: a training as a function of rows and settings."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from agnews_dist.api.finished_run import Run
from agnews_dist.api.named_settings import NamedSettings
from agnews_dist.data.hugging_face import silence_imports
from agnews_dist.errors import ConfigError
from agnews_dist.events import Emit
from agnews_dist.storage.directories import cache_root

PathLike = str | os.PathLike[str]


def fit(
    train: object = None,
    *,
    validation: object = None,
    test: object = None,
    model: PathLike | None = None,
    config: PathLike | Sequence[PathLike] | None = None,
    settings: Mapping[str, object] | None = None,
    sinks: Sequence[Emit] = (),
    launch: int | None = None,
    **named: Any,
) -> Run:
    """Train a text classifier: fine-tune a GPT-2 on rows of texts and labels.

    The same rows, settings and number of ranks give the same bits as the command `train`. Nothing of the process is changed
    for good.

    Args:
        train: rows with texts and labels: a pandas DataFrame, a datasets.Dataset or DatasetDict, an arrow table, a tuple
            (texts, labels), or a list of pairs (text, label) or of dicts. Or a path or hub id, as of `data.source`. None:
            `data.source` of the settings.
        validation: rows that choose the best weights. Or the share of train to hold out for that, where no such split is given.
        test: rows that are scored once at the end. They may be without labels.
        model: hub id or directory of a GPT-2. None: `model.name` of the settings, which is gpt2 by default.
        config: YAML files of settings; later ones override earlier ones, and all other arguments override files.
        settings: settings by dotted key: `{"optim.lr": 1e-3}`.
        sinks: functions that get every event (`agnews_dist.events`) on rank 0. An error in one does not end the run.
        launch: processes on this machine that train together, as `torchrun --nproc_per_node`. None: this process. Under
            torchrun every rank calls `fit`, without `launch` and with the same arguments.
        named: settings by name: `lr=1e-3`, `run__name="news"`. A name that several sections have needs its section. Also
            `debug=True`, `quiet=True`, `verbose=True`, `profile=True` and `accept=["optim.lr"]`, as of the command.

    Raises:
        ConfigError: wrong settings, all of them.
        DataError: wrong rows; names them by their position from 0, and by the label in the index where that differs.
        UserError: anything else that the user can fix; see `agnews_dist.errors`.
        Stopped: the run was stopped by its time limit, after a checkpoint. The same call with the same `run__name` continues.
        KeyboardInterrupt: the same, after Ctrl-C. Before the first step, and at a second one, nothing is saved.
    """
    found = NamedSettings()
    found.add_files(config)
    given = _add_rows(found, train, validation, test)
    if model is not None:
        found.add("model.name", model, "model")
    found.add_named({} if settings is None else settings, has_options=False)
    found.add_named(named)
    resolved = found.build()
    if callable(sinks) or not all(map(callable, sinks)):
        raise ConfigError(f"sinks={sinks!r}: it takes a list of functions, which get every event. Write sinks=[function].")
    # Late: wrong settings must not wait seconds for torch.
    with silence_imports():
        from agnews_dist.api.in_process import train_here
        from agnews_dist.api.launching import train_on_ranks
        from agnews_dist.api.training_run import TrainingJob
        from agnews_dist.data.given_rows import read_given
        from agnews_dist.run.hub_inputs import split_settings
        from agnews_dist.run.setup import column_settings

    read = None
    if given is not None:
        data = resolved.data
        read = partial(
            read_given, given, column_settings(data), split_settings(data, hold_out=True), cache_root(data.cache_dir)
        )
    options = found.options
    if options["quiet"] and options["verbose"]:
        raise ConfigError("quiet=True and verbose=True: they contradict each other. Remove one of them.")
    verbosity = "quiet" if options["quiet"] else "verbose" if options["verbose"] else "normal"
    job = TrainingJob(resolved, options["accept"], options["profile"], verbosity, tuple(sinks), read)
    trained = train_here(job) if launch is None else train_on_ranks(job, launch)
    return Run(trained.directory.absolute(), trained.scores)


def _add_rows(settings: NamedSettings, train: object, validation: object, test: object) -> dict[str, object] | None:
    """Add what is a setting; return split -> rows if some are given in Python."""
    from agnews_dist.data.corpus import IN_MEMORY

    if isinstance(validation, (int, float)) and not isinstance(validation, bool):
        settings.add("data.validation_fraction", validation, "validation")
        validation = None
    if validation is None and test is None and (train is None or isinstance(train, (str, os.PathLike))):
        if train is not None:
            settings.add("data.source", train, "train")
        return None
    settings.add("data.source", IN_MEMORY, "train")
    return {name: rows for name, rows in (("train", train), ("validation", validation), ("test", test)) if rows is not None}
