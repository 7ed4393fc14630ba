"""Where models and tokenizers are: names resolved, Hugging Face kept quiet as it reads, its failures in our words."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from agnews_dist.errors import ModelError, UserError
from agnews_dist.model.embedded import embedded_tokenizer

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


PAD_TOKEN = "[PAD]"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def load_tokenizer(name: str, *, revision: str | None, pad_token: Literal["new", "eos"]) -> PreTrainedTokenizerFast:
    """The tokenizer of the model `name` (hub id, directory, run directory or 'embedded'), padding on the right.

    `pad_token`: 'new' adds [PAD], or reuses a pad token the tokenizer has beside its end-of-text token; 'eos' pads with
    the end-of-text token. `<|endoftext|>` or `[PAD]` written in a text are split into ordinary tokens.

    Raises:
        ModelError: hub out of reach, no such directory, no or damaged tokenizer files, no fast tokenizer, no
            end-of-text token.
    """
    tokenizer = read_tokenizer(name, revision=revision)
    if pad_token == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def read_tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerFast:
    """`load_tokenizer` without the choice of a pad token: it keeps the one it has, which may be none.

    Raises:
        ModelError: as `load_tokenizer`.
    """
    if name == EMBEDDED:
        tokenizer = embedded_tokenizer()
    else:
        location = locate(name, revision)
        if not location.has(*TOKENIZER_FILES):
            raise ModelError(
                f"{location.directory} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): text cannot become "
                "tokens. Copy the tokenizer's files there, or set --model.name to a directory that has them."
            )
        with reading(location, "tokenizer"):
            loaded = AutoTokenizer.from_pretrained(location.target, revision=revision)
        if not getattr(loaded, "is_fast", False):
            raise ModelError(
                f"tokenizer of {name!r} is a {type(loaded).__name__}: only fast tokenizers (tokenizer.json) can "
                "split special tokens that a text contains. Save it as a fast tokenizer, or choose another model."
            )
        tokenizer = cast(PreTrainedTokenizerFast, loaded)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"tokenizer of {name!r} has no end-of-text token: it is not GPT-2's kind, and cannot be used for "
            "padding. Set eos_token in its tokenizer_config.json, or choose another model."
        )
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    tokenizer.split_special_tokens = True
    return tokenizer
