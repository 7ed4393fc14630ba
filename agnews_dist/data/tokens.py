"""Text to tokens, once per corpus, tokenizer and maximum length: one process builds the cache, all map it into memory.

Processes synchronise by a file lock, without collectives. So this works before a process group exists, on a login node, and on
a file system that nodes share.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from agnews_dist.data.rows import Corpus, Split, check_corpus
from agnews_dist.data.token_cache import FORMAT, CachedTokens, TokenSplit, hash_json, read_or_build
from agnews_dist.errors import DataError
from agnews_dist.events import Emit, Progress, Warned
from agnews_dist.storage.directories import cache_root

_CHUNK_TEXTS = 1_000
"""Texts per call of the tokenizer, and per progress report."""
_HEAD_START_SECONDS = 10.0
"""Maximum wait for the process that builds first."""


@dataclass(frozen=True)
class TextEncoding:
    """Rules by which a text becomes tokens. The defaults are those of training."""

    adds_special_tokens: bool = False
    splits_special_tokens: bool = True
    """Special tokens written in a text become ordinary tokens."""
    pad_id: int | None = None
    """Token that Hugging Face's classifier skips at the end of a text; None: no text ends in it."""


TRAINING_ENCODING = TextEncoding()


@dataclass(frozen=True)
class TokenStore(CachedTokens):
    """Tokens of a corpus, opened from the cache."""

    path: Path
    """Directory of the cache."""
    fingerprint: str
    """Key of the cache: sha256 over corpus, tokenizer, maximum length and format."""
    was_cached: bool
    """False in the process that built it."""


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_length: int,
    *,
    encoding: TextEncoding = TRAINING_ENCODING,
    name: Callable[[int], str] = lambda i: f"text {i + 1}",
) -> tuple[list[list[int]], int]:
    """Tokenise texts; returns (at most `max_length` token ids of each, number of longer texts).

    In training, `<|endoftext|>` or `[PAD]` written in a text become ordinary tokens. `name(i)`: name of text i in messages.

    Raises:
        DataError: a text has no token.
    """
    call = partial(
        tokenizer,
        add_special_tokens=encoding.adds_special_tokens,
        split_special_tokens=encoding.splits_special_tokens,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    # Not truncated here: the longer texts are counted.
    ids = cast(list[list[int]], call(list(texts), truncation=False)["input_ids"])
    for i, tokens in enumerate(ids):
        if not tokens:
            raise DataError(
                f"{name(i)} has no token ({texts[i][:40]!r}): at least one is needed. Remove it, or use a tokenizer that "
                "knows its characters."
            )
    longer = [i for i, tokens in enumerate(ids) if len(tokens) > max_length]
    if longer and (encoding.adds_special_tokens or tokenizer.truncation_side != "right"):
        # The tokenizer itself truncates: on its own side, and it keeps the special tokens that it adds.
        cut = cast(list[list[int]], call([texts[i] for i in longer], truncation=True, max_length=max_length)["input_ids"])
        for i, tokens in zip(longer, cut, strict=True):
            ids[i] = tokens
    elif longer:
        ids = [tokens[:max_length] for tokens in ids]
    if encoding.pad_id is not None:
        ids = [_remove_last_pads(tokens, encoding.pad_id) for tokens in ids]
    return ids, len(longer)


def _remove_last_pads(tokens: list[int], pad_id: int) -> list[int]:
    """Remove the pad tokens at the end, but never the first token. Hugging Face's classifier reads the last one left."""
    end = len(tokens)
    while end > 1 and tokens[end - 1] == pad_id:
        end -= 1
    return tokens[:end]


def open_or_build(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    cache_dir: Path | None,
    emit: Emit,
    builds_first: bool = True,
    encoding: TextEncoding = TRAINING_ENCODING,
) -> TokenStore:
    """Open the tokens of `corpus` below `cache_dir` (see `cache_root`), or tokenise it now.

    Any number of processes may call this at once: one builds, the others wait for its lock and open the published cache.
    `builds_first=False` waits some seconds for another process to build: the process with the console should show progress.

    Raises:
        DataError: the cache directory cannot be written, or a text is empty, blank or without a token.
    """
    root = cache_root(cache_dir)
    key = _key(corpus, tokenizer, max_length, encoding)
    directory = root / key
    if not builds_first:
        deadline = time.monotonic() + _HEAD_START_SECONDS
        while not directory.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    tokens, was_cached = read_or_build(directory, partial(_build, corpus, tokenizer, max_length, encoding, emit), emit)
    for message in tokens.warnings:
        emit(Warned(message=message))
    return TokenStore(tokens.splits, tokens.class_names, tokens.warnings, directory, key, was_cached)


def _key(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, max_length: int, encoding: TextEncoding) -> str:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Without the state of the last call.
    content["padding"] = content["truncation"] = None
    side = tokenizer.truncation_side
    if (encoding, side) != (TRAINING_ENCODING, "right"):
        return hash_json([FORMAT, corpus.fingerprint, content, max_length, asdict(encoding), side])
    # Without special tokens: training never produces them, so both pad options share a cache.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return hash_json([FORMAT, corpus.fingerprint, content, max_length])


def _build(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, max_length: int, encoding: TextEncoding, emit: Emit
) -> CachedTokens:
    """Check and tokenise every split."""
    warnings = check_corpus(corpus)
    total, before = sum(map(len, corpus.splits.values())), 0
    splits: dict[str, TokenSplit] = {}
    for split in corpus.splits.values():
        splits[split.name] = _tokenise(split, tokenizer, max_length, encoding, emit, before=before, total=total)
        before += len(split)
    cut = {split.name: split.num_truncated for split in splits.values() if split.num_truncated}
    if cut:
        num_cut = sum(cut.values())
        counts = ", ".join(f"{name} {count:,}" for name, count in cut.items())
        warnings.append(
            f"{num_cut:,} of {total:,} texts ({num_cut / total:.1%}; {counts}) are longer than {max_length} tokens and were "
            "cut off: the model does not see the rest. Raise --data.max_length to keep it."
        )
    return CachedTokens(splits, corpus.class_names, tuple(warnings))


def _tokenise(
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    encoding: TextEncoding,
    emit: Emit,
    *,
    before: int,
    total: int,
) -> TokenSplit:
    """Tokenise one split in memory; `before` of the `total` texts are done already."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    chunks: list[np.ndarray[Any, Any]] = []
    lengths: list[int] = []
    num_truncated = 0
    for begin in range(0, len(split), _CHUNK_TEXTS):
        emit(Progress(task="tokenize", done=before + begin, total=total))
        ids, num_cut = encode(
            tokenizer,
            split.texts[begin : begin + _CHUNK_TEXTS],
            max_length,
            encoding=encoding,
            name=lambda i, begin=begin: split.origin.name(begin + i),
        )
        num_truncated += num_cut
        lengths.extend(map(len, ids))
        chunks.append(np.fromiter(chain.from_iterable(ids), dtype=dtype))
    emit(Progress(task="tokenize", done=before + len(split), total=total))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenSplit(split.name, np.concatenate(chunks), offsets, split.labels, num_truncated)
