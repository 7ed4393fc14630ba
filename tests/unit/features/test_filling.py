"""A corpus that changes: features are bit for bit those computed from scratch, and only new texts are computed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy import VOCABULARY, toy_classifier

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.rows import Ints
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Progress
from agnews_dist.features import manager
from agnews_dist.features.eviction import ROWS, mark_path
from agnews_dist.features.manager import CacheSettings, FeatureCache
from agnews_dist.features.piece_index import PieceIndex
from agnews_dist.features.precompute import FeatureRows
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.gpt2 import Classifier

CPU = torch.device("cpu")
Text = tuple[int, ...]
Corpus = list[tuple[Text, int]]
"""Tokens and label of each row."""


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """Make calls so small that a few texts take several."""
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 32)


def random_corpus(num: int, seed: int = 0) -> Corpus:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, num).tolist()
    return [(tuple(rng.integers(0, VOCABULARY, length).tolist()), number % 4) for number, length in enumerate(lengths)]


def split_of(name: str, corpus: Corpus) -> TokenSplit:
    tokens = np.array([token for text, _ in corpus for token in text], np.uint16)
    offsets = np.cumsum([0, *(len(text) for text, _ in corpus)]).astype(np.int64)
    return TokenSplit(name, tokens, offsets, np.array([label for _, label in corpus]), 0)


@dataclass
class Built:
    """Features of a run's splits, and what they cost."""

    cache: FeatureCache
    rows: dict[str, list[torch.Tensor]]
    """Split -> rows of each text, without padding."""
    num_tokens: int
    """Tokens that were computed."""
    progress: list[Progress]


def build(directory: Path, splits: dict[str, Corpus], requested: Any = "disk", *, blocks: int = 1) -> Built:
    classifier: Classifier = toy_classifier(blocks)
    tables = {name: TokenTable(split_of(name, corpus), pad_id=0, device=CPU) for name, corpus in splits.items()}
    sizes = {"limit_bytes": 10**9, "reserved_bytes": 0}
    given_settings = CacheSettings(requested, 2, directory, **sizes, frozen_weights="weights", model_name="toy")
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    cache = FeatureCache(classifier, tables, engine, given_settings)
    events: list[Any] = []
    with count_tokens() as counted:
        cache.build(events.append)
    rows: dict[str, list[torch.Tensor]] = {}
    for name, table in tables.items():
        found = cache.source(name)(table.batch(np.random.default_rng(1).permutation(len(table))))
        order = np.argsort(np.random.default_rng(1).permutation(len(table)))
        rows[name] = [found.hidden_BTD[row, : found.lengths_B[row]] for row in order.tolist()]
    cache.close()
    return Built(cache, rows, sum(counted), [event for event in events if isinstance(event, Progress)])


@contextmanager
def count_tokens() -> Iterator[list[int]]:
    """Collect the numbers of tokens that are computed."""
    compute, counted = FeatureRows.compute, []

    def spy(self: FeatureRows, numbers: Ints) -> torch.Tensor:
        counted.append(self.count_tokens(numbers))
        return compute(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureRows, "compute", spy)
        yield counted


def check_equal(found: Built, expected: Built) -> None:
    for name, rows in expected.rows.items():
        assert len(found.rows[name]) == len(rows)
        assert all(torch.equal(one, other) for one, other in zip(found.rows[name], rows, strict=True)), name


def texts_of(splits: dict[str, Corpus]) -> set[Text]:
    return {text for corpus in splits.values() for text, _ in corpus}


def count(texts: set[Text]) -> int:
    return sum(map(len, texts))


texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40).map(tuple)
edits = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 99), texts),
    st.tuples(st.just("remove"), st.integers(0, 99), st.none()),
    st.tuples(st.just("reorder"), st.integers(0, 99), st.none()),
    st.tuples(st.just("relabel"), st.integers(0, 99), st.none()),
    st.tuples(st.just("duplicate"), st.integers(0, 99), st.none()),
)


def edit(corpus: Corpus, kind: str, number: int, text: Text | None) -> Corpus:
    at = number % len(corpus)
    old, label = corpus[at]
    if kind == "add":
        assert text is not None
        return [*corpus[:at], (text, number % 4), *corpus[at:]]
    if kind == "remove":
        return [*corpus[:at], *corpus[at + 1 :]] if len(corpus) > 1 else corpus
    if kind == "relabel":
        return [*corpus[:at], (old, (label + 1) % 4), *corpus[at + 1 :]]
    if kind == "duplicate":
        return [*corpus, (old, label)]
    return [corpus[row] for row in np.random.default_rng(number).permutation(len(corpus))]


@settings(deadline=None, max_examples=25)
@given(
    first=st.lists(texts, min_size=1, max_size=12),
    changes=st.lists(st.lists(edits, min_size=1, max_size=6), min_size=1, max_size=3),
    blocks=st.sampled_from([0, 1]),
)
def test_features_of_an_edited_corpus_are_those_from_scratch_and_only_new_texts_are_computed(first, changes, blocks):
    corpus: Corpus = [(text, number % 4) for number, text in enumerate(first)]
    other: dict[str, Corpus] = {"validation": [((1, 2, 3), 0)], "test": [((3, 2, 1, 0), 1)]}
    with tempfile.TemporaryDirectory() as directory:
        seen: set[Text] = set()
        for change in [[], *changes]:
            for kind, number, text in change:
                corpus = edit(corpus, kind, number, text)
            splits = {"train": corpus, **other}
            found = build(Path(directory), splits, blocks=blocks)
            check_equal(found, build(Path(directory) / "none", splits, "host", blocks=blocks))
            assert found.num_tokens == count(texts_of(splits) - seen)
            seen |= texts_of(splits)
            assert found.progress[0].done == found.progress[0].total - found.num_tokens
            assert found.progress[-1].done == found.progress[-1].total == count(texts_of(splits))


@pytest.mark.parametrize("place", ["host", "device"])
def test_features_in_memory_take_what_is_on_disk(tmp_path, place):
    splits = {"train": random_corpus(30), "validation": random_corpus(9, 1), "test": random_corpus(9, 2)}
    build(tmp_path, {**splits, "train": splits["train"][:20]})
    found = build(tmp_path, splits, place)
    assert found.cache.choice.place == place
    assert found.num_tokens == count(texts_of({"train": splits["train"][20:]}))
    check_equal(found, build(tmp_path / "none", splits, place))
    assert len(list(tmp_path.glob("*/rows.bin"))) == 1, "it writes nothing there"


def test_choice_says_how_much_is_on_disk(tmp_path):
    splits = {"train": random_corpus(30), "validation": random_corpus(9, 1), "test": random_corpus(9, 2)}
    first = build(tmp_path, {**splits, "train": splits["train"][:28]})
    assert first.cache.choice.reason.endswith(", as requested")
    tokens, new = count(texts_of(splits)), count(texts_of({"train": splits["train"][28:]}))
    grown = build(tmp_path, splits)
    assert f", {100 * (tokens - new) // tokens}% cached by earlier runs, as requested" in grown.cache.choice.reason
    assert build(tmp_path, splits).cache.choice.reason.endswith(", cached by an earlier run")
    shrunk = build(tmp_path, {**splits, "train": splits["train"][5:15]})
    assert shrunk.cache.choice.reason.endswith(", cached by an earlier run")


def flip_bit(piece: Path, row: int) -> None:
    with (piece / ROWS).open("r+b") as file:
        file.seek(row * 24 * 4)
        byte = file.read(1)[0]
        file.seek(row * 24 * 4)
        file.write(bytes([byte ^ 1]))


def segment_texts(piece: Path, segment: int, splits: dict[str, Corpus]) -> set[Text]:
    """Return the texts of a piece's segment."""
    index = PieceIndex.read(piece)
    assert index is not None
    wanted = {each.tobytes() for each in index.hashes_I[index.texts_S[segment] : index.texts_S[segment + 1]]}
    found: set[Text] = set()
    for name, corpus in splits.items():
        table = TokenTable(split_of(name, corpus), pad_id=0, device=CPU)
        found |= {corpus[row][0] for row, each in enumerate(table.hashes_N) if each.tobytes() in wanted}
    return found


@pytest.mark.parametrize("fault", ["damaged", "unfinished"])
@pytest.mark.parametrize("has_all_texts", [True, False])
def test_a_segment_of_an_old_piece_is_computed_again(tmp_path, fault, has_all_texts):
    """In place if the run has all of its texts, otherwise in the new piece."""
    splits = {"train": random_corpus(30), "validation": random_corpus(9, 1), "test": random_corpus(9, 2)}
    build(tmp_path, splits)
    (piece,) = tmp_path.iterdir()
    index = PieceIndex.read(piece)
    assert index is not None
    segment = int(np.argmax(np.diff(index.texts_S)))
    lost = segment_texts(piece, segment, splits)
    assert len(lost) > 1
    if fault == "damaged":
        flip_bit(piece, int(index.bounds_S[segment]))
    else:
        mark_path(piece, segment).unlink()
    before = (piece / ROWS).read_bytes()
    changed = {"train": random_corpus(3, 3) + splits["train"], **{name: splits[name] for name in ("validation", "test")}}
    if not has_all_texts:
        removed = min(lost)
        changed = {name: [row for row in corpus if row[0] != removed] for name, corpus in changed.items()}
    found = build(tmp_path, changed)
    check_equal(found, build(tmp_path / "none", changed, "host"))
    new = texts_of(changed) - texts_of(splits)
    assert found.num_tokens == count(new | (lost & texts_of(changed)))
    assert ((piece / ROWS).read_bytes() == before) == (not has_all_texts or fault == "unfinished")
    assert len(list(tmp_path.glob("*/rows.bin"))) == 2
    again = build(tmp_path, changed)
    check_equal(again, found)
    assert again.num_tokens == 0


def test_a_truncated_old_piece_is_read_as_far_as_it_is_whole(tmp_path):
    splits = {"train": random_corpus(30), "validation": random_corpus(9, 1), "test": random_corpus(9, 2)}
    build(tmp_path, splits)
    (piece,) = tmp_path.iterdir()
    content = (piece / ROWS).read_bytes()
    (piece / ROWS).write_bytes(content[: len(content) // 2 + 5])
    fewer = {**splits, "train": splits["train"][1::2]}
    for place in ("host", "disk"):
        found = build(tmp_path, fewer, place)
        check_equal(found, build(tmp_path / "none", fewer, "host"))
        assert 0 < found.num_tokens < 0.8 * count(texts_of(fewer))


def test_pieces_are_copied_into_one_when_they_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "MAX_PIECES", 3)
    corpus = random_corpus(24)
    fixed = {"validation": random_corpus(3, 1), "test": random_corpus(3, 2)}
    for number, size in enumerate((12, 15, 18, 21, 24)):
        splits = {"train": corpus[:size], **fixed}
        before = texts_of({"train": corpus[: size - 3], **fixed}) if number else set()
        found = build(tmp_path, splits)
        assert found.num_tokens == count(texts_of(splits) - before), "copied, not computed again"
        check_equal(found, build(tmp_path / "none", splits, "host"))
        # The fourth run copies three pieces; the fifth reads what it wrote.
        num_parts = [len(source._parts) for source in found.cache._sources.values()]
        assert set(num_parts) == {[1, 2, 3, 1, 2][number]}


def test_a_piece_that_is_removed_meanwhile_is_not_read(tmp_path, monkeypatch):
    """Another process may evict a piece between the listing and the lock."""
    splits = {"train": random_corpus(12), "validation": random_corpus(3, 1), "test": random_corpus(3, 2)}
    build(tmp_path, splits)
    (piece,) = tmp_path.iterdir()
    lock = manager.FeatureFile.lock
    removed: list[Path] = []

    def remove_first(self: Any) -> None:
        if self.directory == piece and not removed:
            removed.append(piece)
            piece.rename(tmp_path / "elsewhere")
        lock(self)

    monkeypatch.setattr(manager.FeatureFile, "lock", remove_first)
    found = build(tmp_path, splits)
    assert removed == [piece]
    assert found.cache.choice.reason.endswith("kB, as requested"), "it counts as missing from the start"
    assert found.num_tokens == count(texts_of(splits))
    check_equal(found, build(tmp_path / "none", splits, "host"))


def test_equal_texts_share_rows(tmp_path):
    row = ((1, 2, 3), 0)
    splits: dict[str, Corpus] = {"train": [row] * 5, "validation": [row], "test": [((4,), 1), row]}
    found = build(tmp_path, splits)
    assert (found.num_tokens, found.cache.num_bytes) == (4, 4 * 24 * 4)
    assert all(torch.equal(rows, found.rows["test"][1]) for rows in found.rows["train"])
