"""The tokenizer of an export: plain `AutoTokenizer` reads every text as training does, which is checked before training.

Training adds no special tokens, and splits those that are written in a text. transformers adds and recognises them by default.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agnews_dist.data.hugging_face import silence_transformers, translate_errors
from agnews_dist.errors import ModelError, quote
from agnews_dist.model.pretrained import CONFIG_FILE

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NUM_SAMPLES = 200
"""Added tokens, and entries of the vocabulary, among the texts of the check."""
_TEXTS = (
    "Oil prices rise as supply falls.",
    "a",
    "",
    " ",
    "  two  spaces ",
    "\n\tlines\r\nand tabs\t",
    "UPPER Title lower 1,234.5",
    "caf\u00e9 cafe\u0301 \ufb01 \u00df \u0130",
    "\u4e2d\u6587 \u0639\u0631\u0628\u064a \U0001f600\U0001f468\u200d\U0001f469",
    "\u00a0\u2028\ufeff\u200b\u2581\u0120 \0\x1b\x7f",
    "'quotes' \"and\" ##marks [CLS] <s> </w> @@ _ #",
)


def write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """Write the files of a tokenizer that reads texts as `encode` does in training, for transformers 4 and 5.

    Raises:
        OSError: the directory cannot be written.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The truncation and padding of the last call are state, not settings.
    backend |= {"truncation": None, "padding": None, "post_processor": _remove_special_tokens(backend["post_processor"])}
    settings: dict[str, Any] = {
        # The name that transformers 4 knows too.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
    }
    settings |= {name: str(token) for name in _NAMED_TOKENS if (token := getattr(tokenizer, name)) is not None}
    if "add_prefix_space" in (backend["pre_tokenizer"] or {}):
        # transformers 4 changes the pre-tokenizer to what is written here.
        settings["add_prefix_space"] = backend["pre_tokenizer"]["add_prefix_space"]
    # Indented, the vocabulary would take half a second.
    for name, content, indent in (("tokenizer.json", backend, None), ("tokenizer_config.json", settings, 2)):
        text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
        (directory / name).write_text(f"{text}\n", encoding="utf-8")


def _remove_special_tokens(processor: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the post-processor if it changes offsets alone, without the parts that add tokens."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "TemplateProcessing" and not processor["special_tokens"]:
        return processor
    if processor["type"] == "Sequence":
        kept = [part for each in processor["processors"] if (part := _remove_special_tokens(each)) is not None]
        return {**processor, "processors": kept} if kept else None
    return None


def check_export(tokenizer: PreTrainedTokenizerFast, max_length: int, *, name: str) -> None:
    """Check that the exported tokenizer will read texts as training does, before anything is trained.

    Raises:
        ModelError: it reads some text as other tokens, or cannot be written or loaded.
    """

    def make_error(reason: str) -> ModelError:
        return ModelError(
            f"tokenizer of {name!r}: its export cannot be used: {reason}. Save the tokenizer with transformers, or choose "
            "another model."
        )

    with TemporaryDirectory() as directory, translate_errors(make_error), silence_transformers():
        write_tokenizer(Path(directory), tokenizer, max_length)
        # With this file AutoTokenizer takes the same way as for a whole model.
        (Path(directory) / CONFIG_FILE).write_text(json.dumps({"model_type": "gpt2"}, allow_nan=False), encoding="utf-8")
        exported = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(directory))
        texts = _choose_texts(tokenizer, max_length)
        difference = find_difference(tokenizer, exported, texts, max_length)
    if difference is not None:
        raise make_error(f"it reads {quote(difference)} as other tokens")
    if exported.get_vocab() != tokenizer.get_vocab() or exported.pad_token_id != tokenizer.pad_token_id:
        raise make_error("its tokens get other numbers")


def find_difference(
    tokenizer: PreTrainedTokenizerFast, exported: PreTrainedTokenizerFast, texts: Sequence[str], max_length: int
) -> str | None:
    """Return a text that the exported tokenizer, called as a pipeline does, reads other than training; else None."""
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    expected = [tokens[:max_length] for tokens in cast(list[list[int]], ids["input_ids"])]
    found = exported(list(texts), truncation=True, padding=True)
    width = max(map(len, expected))
    for i, (text, tokens) in enumerate(zip(texts, expected, strict=True)):
        num_pads = width - len(tokens)
        row = {"input_ids": tokens + [tokenizer.pad_token_id] * num_pads, "attention_mask": [1] * len(tokens) + [0] * num_pads}
        if {key: found[key][i] for key in found} != row:
            return text
    return None


def _choose_texts(tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[str]:
    """Return texts with what tokenizers treat differently, from a blank to more than `max_length` tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()][-_NUM_SAMPLES:]
    vocabulary = sorted(tokenizer.get_vocab())
    entries = vocabulary[:: 1 + len(vocabulary) // _NUM_SAMPLES]
    texts = [*_TEXTS, *added, *(f"before {token} after{token}" for token in added), " ".join(entries), "".join(entries)]
    return [*texts, tokenizer.convert_tokens_to_string(entries), "word and Words " * max_length]
