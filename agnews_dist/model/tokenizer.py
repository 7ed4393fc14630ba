"""The tokenizer, from hub, directory or made on the spot, with a pad token and the settings every part relies on."""

from typing import Literal, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import embedded_tokenizer
from agnews_dist.model.pretrained import EMBEDDED, locate, reading

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
