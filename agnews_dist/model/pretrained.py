"""Names of models resolved to directories or hub ids, and their tokenizers."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agnews_dist.data.hugging_face import silence_transformers, translate_errors
from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import embedded_tokenizer

EMBEDDED = "embedded"
"""Model name that needs neither files nor a network (see embedded.py)."""
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class Location:
    """A model's directory, or its id on the hub."""

    name: str
    revision: str | None
    directory: Path | None
    """None if `name` is a hub id."""

    @property
    def target(self) -> str:
        """Argument for Hugging Face's `from_pretrained`."""
        return str(self.directory) if self.directory else self.name

    def has_any(self, *names: str) -> bool:
        """Return whether the directory contains one of these files; True for a hub id, to save a request."""
        return self.directory is None or any((self.directory / name).is_file() for name in names)


def locate(name: str, revision: str | None) -> Location:
    """Resolve a name to an existing directory (of a run's directory its `model/`), else to a hub id.

    Raises:
        ModelError: `name` is a file, or looks like a path that does not exist.
    """
    path = Path(name)
    if path.is_dir():
        is_run = (path / "model").is_dir() and not (path / CONFIG_FILE).is_file()
        return Location(name, revision, path / "model" if is_run else path)
    if path.exists():
        raise ModelError(
            f"model {name!r} is a file: a model is a directory with {CONFIG_FILE}, weights and a tokenizer. "
            "Set --model.name to its directory."
        )
    # A hub id is 'name' or 'owner/name'.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise ModelError(
            f"model directory {name!r} does not exist: there is nothing to load. "
            "Correct the path, or set --model.name to a hub id such as gpt2, or to 'embedded'."
        )
    return Location(name, revision, None)


@contextmanager
def reading(location: Location, what: str) -> Generator[None]:
    """Silence Hugging Face inside the block, which reads `what` from `location`, and turn its exceptions into ModelError."""

    def make_error(reason: str) -> ModelError:
        if location.directory is None:
            return ModelError(
                f"{what} of model {location.name!r} cannot be read from the hub: {reason}. Check the id, --model.revision and "
                "the network. Offline, set --model.name to a local directory, or run 'python -m agnews_dist prepare' on a "
                "machine with a network and copy its cache (HF_HOME)."
            )
        return ModelError(
            f"{what} in {location.directory} cannot be read: {reason}. Copy or download the directory again, or set "
            "--model.name to another one."
        )

    with silence_transformers(), translate_errors(make_error):
        yield


def load_tokenizer(name: str, *, revision: str | None, pad_token: Literal["new", "eos"]) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model (hub id, directory, run directory or 'embedded') and choose its pad token.

    Padding is on the right. `<|endoftext|>` or `[PAD]` in a text become ordinary tokens. The pad token 'new' keeps one other
    than the end-of-text token, else adds [PAD]; 'eos' is the end-of-text token.

    Raises:
        ModelError: hub unreachable, no such directory, no or damaged tokenizer files, no fast tokenizer, no end-of-text token.
    """
    tokenizer = load_unpadded_tokenizer(name, revision=revision)
    if pad_token == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def load_unpadded_tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model as `load_tokenizer` does, but with the pad token of its files, if any."""
    if name == EMBEDDED:
        tokenizer = embedded_tokenizer()
    else:
        location = locate(name, revision)
        if not location.has_any(*TOKENIZER_FILES):
            raise ModelError(
                f"model directory {location.directory}: it has no tokenizer (none of {', '.join(TOKENIZER_FILES)}). Copy the "
                "tokenizer's files there, or set --model.name to a directory with them."
            )
        with reading(location, "tokenizer"):
            loaded = AutoTokenizer.from_pretrained(location.target, revision=revision)
        if not getattr(loaded, "is_fast", False):
            raise ModelError(
                f"tokenizer of {name!r} is a {type(loaded).__name__}: only a fast tokenizer can split special tokens in a "
                "text. Save it as tokenizer.json, or choose another model."
            )
        tokenizer = cast(PreTrainedTokenizerFast, loaded)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"tokenizer of {name!r} has no end-of-text token: it is not GPT-2's. "
            "Set eos_token in its tokenizer_config.json, or choose another model."
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.split_special_tokens = True
    return tokenizer
