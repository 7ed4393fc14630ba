"""Classify texts with a saved classifier. `python -m agnews_dist predict --model.name runs/NAME TEXT ...`.

TEXT ...        the texts; without any, --file; without that, one text per line of standard input
--model.name    a run's directory, an exported directory, or a hub id of a GPT2ForSequenceClassification
--file          one text per line; in a .jsonl file one object with "text" (and perhaps "id") per line
--format        table (default on a terminal) or jsonl (default elsewhere): {"id", "text", "prediction", "probabilities"}

One process; the answers come in the order of the texts.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agnews_dist.commands.command import run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    from agnews_dist.engine.engine import Engine
    from agnews_dist.model.gpt2 import Classifier

OPTIONS = (
    cli.Option("text", nargs="*", help="Texts to classify; default: --file, or the lines of standard input."),
    cli.Option("--file", help="File with one text per line, or .jsonl with 'text' (and perhaps 'id') per line."),
    cli.Option("--format", choices=("table", "jsonl"), help="Output; default: a table on a terminal, else JSON lines."),
)
TEXTS_PER_CHUNK = 4096
"""Texts tokenised and sorted by length at once: enough for batches without padding, little enough to answer early."""


@dataclass(frozen=True)
class Row:
    """One text, where it stands (for errors), and how its answer is called."""

    id: object
    text: str
    place: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code."""
    return run_command("predict", argv, run, OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """Read all texts, classify them chunk by chunk, and print each answer as soon as its chunk is done."""
    config, options = loaded.config, loaded.options
    if world.num_ranks > 1:
        raise UserError(
            f"predict was started as {world.num_ranks} ranks: each would print every answer. Start it without torchrun; "
            "to score a labelled split on many ranks use python -m agnews_dist evaluate."
        )
    if "model.name" not in loaded.explicit:
        raise ConfigError(
            f"model.name is not set, and its default {config.model.name!r} is no classifier: there is nothing to predict "
            "with. Set --model.name to a run's directory, such as runs/NAME."
        )
    rows = read_rows(options["text"], options["file"])

    # Imported here, not above: a missing file or an empty line must not wait seconds for torch.
    from agnews_dist.model.export import load_classifier
    from agnews_dist.model.gpt2 import check_max_length
    from agnews_dist.run.engine_setup import place_classifier, start_engine

    classifier, tokenizer, class_names, max_length = load_classifier(config.model.name, revision=config.model.revision)
    if "data.max_length" in loaded.explicit:
        max_length = config.data.max_length
        check_max_length(max_length, classifier.config.n_positions)
    engine = start_engine(config.engine, world, is_training=False)
    place_classifier(classifier, engine, fast_path=config.engine.fast_path)
    answers = classify(rows, classifier, tokenizer, engine, max_length=max_length)
    as_table = options["format"] == "table" or (options["format"] is None and sys.stdout.isatty())
    try:
        (print_table if as_table else print_lines)(answers, class_names)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`); what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_rows(texts: Sequence[str], file: str | None) -> list[Row]:
    """All texts from the arguments, `file`, or standard input, checked before anything is computed.

    Raises:
        DataError: no text at all, an empty one, or one that is not UTF-8; a file that cannot be read; a line of a .jsonl
            file that is no object with a "text".
        ConfigError: both texts and a file.
    """
    if texts and file is not None:
        raise ConfigError(
            f"{len(texts)} text argument(s) and --file {file!r}: it is unclear which to classify. Give one or the other."
        )
    if texts:
        rows = [Row(i, text, f"text argument {i + 1}") for i, text in enumerate(texts)]
        source = "the arguments"
    elif file is not None:
        try:
            content = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise DataError(
                f"file {file!r} cannot be read ({error.strerror}): there is no text to classify. Check --file."
            ) from error
        rows, source = list(_rows_of_lines(content, file, is_jsonl=file.endswith(".jsonl"))), file
    else:
        if sys.stdin.isatty():
            print("Reading texts from the terminal, one per line; end with Ctrl-D.", file=sys.stderr, flush=True)
        rows, source = list(_rows_of_lines(sys.stdin.buffer.read(), "standard input", is_jsonl=False)), "standard input"
    if not rows:
        raise DataError(
            f"{source} holds no text: there is nothing to classify. Give texts as arguments, with --file, or one per line "
            "on standard input."
        )
    for row in rows:
        if not row.text.strip():
            raise DataError(f"{row.place} is empty: there is no word to classify it by. Remove it or fill it in.")
        try:
            row.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{row.place} holds {row.text[error.start]!r}, half of a character: it cannot be tokenised. "
                "Encode the text as UTF-8."
            ) from error
    return rows


def classify(
    rows: Sequence[Row],
    classifier: "Classifier",
    tokenizer: "PreTrainedTokenizerFast",
    engine: "Engine",
    *,
    max_length: int,
) -> "Iterator[tuple[Row, NDArray[np.float64]]]":
    """Each row with its class probabilities, in order; batches are sorted by length inside a chunk.

    Texts of more than `max_length` tokens are cut; their number is said on standard error at the end.

    Raises:
        DataError: a text without a single token.
    """
    import numpy as np

    from agnews_dist.data.batching.loader import TokenTable
    from agnews_dist.data.tokens import TokenSplit, encode
    from agnews_dist.evaluation.evaluator import compute_rank_logits, log_softmax_NC
    from agnews_dist.evaluation.metrics import in_file_order

    num_cut, num_classes = 0, classifier.suffix.out_head.out_features
    for begin in range(0, len(rows), TEXTS_PER_CHUNK):
        chunk = rows[begin : begin + TEXTS_PER_CHUNK]
        places = [row.place for row in chunk]
        ids, num_truncated = encode(tokenizer, [row.text for row in chunk], max_length, name=places.__getitem__)
        num_cut += num_truncated
        split = TokenSplit(
            name="texts",
            tokens=np.concatenate(ids).astype(np.int32),
            offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
            labels=np.zeros(len(ids), np.int64),
            num_truncated=num_truncated,
        )
        table = TokenTable(split, pad_id=cast(int, tokenizer.pad_token_id), device=engine.device)
        ids_N, logits_NC = compute_rank_logits(classifier, table, engine, num_classes=num_classes)
        yield from zip(chunk, np.exp(log_softmax_NC(logits_NC[in_file_order(ids_N, len(chunk))])), strict=True)
    if num_cut:
        print(
            f"warning: {num_cut} of {len(rows)} texts are longer than {max_length} tokens: the rest of them was not read. "
            "Split them, or train with a larger --data.max_length.",
            file=sys.stderr,
        )


def print_lines(answers: "Iterator[tuple[Row, NDArray[np.float64]]]", class_names: Sequence[str]) -> None:
    """One JSON object per text."""
    for row, probabilities_C in answers:
        # The float32 logits hold no more digits than float32 probabilities do.
        shares = {
            name: float(str(share)) for name, share in zip(class_names, probabilities_C.astype("f4"), strict=True)
        }
        answer = {
            "id": row.id,
            "text": row.text,
            "prediction": class_names[int(probabilities_C.argmax())],
            "probabilities": shares,
        }
        # ASCII, so that neither the locale nor a line separator inside a text can break a line.
        print(json.dumps(answer))


def print_table(answers: "Iterator[tuple[Row, NDArray[np.float64]]]", class_names: Sequence[str]) -> None:
    """A table for people: the text, its class, and how sure the model is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agnews_dist.report.formatting import visible

    console = Console()
    table = Table("id", "text", "prediction", box=box.SIMPLE_HEAD)
    table.add_column("probability", justify="right")
    for row, probabilities_C in answers:
        best = int(probabilities_C.argmax())
        cells = (str(row.id), row.text, class_names[best], f"{probabilities_C[best]:.1%}")
        # As Text, since rich would read [brackets] in a string as markup.
        table.add_row(*(Text(visible(cell, console.encoding)) for cell in cells))
    console.print(table)


def _rows_of_lines(content: bytes, source: str, *, is_jsonl: bool) -> Iterator[Row]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    for i, line in enumerate(lines):
        place = f"{source}, line {i + 1}"
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place} is not UTF-8 (byte {line[error.start]:#04x} at {error.start}): its characters are unknown. "
                "Convert the file to UTF-8."
            ) from error
        yield _row_of_object(text, i, place) if is_jsonl else Row(i, text, place)


def _row_of_object(line: str, i: int, place: str) -> Row:
    try:
        value: Any = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(cast("dict[str, Any]", value).get("text"), str):
        raise DataError(
            f'{place} is no JSON object with a "text" ({line[:40]!r}): there is nothing to classify. '
            'Write {"text": "..."} on every line, or rename the file if it is plain text.'
        )
    fields = cast("dict[str, Any]", value)
    return Row(fields.get("id", i), fields["text"], place)
