"""Calls into Hugging Face libraries: silent, and with their exceptions as errors of this package.

`datasets` and transformers print progress bars and reports, which would mix with the console of a run. Their readers raise many
unrelated exception types, from OSError to those of pyarrow and safetensors.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

from agnews_dist.errors import UserError


class _Logging(Protocol):
    """The logging module of a library."""

    def get_verbosity(self) -> int: ...

    def set_verbosity(self, verbosity: int) -> None: ...


@contextmanager
def silence_datasets(*, logs: bool = True) -> Generator[None]:
    """Hide progress bars of `datasets` inside the block; with `logs`, also what it logs."""
    import datasets

    with _hide_logs(datasets.logging if logs else None):
        had_bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if had_bars:
                datasets.enable_progress_bars()


@contextmanager
def silence_transformers() -> Generator[None]:
    """Hide progress bars and load reports of transformers inside the block."""
    from transformers.utils import logging as library

    with _hide_logs(library):
        had_bars = library.is_progress_bar_enabled()
        library.disable_progress_bar()
        try:
            yield
        finally:
            if had_bars:
                library.enable_progress_bar()


@contextmanager
def _hide_logs(library: _Logging | None) -> Generator[None]:
    if library is None:
        yield
        return
    verbosity = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


@contextmanager
def translate_errors(make_error: Callable[[str], UserError]) -> Generator[None]:
    """Replace any exception inside the block by `make_error(reason)`; `reason`: its type and first line.

    Raises:
        UserError: the block failed. UserError and MemoryError pass unchanged.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        details = lines[0].rstrip(".:") if lines else "no details"
        raise make_error(f"{type(error).__name__}: {details}") from error
