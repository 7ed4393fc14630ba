"""Progress for Kubeflow Trainer: posts a TrainJob's `trainerStatus` to the status server of its controller.

The controller sets the variables `URL`, `CA_FILE` and `TOKEN_FILE` in every pod if its feature gate TrainJobStatus is on.
"""

import http.client
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from agnews_dist.events import Emit, EvalDone, Event, Resumed, RunDone, RunStarted, StepDone, Warned
from agnews_dist.report.progress import StepProgress

URL = "KUBEFLOW_TRAINER_SERVER_URL"
CA_FILE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN_FILE = "KUBEFLOW_TRAINER_SERVER_TOKEN"
INTERVAL = 5.0
"""Seconds between two posts; the last one does not wait."""
TIMEOUT = 5.0
"""Seconds that a connection or an answer may take, and that `close` waits for the last post."""


class TrainerStatus:
    """Sink that posts progress, time left and metrics from its own thread: a slow or absent server delays no step.

    A failed post is repeated with newer numbers after `INTERVAL`. The first failure is reported as a warning.
    """

    def __init__(self, environ: Mapping[str, str], emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        """`environ` holds `URL`. `emit` gets the warning, together with a later event of the run."""
        self._environ, self._emit, self._clock = environ, emit, clock
        self._progress = StepProgress(0, clock)
        self._step = 0
        self._metrics: dict[str, str] = {}
        self._is_done = False
        self._num_changes = 0
        self._failure: str | None = None
        self._has_warned = False
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._post_until_closed, name="trainer-status", daemon=True)

    def __call__(self, event: Event) -> None:
        """Note the event's numbers for the next post."""
        match event:
            case Resumed():
                self._step = event.step
            case RunStarted():
                self._progress = StepProgress(event.num_steps, self._clock)
                if self._thread.ident is None:
                    self._thread.start()
            case StepDone():
                self._progress.add(event)
                self._step = event.step
            case EvalDone(split=split, scores=scores):
                named = {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "loss": scores.loss}
                # A new dictionary: the thread may be reading the old one.
                self._metrics = {**self._metrics, **{f"{split}_{name}": f"{value:.6g}" for name, value in named.items()}}
            case RunDone():
                self._is_done = True
            case _:
                return
        self._num_changes += 1
        if self._failure is not None and not self._has_warned:
            self._has_warned = True
            message = f"{URL} {self._environ[URL]}: cannot post progress ({self._failure}). The run continues."
            self._emit(Warned(message=message))

    def close(self) -> None:
        """Send the last state; give up after `TIMEOUT`."""
        self._is_closed.set()
        if self._thread.ident is not None:
            self._thread.join(TIMEOUT)

    def _post_until_closed(self) -> None:
        num_posted = 0
        while True:
            is_last = self._is_closed.is_set()  # before the comparison, so that no change is missed
            num_changes = self._num_changes
            if num_changes != num_posted:
                if (failure := self._post()) is None:
                    num_posted = num_changes
                else:
                    self._failure = failure
            if is_last:
                return
            self._is_closed.wait(INTERVAL)

    def _post(self) -> str | None:
        """Send the current state; return the reason if that failed."""
        body = json.dumps({"trainerStatus": self._describe()}, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"}
        try:
            # Kubernetes replaces both files while the job runs, the token every hour.
            if token_file := self._environ.get(TOKEN_FILE):
                headers["Authorization"] = f"Bearer {Path(token_file).read_text(encoding='utf-8').strip()}"
            context = ssl.create_default_context(cafile=self._environ.get(CA_FILE) or None)
            request = urllib.request.Request(self._environ[URL], data=body, headers=headers, method="POST")
            with urllib.request.urlopen(request, timeout=TIMEOUT, context=context):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code} {error.reason}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__

    def _describe(self) -> dict[str, object]:
        """Describe the state as the API's `TrainerStatus`. Metrics are texts."""
        progress, step = self._progress, self._step
        metrics = {"current_step": str(step)}
        status: dict[str, object] = {"lastUpdatedTime": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        if progress.num_steps > 0:
            metrics["total_steps"] = str(progress.num_steps)
            # Evaluation and export follow the last step.
            status["progressPercentage"] = 100 if self._is_done else min(99, 100 * step // progress.num_steps)
        if (seconds := 0 if self._is_done else progress.eta) is not None:
            status["estimatedRemainingSeconds"] = int(seconds)
        if progress.has_steps:
            last = progress.last
            figures = {"loss": last.loss, "learning_rate": last.lr, "grad_norm": last.grad_norm, "current_epoch": last.epoch}
            metrics |= {name: f"{value:.6g}" for name, value in figures.items() if value is not None}
        metrics |= self._metrics
        return status | {"metrics": [{"name": name, "value": value} for name, value in metrics.items()]}
