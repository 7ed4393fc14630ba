"""Rows given in Python: every kind gives the corpus of a file with the same rows; bad ones are named by position and label."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from agnews_dist.data import texts
from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.corpus import IN_MEMORY, Source, check_source, load_corpus
from agnews_dist.data.given_rows import open_texts, read_given
from agnews_dist.data.rows import Corpus, RawRows
from agnews_dist.errors import DataError

TEXTS = [f"text number {i} of the rows" for i in range(12)]
NAMES = ["sport", "business", "sport", "world"] * 3
NUMBERS = [2, 0, 2, 1] * 3


def read(**given: object) -> dict[str, RawRows]:
    return read_given(given, ColumnSettings())


def corpus_of(**given: object) -> Corpus:
    source = Source(IN_MEMORY, read_given=lambda: read(**given))
    return load_corpus(source, validation_fraction=0.25, limits={}, seed=3)


def corpus_of_file(path: Path, labels: list) -> Corpus:
    pd.DataFrame({"text": TEXTS, "label": labels}).to_csv(path, index=False)
    return load_corpus(Source(str(path)), validation_fraction=0.25, limits={}, seed=3)


def frame(labels: list, index: object = None) -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS, "label": labels}, index=index)


def of_dataset(labels: list) -> datasets.Dataset:
    """Rows that are in another order underneath, in a format of the caller's."""
    dataset = datasets.Dataset.from_dict({"text": TEXTS[::-1], "label": labels[::-1]})
    return dataset.select(range(len(TEXTS) - 1, -1, -1)).with_format("numpy")


KINDS = {
    "frame": frame,
    "frame with repeated labels": lambda labels: frame(labels, ["a", "b"] * 6),
    "frame with reversed labels": lambda labels: frame(labels, range(11, -1, -1)),
    "categorical": lambda labels: frame(pd.Categorical(labels, categories=[*dict.fromkeys(labels), labels[0] * 2])),
    "other columns": lambda labels: frame(labels).assign(id=[object()] * 12, n=1.5)[["n", "label", "id", "text"]],
    "data set": of_dataset,
    "arrow": lambda labels: pa.table({"text": pa.chunked_array([TEXTS[:5], TEXTS[5:]]), "label": labels}),
    "lists": lambda labels: (TEXTS, labels),
    "arrays": lambda labels: (np.array(TEXTS), np.array(labels)),
    "series": lambda labels: (pd.Series(TEXTS, index=range(11, -1, -1)), pd.Series(labels)),
    "data set's columns": lambda labels: (of_dataset(labels)["text"], of_dataset(labels)["label"]),
    "pairs": lambda labels: list(zip(TEXTS, labels, strict=True)),
    "mappings": lambda labels: [{"label": label, "text": text} for text, label in zip(TEXTS, labels, strict=True)],
}


@pytest.mark.parametrize("labels", [NAMES, NUMBERS], ids=["names", "numbers"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_rows_gives_the_corpus_of_a_file(tmp_path, kind, labels):
    given, expected = corpus_of(train=kind(labels)), corpus_of_file(tmp_path / "rows.csv", labels)
    assert given.fingerprint == expected.fingerprint
    assert given.class_names == expected.class_names


def test_class_labels_keep_names_and_order():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "c", "a"])})
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "label": NUMBERS}, features=features)
    for rows in (dataset, dataset.data.table):
        assert corpus_of(train=rows).class_names == ("b", "c", "a")


def test_splits_come_from_a_dataset_dict_and_from_parameters(tmp_path):
    parts = {"train": of_dataset(NAMES), "dev": of_dataset(NAMES[:4] * 3), "testing": of_dataset(NAMES)}
    together = corpus_of(train=datasets.DatasetDict(parts))
    assert list(together.splits) == ["train", "validation", "test"]
    frame(NAMES[:4] * 3).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    apart = corpus_of(train=frame(NAMES), validation=str(tmp_path / "rows.jsonl"), test=(TEXTS, NAMES))
    assert apart.fingerprint == together.fingerprint


def test_test_rows_need_no_labels():
    assert (corpus_of(train=frame(NAMES), test=pd.DataFrame({"text": TEXTS[:3]})).splits["test"].labels == -1).all()


def test_columns_are_those_of_the_settings():
    rows = pd.DataFrame({"kind": NAMES, "head": TEXTS, "body": [None, *TEXTS[1:]], 7: NUMBERS})
    settings = ColumnSettings(text=("head", "body"), label="7", separator=": ")
    found = read_given({"train": rows}, settings)["train"]
    assert list(found.texts)[:2] == [TEXTS[0], f"{TEXTS[1]}: {TEXTS[1]}"]
    assert found.values == (2, 0, 1)


MISSING = [None, float("nan"), pd.NA, pd.NaT]
BAD: Mapping[str, tuple[object, str]] = {
    "no label column": (pd.DataFrame({"text": TEXTS}), "train has no column that is usually the label (found: none, next to"),
    "a missing number": (frame([0, 1, None, 0] * 3), "label is missing in 3 rows of train (train row 2, train row 6,"),
    "missing names": (frame([*NAMES[:8], *MISSING]), "missing in 4 rows of train (train row 8, train row 9, train row 10"),
    "decimals": (frame([0.5, 1.0] * 6), "label 0.5 in train row 0 is a decimal number"),
    "a label of the index": (frame([*NAMES[:11], None], list("abcdefghijaa")), "(train row 11 (index 'a')): every row"),
    "an index of times": (frame([None] * 12, pd.date_range("2026-01-01", periods=12)), "row 0 (index Timestamp('2026-01-01"),
    "a blank text": ([("", 0), ("b", 1)], "text is empty or only white space in 1 row (train row 0)"),
    "a missing text": (([*TEXTS[:11], None], NAMES), "text is not a string in 1 row (train row 11: null)"),
    "a number as text": (([*TEXTS[:1], 5], [0, 1]), "text is not a string in 1 row (train row 1: 5)"),
    "a text in bytes": (([b"a", b"b"], [0, 1]), "text is not a string in 2 rows (train row 0: b'a'"),
    "a list as label": (([*"ab"], [[1], [2]]), "label [1] in train row 0 is a list"),
    "no rows": ([], "split 'train' (train) has no rows"),
    "no rows in a frame": (frame(NAMES)[:0], "split 'train' (train) has no rows"),
    "two columns of one name": (pd.concat([frame(NAMES), frame(NAMES)], axis=1), "train has two columns of the same name"),
    "lists of two lengths": ((TEXTS, NAMES[:4]), "train has 12 texts and 4 labels"),
    "texts alone": (TEXTS, "train row 0 is 'text number 0 of the rows': a row of a list is a pair"),
    "a pair of one text": (("text", "label"), "train is a tuple: it must be (texts, labels)"),
    "a mapping of columns": ({"text": TEXTS, "label": NAMES}, "train is a dict: no rows can be read from it. Give a pandas"),
    "an iterator": (iter([]), "train is a list_iterator: no rows can be read"),
    "a stream": (of_dataset(NAMES).to_iterable_dataset(), "train is an IterableDataset: no rows can be read"),
    "no such path": (Path("nowhere.csv"), "train 'nowhere.csv': no such path"),
}


@pytest.mark.parametrize(("rows", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_with_their_position(rows, message):
    with pytest.raises(DataError) as caught:
        corpus_of(train=rows)
    assert message in str(caught.value)


def test_splits_given_twice_are_refused():
    splits = datasets.DatasetDict({"train": of_dataset(NAMES), "test": of_dataset(NAMES)})
    with pytest.raises(DataError, match="the split 'test' is there twice"):
        read(train=splits, test=frame(NAMES))
    with pytest.raises(DataError, match="test is a DatasetDict: it holds several splits"):
        read(train=frame(NAMES), test=splits)


def test_rows_in_memory_are_not_found_by_a_later_command():
    with pytest.raises(DataError, match="in_memory: the rows were given in Python and were not kept"):
        check_source(IN_MEMORY)


@pytest.mark.parametrize("most", [texts.MEMORY_BYTES, 10], ids=["in memory", "in a file"])
def test_read_rows_are_the_same_in_another_process(monkeypatch, most):
    monkeypatch.setattr(texts, "MEMORY_BYTES", most)
    rows = read(train=frame(NAMES, list("abcdefghijkl")))["train"]
    again = pickle.loads(pickle.dumps(rows))
    assert list(again.texts) == TEXTS
    assert again.code_N.tolist() == rows.code_N.tolist()
    assert again.origin.name(3) == rows.origin.name(3) == "train row 3 (index 'd')"


def test_texts_to_classify_are_a_sequence_of_strings():
    for found in (TEXTS, tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS), pa.array(TEXTS)):
        assert [text for chunk in open_texts(found).chunks(("text",)) for text in chunk.columns["text"]] == TEXTS
    for wrong, message in (("one", "texts is one string"), (5, "texts is an int"), ({"a"}, "texts is a set")):
        with pytest.raises(DataError, match=message):
            open_texts(wrong)
