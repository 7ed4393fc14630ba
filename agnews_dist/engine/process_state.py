"""State of the process that a run changes, kept for a program that trains inside of its own process."""

import os
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch

from agnews_dist.engine.deepspeed import isolate_deepspeed
from agnews_dist.engine.engine import isolate_accelerate


@contextmanager
def keep_process_state() -> Generator[None]:
    """Begin the block with torch's defaults, and restore at its end what the program had and what a run changes.

    These are environment variables, warning filters, and what accelerate and DeepSpeed keep per process. Of torch: the random
    state, deterministic algorithms, anomaly detection, default type, precision of matrix products, number of threads.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(_restore_threads, torch.get_num_threads())
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(False)
        stack.callback(torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled())
        torch.autograd.set_detect_anomaly(False)
        stack.enter_context(torch.enable_grad())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        stack.callback(_remember_random_state())
        stack.enter_context(isolate_accelerate())
        stack.enter_context(isolate_deepspeed())
        yield


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _restore_threads(number: int) -> None:
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)


def _remember_random_state() -> Callable[[], None]:
    """Return a function that restores the state of torch's generators as it is now."""
    on_cpu = torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.set_rng_state(on_cpu)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.initial_seed())  # as torch would have seeded them

    return restore
