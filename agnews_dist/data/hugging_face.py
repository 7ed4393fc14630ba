"""Calls into Hugging Face libraries: silent, and with their exceptions as errors of this package.

transformers prints progress bars and reports, which would mix with the console of a run. Readers of files raise many unrelated
exception types, from OSError to those of pyarrow and safetensors.
"""

import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

from agnews_dist.errors import UserError
from agnews_dist.storage.capacity import is_out_of_memory


@contextmanager
def silence_transformers() -> Generator[None]:
    """Hide progress bars and load reports of transformers inside the block."""
    from transformers.utils import logging as library

    with ExitStack() as stack:
        stack.callback(library.set_verbosity, library.get_verbosity())
        library.set_verbosity(logging.CRITICAL)
        if library.is_progress_bar_enabled():
            stack.callback(library.enable_progress_bar)
        library.disable_progress_bar()
        yield


@contextmanager
def silence_imports() -> Generator[None]:
    """Hide tqdm's advice to install widgets, which every notebook gets that imports transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")
        yield


@contextmanager
def translate_errors(make_error: Callable[[str], UserError]) -> Generator[None]:
    """Replace any exception inside the block by `make_error(reason)`; `reason`: its type and first line.

    Raises:
        UserError: the block failed. UserError and errors of memory pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        details = lines[0].rstrip(".:") if lines else "no details"
        raise make_error(f"{type(error).__name__}: {details}") from error
