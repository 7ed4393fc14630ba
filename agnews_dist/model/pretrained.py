"""Where models and tokenizers are: names resolved, Hugging Face kept quiet as it reads, its failures in our words."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as hf_logging

from agnews_dist.errors import ModelError, UserError

EMBEDDED = "embedded"
"""The model name that needs neither a file nor a network (embedded.py)."""


@dataclass(frozen=True)
class Location:
    """A directory, or an id on the hub."""

    name: str
    """As the user gave it."""
    revision: str | None
    directory: Path | None
    """None: `name` is a hub id."""

    @property
    def target(self) -> str:
        """What Hugging Face's `from_pretrained` takes."""
        return str(self.directory) if self.directory else self.name

    def has(self, *names: str) -> bool:
        """Whether one of these files is in the directory; always true for a hub id: asking would cost a request."""
        return self.directory is None or any((self.directory / name).is_file() for name in names)


def locate(name: str, revision: str | None) -> Location:
    """An existing directory (of a run's directory its `model/`), else a hub id.

    Raises:
        ModelError: `name` is a file, or reads like a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        is_run = (path / "model").is_dir() and not (path / "config.json").is_file()
        return Location(name, revision, path / "model" if is_run else path)
    if path.exists():
        raise ModelError(
            f"model {name!r} is a file: a model is a directory with config.json, weights and a tokenizer. "
            "Set --model.name to the directory around it."
        )
    # A hub id is 'name' or 'owner/name'.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise ModelError(
            f"model directory {name!r} does not exist: there is nothing to load. "
            "Check the path, or set --model.name to a hub id such as gpt2, or to 'embedded'."
        )
    return Location(name, revision, None)


@contextmanager
def quietly() -> Generator[None]:
    """Silence transformers' progress bars and load reports inside the block."""
    verbosity, has_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if has_bars:
            hf_logging.enable_progress_bar()


@contextmanager
def reading(location: Location, what: str) -> Generator[None]:
    """Around one call into Hugging Face that reads `what` ('weights', 'tokenizer' ...) from `location`.

    Raises:
        ModelError: whatever that call raised, with the remedy for a hub id or a directory.
    """
    try:
        with quietly():
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # its readers raise a dozen unrelated types, from OSError to SafetensorError
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0].rstrip('.:') if lines else 'no details'}"
        if location.directory is None:
            raise ModelError(
                f"{what} of model {location.name!r} cannot be read from the hub ({reason}): there is nothing "
                "to start from. Check the id, --model.revision and the network; without a network set --model.name to a "
                "local directory, or run 'python -m agnews_dist prepare' where there is one and bring its cache "
                "(HF_HOME) here."
            ) from error
        raise ModelError(
            f"{what} in {location.directory} cannot be read ({reason}): the files are damaged or in another format. "
            "Copy or download the directory again, or set --model.name to another one."
        ) from error
