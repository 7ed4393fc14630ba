"""Sinks for `fit(launch=...)`: ranks import them, so they are in a module."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WriteEvents:
    """Write the name of every event to a file."""

    path: Path

    def __call__(self, event: object) -> None:
        with self.path.open("a") as file:
            file.write(f"{type(event).__name__}\n")


@dataclass(frozen=True)
class Interrupt:
    """Interrupt a process after a step; later steps wait for the consequence."""

    pid: int
    step: int

    def __call__(self, event: object) -> None:
        if type(event).__name__ == "StepDone":
            if event.step == self.step:
                os.kill(self.pid, signal.SIGINT)
            time.sleep(0.5 * (event.step > self.step))


@dataclass(frozen=True)
class Kill:
    """End rank 0 after a step, as the kernel does when memory is short."""

    step: int

    def __call__(self, event: object) -> None:
        if type(event).__name__ == "StepDone" and event.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
