"""Prediction: texts are classified chunk by chunk over all ranks, in order. Rank 0 reads the texts and writes the answers.

The other ranks get tokens, so that standard input, or a file on one node, serves all. The micro-batches of a chunk depend on
the lengths of its texts alone. With equal thread counts the answers are equal to the last bit on any number of ranks.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.input_texts import InputChunk
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ModelError
from agnews_dist.evaluation.evaluator import compute_rank_logits, log_softmax_NC
from agnews_dist.evaluation.metrics import in_file_order
from agnews_dist.events import Emit, Progress, ignore_event
from agnews_dist.model.gpt2 import Classifier

TEXTS_PER_CHUNK = 5_000
"""Texts tokenised and sorted by length at once: enough for batches without padding, few enough for early answers."""
LOGITS_PER_CHUNK = 1 << 24
"""Logits of a chunk, at most: 64 MB. So a chunk has fewer texts if there are thousands of classes."""
QUIET_SECONDS = 10.0
"""Shorter work does not report its end, which would be a line in a log."""
_FEW = 8
"""Most probable classes that repeated maxima find faster than sorting."""


class Encoder(Protocol):
    """Tokeniser of texts, see `tokens.encode`; `name(i)`: name of text i in messages."""

    def __call__(self, texts: Sequence[str], *, name: Callable[[int], str]) -> tuple[list[list[int]], int]: ...


@dataclass(frozen=True)
class Answers:
    """Predictions for N texts, in the order of the texts."""

    ids_N: NDArray[np.int64]
    """Numbers of the texts within their chunk."""
    predictions_N: NDArray[np.int64]
    """The most probable class; of equal ones the first."""
    best_N: NDArray[np.float32]
    """Probability of the prediction."""
    probabilities_NK: NDArray[np.float32]
    classes_NK: NDArray[np.int64] | None
    """Classes of the columns, the most probable first; None: all classes, in their order."""

    def __len__(self) -> int:
        return len(self.ids_N)

    @staticmethod
    def join(parts: Sequence["Answers"]) -> "Answers":
        """Join the answers of all ranks, in the order of the texts."""
        ids_N = np.concatenate([part.ids_N for part in parts])
        order_N = in_file_order(ids_N, len(ids_N))
        classes = [part.classes_NK for part in parts if part.classes_NK is not None]
        return Answers(
            ids_N[order_N],
            np.concatenate([part.predictions_N for part in parts])[order_N],
            np.concatenate([part.best_N for part in parts])[order_N],
            np.concatenate([part.probabilities_NK for part in parts])[order_N],
            np.concatenate(classes)[order_N] if classes else None,
        )


@dataclass(frozen=True)
class Predictor:
    """A classifier on this rank's device, with its tokenizer."""

    classifier: Classifier
    encode: Encoder
    pad_id: int
    engine: Engine
    num_best: int | None = None
    """Classes whose probabilities are kept, the most probable first; None: all, in their order."""

    @property
    def texts_per_chunk(self) -> int:
        """Texts per chunk; the same on any number of ranks."""
        return max(1, min(TEXTS_PER_CHUNK, LOGITS_PER_CHUNK // self.classifier.suffix.out_head.out_features))

    def tokenise(self, chunk: InputChunk) -> TokenSplit:
        """Tokenise the texts of a chunk.

        Raises:
            DataError: a text has no token.
        """
        ids, num_truncated = self.encode(chunk.texts, name=chunk.locate)
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return TokenSplit("texts", np.concatenate(ids).astype(np.int32), offsets, np.zeros(len(ids), np.int64), num_truncated)

    def compute(self, split: TokenSplit) -> Answers:
        """Compute the answers for a chunk, which are equal on every rank. Collective."""
        table = TokenTable(split, pad_id=self.pad_id, device=self.engine.device)
        ids_N, logits_NC = compute_rank_logits(self.classifier, table, self.engine)
        return Answers.join(collectives.all_gather(reduce_logits(ids_N, logits_NC, self.num_best)))

    def compute_alone(self, split: TokenSplit) -> Answers:
        """Compute the answers for a chunk in this process, which other ranks need not call; its engine has one rank."""
        table = TokenTable(split, pad_id=self.pad_id, device=self.engine.device)
        return Answers.join([reduce_logits(*compute_rank_logits(self.classifier, table, self.engine), self.num_best)])


def reduce_logits(ids_N: NDArray[np.int64], logits_NC: NDArray[np.float32], num_best: int | None) -> Answers:
    """Reduce logits to the answers that are kept, in float64; see `Predictor.num_best`."""
    row_N, log_NC = np.arange(len(ids_N)), log_softmax_NC(logits_NC)
    predictions_N = log_NC.argmax(axis=1)
    best_N = np.exp(log_NC[row_N, predictions_N]).astype(np.float32)
    if num_best is None:
        return Answers(ids_N, predictions_N, best_N, np.exp(log_NC).astype(np.float32), None)
    if num_best > _FEW:
        classes_NK = np.argsort(-log_NC, axis=1, kind="stable")[:, :num_best]
        probabilities_NK = np.exp(np.take_along_axis(log_NC, classes_NK, axis=1))
        return Answers(ids_N, predictions_N, best_N, probabilities_NK.astype(np.float32), classes_NK)
    classes_NK, log_NK = np.empty((len(ids_N), num_best), np.int64), np.empty((len(ids_N), num_best))
    for k in range(num_best):
        classes_NK[:, k] = log_NC.argmax(axis=1)
        log_NK[:, k] = log_NC[row_N, classes_NK[:, k]]
        log_NC[row_N, classes_NK[:, k]] = -np.inf
    return Answers(ids_N, predictions_N, best_N, np.exp(log_NK).astype(np.float32), classes_NK)


def predict_chunks(
    chunks: Iterable[InputChunk],
    write: Callable[[InputChunk, Answers], bool] | None,
    predictor: Predictor,
    *,
    num_texts: int = 0,
    emit: Emit = ignore_event,
) -> tuple[int, int]:
    """Classify chunk after chunk. Collective. Returns (texts, truncated texts); only rank 0 knows these.

    Args:
        chunks: the texts, read when they are needed. Only rank 0 reads them.
        write: called on rank 0 with every chunk and its answers; returns False to stop. Other ranks need none.
        predictor: model and tokenizer.
        num_texts: number of all texts, for the progress; 0: unknown.
        emit: receives the progress.

    Raises:
        SharedError: rank 0 cannot read, tokenise or write; the same on all ranks.
    """
    counts = _Counts(num_texts, emit)
    work = _read_and_write(chunks, write, predictor, counts) if write is not None else None
    answers: Answers | None = None
    while True:
        outcome = collectives.catch_on_main(partial(_advance, work, answers), "reads texts or writes answers")
        split = collectives.all_gather(collectives.raise_if_any_failed(outcome))[0]
        if split is None:
            return counts.num_done, counts.num_truncated
        answers = predictor.compute(split)


Work = Generator[TokenSplit, Answers | None, None]


def _advance(work: Work | None, answers: Answers | None) -> TokenSplit | None:
    """Give the answers to the last chunk; return the tokens of the next one, or None at the end."""
    try:
        return None if work is None else work.send(answers)
    except StopIteration:
        return None


class _Counts:
    """Numbers of texts so far, and their report."""

    def __init__(self, num_texts: int, emit: Emit) -> None:
        self.num_done = self.num_truncated = 0
        self._num_texts, self._emit, self._start = num_texts, emit, time.monotonic()

    def report(self) -> None:
        """Report the progress."""
        is_end = 0 < self._num_texts <= self.num_done
        if not is_end or time.monotonic() - self._start > QUIET_SECONDS:
            self._emit(Progress(task="classify", done=self.num_done, total=self._num_texts, unit="texts"))


def _read_and_write(
    chunks: Iterable[InputChunk], write: Callable[[InputChunk, Answers], bool], predictor: Predictor, counts: _Counts
) -> Work:
    """Yield the tokens of every chunk; write the answers that are sent back."""
    counts.report()
    for chunk in chunks:
        split = predictor.tokenise(chunk)
        counts.num_truncated += split.num_truncated
        answers = yield split
        assert answers is not None
        check_finite(chunk, answers)
        counts.num_done += len(chunk)
        if not write(chunk, answers):
            return
        counts.report()


def check_finite(chunk: InputChunk, answers: Answers) -> None:
    """Check that the probabilities are numbers: of NaN, any class would be predicted."""
    bad_N = np.flatnonzero(~np.isfinite(answers.best_N))
    if len(bad_N):
        raise ModelError(
            f"{chunk.locate(int(bad_N[0]))} has a probability of NaN: the model's numbers overflow. Set --engine.precision "
            "fp32, or choose another model."
        )
