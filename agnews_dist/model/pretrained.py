"""Names of models resolved to directories, the files of a model on the hub, and tokenizers."""

import json
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Literal, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agnews_dist.data.hub_cache import Repository, cache_directory, find_directory
from agnews_dist.data.hub_files import Request
from agnews_dist.data.hugging_face import silence_transformers, translate_errors
from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import embedded_tokenizer

EMBEDDED = "embedded"
"""Model name that needs neither files nor a network (see embedded.py)."""
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_MORE_FILES = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json")
"""Files of a model that are read if they are there."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Token of one byte in a tokenizer that falls back to bytes."""


@dataclass(frozen=True)
class Location:
    """A model's name and its directory."""

    name: str
    directory: Path

    def has_any(self, *names: str) -> bool:
        """Return whether the directory contains one of these files."""
        return any((self.directory / name).is_file() for name in names)


def locate(name: str, revision: str | None) -> Location:
    """Resolve a name to a directory; of a hub id to that in the local cache, at this revision.

    Raises:
        ModelError: `name` is a file, looks like a path that does not exist, or is not in the cache.
    """
    directory = find_model_directory(name) or find_directory(Repository("model", name, revision))
    if directory is None:
        raise ModelError(
            f"model.name {name!r}: it is neither a directory nor in {cache_directory()}. Run 'python -m agnews_dist prepare' "
            "with a network, or set --model.name to a directory."
        )
    return Location(name, directory)


def find_model_directory(name: str) -> Path | None:
    """Return the directory that a name is (of a run's directory its `model/`); None: it is a hub id.

    Raises:
        ModelError: `name` is a file, or looks like a path that does not exist.
    """
    path = Path(name)
    if path.is_dir():
        is_run = (path / "model").is_dir() and not (path / CONFIG_FILE).is_file()
        return path / "model" if is_run else path
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
    return None


def request_model(name: str, revision: str | None, *, needs_weights: bool) -> Request:
    """Return the request for the files of a model on the hub."""
    choose = partial(_choose_files, needs_weights=needs_weights)
    return Request(
        Repository("model", name, revision), choose, read_first=tuple(each for each in WEIGHT_FILES if _is_index(each))
    )


def _choose_files(directory: Path, *, needs_weights: bool) -> Sequence[str]:
    """Return the files of a model: config, tokenizer, and of the weights those that transformers prefers."""

    def find(names: Sequence[str]) -> list[str]:
        return [name for name in names if (directory / name).is_file()]

    # What is missing is named by its most usual name.
    needed = [
        *([CONFIG_FILE] if needs_weights else find([CONFIG_FILE])),
        *(find(TOKENIZER_FILES) or TOKENIZER_FILES[:1]),
        *find(_MORE_FILES),
    ]
    if "vocab.json" in needed and "tokenizer.json" not in needed:
        needed.append("merges.txt")
    if needs_weights:
        weights = (find(WEIGHT_FILES) or list(WEIGHT_FILES))[0]
        needed += [weights, *(_read_shards(directory / weights) if _is_index(weights) else ())]
    return list(dict.fromkeys(needed))


def _is_index(name: str) -> bool:
    return name.endswith(".index.json")


def _read_shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists."""
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} cannot be read: {type(error).__name__} {error}. Copy or download it again.") from error


@contextmanager
def reading(location: Location, what: str) -> Generator[None]:
    """Silence Hugging Face inside the block, which reads `what` from `location`, and turn its exceptions into ModelError."""

    def make_error(reason: str) -> ModelError:
        return ModelError(
            f"{what} in {location.directory} cannot be read: {reason}. Copy or download the directory again, or set "
            "--model.name to another one."
        )

    with silence_transformers(), translate_errors(make_error):
        yield


def load_tokenizer(name: str, *, revision: str | None, pad_token: Literal["new", "eos"]) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model (hub id, directory, run directory or 'embedded') and choose its pad token.

    Padding is on the right. `<|endoftext|>` or `[PAD]` in a text become ordinary tokens. The pad token 'new' keeps one that no
    text can contain and that is not the end-of-text token, else adds [PAD]; 'eos' is the end-of-text token.

    Raises:
        ModelError: no such directory, not in the cache, no or damaged tokenizer files, no fast tokenizer, no end-of-text token,
            or one that cannot be the pad token.
    """
    tokenizer = read_tokenizer(name, revision=revision)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"tokenizer of {name!r} has no end-of-text token: it is not GPT-2's. "
            "Set eos_token in its tokenizer_config.json, or choose another model."
        )
    if pad_token == "new":
        pad_id = cast("int | None", tokenizer.pad_token_id)
        if pad_id is None or pad_id == tokenizer.eos_token_id or can_produce(tokenizer, pad_id):
            tokenizer.add_special_tokens({"pad_token": _find_pad_token(tokenizer)})
    elif can_produce(tokenizer, cast(int, tokenizer.eos_token_id)):
        raise ModelError(
            f"data.pad_token eos: a text can contain {tokenizer.eos_token!r} of model {name!r} as an ordinary token. "
            "Set --data.pad_token new."
        )
    else:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.split_special_tokens = True
    return tokenizer


def read_tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model as its files describe it.

    Raises:
        ModelError: as `load_tokenizer`, but for the end-of-text and pad token.
    """
    if name == EMBEDDED:
        return embedded_tokenizer()
    location = locate(name, revision)
    if not location.has_any(*TOKENIZER_FILES):
        raise ModelError(
            f"model directory {location.directory}: it has no tokenizer (none of {', '.join(TOKENIZER_FILES)}). Copy the "
            "tokenizer's files there, or set --model.name to a directory with them."
        )
    with reading(location, "tokenizer"):
        # Otherwise transformers asks at the terminal whether it may run the code of a model with mean pooling.
        loaded = AutoTokenizer.from_pretrained(str(location.directory), trust_remote_code=False)
    if not getattr(loaded, "is_fast", False):
        raise ModelError(
            f"tokenizer of {name!r} is a {type(loaded).__name__}: only a fast tokenizer can split special tokens in a "
            "text. Save it as tokenizer.json, or choose another model."
        )
    tokenizer = cast(PreTrainedTokenizerFast, loaded)
    model = tokenizer.backend_tokenizer.model
    if getattr(model, "dropout", None):
        # A text would get other tokens at every call.
        model.dropout = None
    return tokenizer


def can_produce(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bool:
    """Return whether a text may contain a token after tokenising, with special tokens split. True if that is uncertain."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if any(added["id"] == token_id and not added["special"] for added in backend["added_tokens"]):
        return True
    own = tokenizer.backend_tokenizer.model.id_to_token(token_id)
    model = backend["model"]
    if own is None or model["type"] != "BPE":
        return own is not None
    if own == model["unk_token"] or model["ignore_merges"]:
        return True
    # The alphabet: single characters, or bytes; then what merges make of it.
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    if len(own.removeprefix(prefix).removesuffix(suffix)) <= 1 or (model["byte_fallback"] and _BYTE.fullmatch(own)):
        return True
    # Older files write the two tokens of a merge with a space between.
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return any(left + right.removeprefix(prefix) == own for left, right in merges)


def _find_pad_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return [PAD], or [PAD1] and so on if texts can contain it."""
    vocabulary = tokenizer.get_vocab()
    names = chain(["[PAD]"], (f"[PAD{i}]" for i in count(1)))
    return next(name for name in names if name not in vocabulary or not can_produce(tokenizer, vocabulary[name]))
