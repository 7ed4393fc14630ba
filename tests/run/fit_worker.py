"""Programs that train with `fit`: `fit_worker.py FUNCTION FOLDER SETTINGS`. Each writes FOLDER/FUNCTION.json."""

import faulthandler
import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from support.sinks import Interrupt, Kill, WriteEvents

from agnews_dist import Run, fit, load

FOLDER, SETTINGS = Path(sys.argv[2]), json.loads(sys.argv[3])
ROWS = pd.read_csv(FOLDER / "rows.csv")


def run(name: str, train: object = None, **more: Any) -> Run:
    fixed = {"run__dir": FOLDER / "runs", "run__name": name, "cache_dir": FOLDER / "cache", "report__write": False, **SETTINGS}
    return fit(ROWS if train is None else train, model=FOLDER / "model", **{**fixed, **more})


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def snapshot() -> dict[str, object]:
    """Return the state of this process that a run could leave changed."""
    import numpy as np
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    wakeup = signal.set_wakeup_fd(-1)
    return {
        "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "wakeup": wakeup,
        "faulthandler": faulthandler.is_enabled(),
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "environ": dict(os.environ),
        "directory": Path.cwd(),
        "warnings": list(map(str, warnings.filters)),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "anomaly": [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()],
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "random": [str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state())],
        "group": torch.distributed.is_initialized(),
        "accelerate": [str(each._shared_state) for each in (AcceleratorState, GradientState, PartialState)],
        "hub": [constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY],
        "levels": [logging.getLogger(name).level for name in ("huggingface_hub", "httpx", "transformers", "torch")],
        "transformers": [transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()],
        "collector": gc.isenabled(),
        "threads": sorted(each.name for each in threading.enumerate()),
        "files": sorted(str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()),
    }


class FaultySink:
    def __call__(self, event: object) -> None:
        raise ValueError("a fault of the caller's")


def in_one_process() -> dict[str, object]:
    """Fit several times, rightly and wrongly; return what the process looks like after each."""
    import datasets
    import numpy as np
    import torch
    from huggingface_hub import constants

    found: dict[str, object] = {}
    events: list[str] = []
    constants.HF_HUB_OFFLINE = False
    run("first")
    # As another part of a program may leave them.
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(False)
    before, found["frozen"] = snapshot(), gc.get_freeze_count()

    def check(what: str) -> None:
        after = snapshot()
        found[f"changed by {what}"] = {name: (before[name], after[name]) for name in before if before[name] != after[name]}

    labels = np.random.default_rng(0).integers(0, 9, len(ROWS))
    frame = run("frame", ROWS.set_index(labels), sinks=[lambda event: events.append(type(event).__name__), FaultySink()])
    check("a frame")
    found["repr"], found["html"], found["report"], found["events"] = repr(frame), frame._repr_html_(), frame.report, events
    found["debug"] = error_of(lambda: run("debug", debug=True, max_steps=1))
    check("debug")
    found["rows"] = error_of(lambda: run("bad", ROWS.assign(label=None)))
    found["directory"] = error_of(lambda: run("bad", run__dir=FOLDER / "rows.csv" / "runs"))
    found["again"] = error_of(lambda: run("frame"))
    found["settings"] = error_of(lambda: run("bad", epoch=3, label_smoothing="much"))
    found["late"] = error_of(lambda: run("late", max_minutes=0.001))
    check("errors")
    run("path", FOLDER / "rows.csv")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_pandas(ROWS)})
    thread = threading.Thread(target=lambda: run("thread", splits))
    thread.start()
    thread.join()
    check("a thread")
    texts = ROWS.text[:40]
    found["labels"] = [each.label for each in frame.predict(texts)]
    found["probabilities"] = [
        [float(str(value)) for value in each.probabilities] for each in load(frame.directory).predict(texts)
    ]
    check("predictions")
    found["frozen later"] = gc.get_freeze_count()
    return found


def interrupted() -> dict[str, object]:
    """Interrupt a fit before its first step, and after step 3; then let it finish."""
    found: dict[str, object] = {}
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_at(name: str, step: int | None = None) -> Callable[[object], None]:
        def sink(event: Any) -> None:
            if type(event).__name__ == name and step in (None, getattr(event, "step", None)):
                os.kill(os.getpid(), signal.SIGINT)

        return sink

    found["early"] = error_of(lambda: run("early", sinks=[interrupt_at("Progress")]))
    found["early run"] = (FOLDER / "runs" / "early").exists()
    found["stopped"] = error_of(lambda: run("stopped", sinks=[interrupt_at("StepDone", 3)]))
    found["saved"] = json.loads((FOLDER / "runs" / "stopped" / "status.json").read_text())
    found["other rows"] = error_of(lambda: run("stopped", ROWS[::-1]))
    found["handler"] = signal.getsignal(signal.SIGINT) is handler
    found["continued"] = error_of(lambda: run("stopped"))
    return found


def with_deepspeed() -> dict[str, object]:
    """Fit under DeepSpeed twice, then without it."""
    found = {f"error {i}": error_of(lambda i=i: run(f"deepspeed {i}", backend="deepspeed")) for i in range(2)}
    run("after deepspeed")
    return found


def as_rank() -> dict[str, object]:
    """Fit as a rank of a launcher: wrong rows first, then two trainings."""
    found: dict[str, object] = {"rows": error_of(lambda: run("bad", ROWS.assign(label=None)))}
    before = {name: value for name, value in snapshot().items() if name not in ("files", "threads")}
    first, second = run("ranks"), run("ranks again")
    after = snapshot()
    found["changed"] = {name: (value, after[name]) for name, value in before.items() if value != after[name]}
    found["runs"] = [str(first.directory), str(second.directory)]
    found["scores"] = [each.scores["validation"].num_correct for each in (first, second)]
    found["launch"] = error_of(lambda: run("bad", launch=2))
    return found


def launching() -> dict[str, object]:
    """Launch ranks that are interrupted, continue, fail, and are killed."""

    def own(event: object) -> None: ...

    found: dict[str, object] = {}
    before = snapshot()
    found["interrupted"] = error_of(lambda: run("launched", launch=2, sinks=[Interrupt(os.getpid(), step=3)]))
    found["saved"] = json.loads((FOLDER / "runs" / "launched" / "status.json").read_text())
    found["run"] = repr(run("launched", launch=2, sinks=[WriteEvents(FOLDER / "events.txt")]))
    found["failed"] = error_of(lambda: run("failed", launch=2, class_weights=[1, 2]))
    found["killed"] = error_of(lambda: run("killed", launch=2, sinks=[Kill(step=2)]))
    found["rows"] = error_of(lambda: run("bad", ROWS.assign(label=None), launch=2))
    found["sinks"] = [error_of(lambda each=each: run("bad", launch=2, sinks=[each])) for each in (own, error_of)]
    found["number"] = error_of(lambda: run("bad", launch=0))
    after = snapshot()
    found["changed"] = {name: (value, after[name]) for name, value in before.items() if value != after[name]}
    return found


if __name__ == "__main__":
    function = {each.__name__: each for each in (in_one_process, interrupted, with_deepspeed, as_rank, launching)}[sys.argv[1]]
    (FOLDER / f"{sys.argv[1]}{os.environ.get('RANK', '')}.json").write_text(json.dumps(function(), default=str))
