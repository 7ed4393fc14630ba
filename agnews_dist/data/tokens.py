"""Text to tokens, once per corpus, tokenizer and maximum length: one process builds the cache, all map it into memory.

Processes synchronise by a file lock, without collectives. So this works before a process group exists, on a login node, and on
a file system that nodes share.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from agnews_dist.data.quality import find_faults
from agnews_dist.data.rows import Corpus, Split
from agnews_dist.data.token_cache import FORMAT, CachedTokens, TokenSplit, TokenWriter, hash_json, read_or_build
from agnews_dist.errors import DataError
from agnews_dist.events import DataChecked, DataFinding, Emit, Progress
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
    build = partial(_build, corpus, tokenizer, max_length, encoding, emit)
    tokens, was_cached = read_or_build(directory, build, emit)
    findings = tokens.findings
    if tokens.files != _list_files(corpus):  # equal rows of other files
        findings = _find(corpus, tokens.splits, max_length)
    if findings:
        emit(DataChecked(findings=findings))
    return TokenStore(tokens.splits, tokens.class_names, findings, _list_files(corpus), directory, key, was_cached)


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
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, max_length: int, encoding: TextEncoding, emit: Emit, directory: Path
) -> CachedTokens:
    """Check and tokenise every split; the token files are written to `directory`."""
    total, before = sum(map(len, corpus.splits.values())), 0
    encode_texts = partial(encode, tokenizer, max_length=max_length, encoding=encoding)
    splits: dict[str, TokenSplit] = {}
    for split in corpus.splits.values():
        dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        report = partial(_report, emit, before, total)
        with TokenWriter(directory, split.name, dtype) as writer:
            splits[split.name] = _tokenise(split, encode_texts, writer, report)
        before += len(split)
    return CachedTokens(splits, corpus.class_names, _find(corpus, splits, max_length), _list_files(corpus))


def _list_files(corpus: Corpus) -> tuple[str, ...]:
    return tuple(file for split in corpus.splits.values() for file in split.origin.files)


def _find(corpus: Corpus, splits: Mapping[str, TokenSplit], max_length: int) -> tuple[DataFinding, ...]:
    """Return the findings about the rows and their tokens."""
    findings = find_faults(corpus)
    cut = {split.name: split.num_truncated for split in splits.values() if split.num_truncated}
    if cut:
        num_cut, total = sum(cut.values()), sum(map(len, splits.values()))
        counts = ", ".join(f"{name} {count:,}" for name, count in cut.items())
        findings.append(
            DataFinding(
                f"{num_cut:,} of {total:,} texts are longer than {max_length} tokens",
                f"{num_cut / total:.1%}; {counts}",
                "they were cut off, and the model does not see the rest",
                "Raise --data.max_length to keep it",
            )
        )
    return tuple(findings)


def _report(emit: Emit, before: int, total: int, done: int) -> None:
    emit(Progress(task="tokenize", done=before + done, total=total))


def _name_row(split: Split, begin: int, i: int) -> str:
    return split.origin.name(begin + i)


def _tokenise(
    split: Split, encode_texts: Callable[..., tuple[list[list[int]], int]], writer: TokenWriter, report: Callable[[int], None]
) -> TokenSplit:
    """Tokenise one split into the writer's file; `report(n)`: n texts are done."""
    lengths_N = np.zeros(len(split), np.int64)
    num_truncated = 0
    for begin in range(0, len(split), _CHUNK_TEXTS):
        report(begin)
        texts = split.texts[begin : begin + _CHUNK_TEXTS]
        ids, num_cut = encode_texts(texts, name=partial(_name_row, split, begin))
        num_truncated += num_cut
        lengths_N[begin : begin + len(ids)] = [len(tokens) for tokens in ids]
        writer.add(np.fromiter(chain.from_iterable(ids), dtype=np.int64))
    report(len(split))
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    return TokenSplit(split.name, writer.finish(), offsets, split.labels, num_truncated)
