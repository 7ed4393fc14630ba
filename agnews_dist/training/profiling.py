"""A torch.profiler trace of a few training steps on rank 0, and the operators that cost most."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from agnews_dist.events import Emit, Profiled

# Skip the first steps (allocator, lazy initialisation), let the profiler itself settle, then record.
WAIT, WARM_UP, ACTIVE = 2, 1, 4


class NoProfiler:
    """Takes the place of the profiler where nothing is recorded."""

    def step(self) -> None:
        """Do nothing."""


@contextmanager
def profiling(
    wanted: bool, directory: Path, *, device: torch.device, num_steps: int, emit: Emit
) -> Generator[profile | NoProfiler, None, None]:
    """Around the training loop, which calls `step()` after every step; writes `<directory>/profile/trace.json`.

    `num_steps` is that of the whole run; a run too short for the usual window is recorded from its first step.
    """
    if not wanted:
        yield NoProfiler()
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
        yield recorder
