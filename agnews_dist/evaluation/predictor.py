"""Prediction: read texts, and compute their class probabilities in file order."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.tokens import TRAINING_ENCODING, TextEncoding, TokenSplit, encode
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ConfigError, DataError
from agnews_dist.evaluation.evaluator import compute_rank_logits, log_softmax_NC
from agnews_dist.evaluation.metrics import in_file_order
from agnews_dist.model.gpt2 import Classifier

TEXTS_PER_CHUNK = 4096
"""Texts tokenised and sorted by length at once: enough for batches without padding, few enough for early answers."""


@dataclass(frozen=True)
class InputText:
    """One text to classify."""

    id: object
    """Row number from 0, or the `id` of a JSON line."""
    text: str
    location: str
    """File and line, or argument, for error messages."""


def read_texts(arguments: Sequence[str], file: str | None, stdin: TextIO) -> list[InputText]:
    """Read and check all texts: from the arguments, from `file`, or else from standard input.

    Raises:
        DataError: there are no texts, the file cannot be read, a text is empty or not UTF-8, or a JSON line has no text.
        ConfigError: both arguments and a file.
    """
    if arguments and file is not None:
        raise ConfigError(f"--file {file!r} and {len(arguments)} text argument(s): only one may be given. Remove the other.")
    if arguments:
        texts = [InputText(i, text, f"text argument {i + 1}") for i, text in enumerate(arguments)]
    elif file is not None:
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"--file {file!r}: the file cannot be read ({error.strerror}). Check the path.") from error
        texts = list(_split_lines(content, file, is_jsonl=file.endswith(".jsonl")))
    else:
        texts = list(_split_lines(stdin.buffer.read(), "standard input", is_jsonl=False))
    if not texts:
        raise DataError(
            f"{file or 'standard input'} is empty: there is nothing to classify. Give texts as arguments, with --file, or one "
            "per line on standard input."
        )
    for text in texts:
        _check_text(text)
    return texts


def _check_text(text: InputText) -> None:
    """Check that a text is not empty and can be encoded."""
    if not text.text.strip():
        raise DataError(f"{text.location} is empty: it cannot be classified. Remove it or add words.")
    try:
        text.text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{text.location} contains {text.text[error.start]!r}, half of a character: it cannot be tokenised. "
            "Encode the text as UTF-8."
        ) from error


def _split_lines(content: bytes, source: str, *, is_jsonl: bool) -> Iterator[InputText]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # the rest after the last line end
    for i, line in enumerate(lines):
        location = f"{source}, line {i + 1}"
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{location} is not UTF-8 (byte {line[error.start]:#04x} at {error.start}): it cannot be decoded. "
                "Convert the file to UTF-8."
            ) from error
        yield _parse_object(text, i, location) if is_jsonl else InputText(i, text, location)


def _parse_object(line: str, i: int, location: str) -> InputText:
    try:
        value: Any = json.loads(line)
    except ValueError:
        value = None
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if not isinstance(fields.get("text"), str):
        raise DataError(
            f'{location}: not a JSON object with a "text" ({line[:40]!r}). '
            'Write {"text": "..."} on every line, or rename a file of plain text.'
        )
    return InputText(fields.get("id", i), fields["text"], location)


def classify(
    texts: Sequence[InputText],
    classifier: Classifier,
    tokenizer: PreTrainedTokenizerFast,
    engine: Engine,
    *,
    max_length: int,
    encoding: TextEncoding = TRAINING_ENCODING,
    warn: Callable[[str], object],
) -> Iterator[tuple[InputText, NDArray[np.float64]]]:
    """Yield each text with its class probabilities, in order. Within a chunk, batches are sorted by length.

    `warn` is called once at the end if texts were truncated to `max_length` tokens.

    Raises:
        DataError: a text without any token.
    """
    num_cut = 0
    for begin in range(0, len(texts), TEXTS_PER_CHUNK):
        chunk = texts[begin : begin + TEXTS_PER_CHUNK]
        locations = [text.location for text in chunk]
        ids, num_truncated = encode(
            tokenizer, [text.text for text in chunk], max_length, encoding=encoding, name=locations.__getitem__
        )
        num_cut += num_truncated
        split = TokenSplit(
            name="texts",
            tokens=np.concatenate(ids).astype(np.int32),
            offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
            labels=np.zeros(len(ids), np.int64),
            num_truncated=num_truncated,
        )
        table = TokenTable(split, pad_id=cast(int, tokenizer.pad_token_id), device=engine.device)
        ids_N, logits_NC = compute_rank_logits(classifier, table, engine)
        yield from zip(chunk, np.exp(log_softmax_NC(logits_NC[in_file_order(ids_N, len(chunk))])), strict=True)
    if num_cut:
        warn(
            f"{num_cut} of {len(texts)} texts were truncated to {max_length} tokens. "
            "Split them, or train with a larger --data.max_length."
        )
