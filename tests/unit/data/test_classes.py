"""The classes of any labels: read rightly, or refused with the row and the way out."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.corpus import Source, load_corpus
from agnews_dist.data.rows import Corpus
from agnews_dist.data.synthetic import CLASS_NAMES
from agnews_dist.errors import DataError


def write(path: Path, labels: list[object], **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"text {i} of {path.stem}", "label": label, **more} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(source: Path, *, names=None, model=None, hold_out=False, **columns) -> Corpus:
    return load_corpus(
        Source(str(source), class_names=names, columns=ColumnSettings(**columns)),
        validation_fraction=0.25,
        limits={},
        seed=0,
        hold_out=hold_out,
        model_classes=model,
    )


def labels_of(corpus: Corpus, split: str = "train") -> list[int]:
    return corpus.splits[split].labels.tolist()


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["spam", "ham", "spam"], ("ham", "spam"), [1, 0, 1]),
        ([" ham ", "ham", "spam"], ("ham", "spam"), [0, 0, 1]),
        ([0, 1, 1], ("LABEL_0", "LABEL_1"), [0, 1, 1]),
        ([1, 2, 3], ("LABEL_1", "LABEL_2", "LABEL_3"), [0, 1, 2]),
        ([5, 0, 10], ("LABEL_0", "LABEL_5", "LABEL_10"), [1, 0, 2]),
        ([-1, 0, 1], ("LABEL_-1", "LABEL_0", "LABEL_1"), [0, 1, 2]),
        (["10", "9", "10"], ("LABEL_9", "LABEL_10"), [1, 0, 1]),
        (["007", "07", "007"], ("007", "07"), [0, 1, 0]),
        ([2**64, 10**30, 2**64], (f"LABEL_{2**64}", f"LABEL_{10**30}"), [0, 1, 0]),
        ([True, False], ("False", "True"), [1, 0]),
        (["日本", "España"], ("España", "日本"), [1, 0]),
    ],
)
def test_classes_come_from_the_labels(tmp_path, labels, names, indices):
    corpus = load(write(tmp_path / "a.jsonl", labels))
    assert corpus.class_names == names
    assert labels_of(corpus) == indices


def test_classes_are_those_of_all_splits(tmp_path):
    write(tmp_path / "train.jsonl", ["b", "c", "b", "c"])
    write(tmp_path / "test.jsonl", ["a", "c"])
    corpus = load(tmp_path)
    assert corpus.class_names == ("a", "b", "c")
    assert labels_of(corpus, "test") == [0, 2]


def test_names_of_ag_news_are_never_guessed(tmp_path):
    assert load(write(tmp_path / "four.jsonl", [0, 1, 2, 3])).class_names == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    original = tmp_path / "train.csv"
    original.write_text('"1","a","b"\n"2","c","d"\n"3","e","f"\n"4","g","h"\n')
    assert load(original).class_names == CLASS_NAMES
    original.write_text('"1","a","b"\n"2","c","d"\n')  # another data set of this form
    assert load(original).class_names == ("LABEL_1", "LABEL_2")
    asked = load(write(tmp_path / "asked.jsonl", [0, "World", 3]), names=CLASS_NAMES)
    assert asked.class_names == CLASS_NAMES
    assert labels_of(asked) == [0, 0, 3]


def test_class_labels_keep_their_order(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ugly", "bad"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert load(tmp_path / "a.parquet").class_names == ("ugly", "bad")
    other = load(tmp_path / "a.parquet", names=["bad", "good", "ugly"])
    assert labels_of(other) == [0, 2]
    with pytest.raises(DataError, match=r"label is not a class in 1 row \(a.parquet row 1: 'bad'\).*--data.class_names"):
        load(tmp_path / "a.parquet", names=["good", "ugly"])


def test_booleans_have_names_in_either_case(tmp_path):
    path = write(tmp_path / "a.jsonl", [False, True, True])
    assert labels_of(load(path, names=["true", "false"])) == labels_of(load(path, names=["True", "False"])) == [1, 0, 0]
    with pytest.raises(DataError, match=r"label is not a class in 3 rows \(a.jsonl row 1: False"):
        load(path, names=["no", "yes"])


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", " "], ["a", "b\0"]])
def test_class_labels_without_names_of_their_own_are_refused(tmp_path, names):
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    table = pa.table({"text": ["x", "y"], "label": [0, 1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has the class name .* needs a readable name of its own"):
        load(tmp_path / "a.parquet")


def test_other_types_of_columns_are_read(tmp_path):
    columns = {"text": pa.array(["a", "b", "c"], pa.large_string()), "label": pa.array(["x", "y", "x"]).dictionary_encode()}
    pq.write_table(pa.table({**columns, "odd": pa.array([None] * 3, pa.duration("s"))}), tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet")
    assert (corpus.class_names, labels_of(corpus)) == (("x", "y"), [0, 1, 0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1.5], r"label 1.5 in a.jsonl row 2 is a decimal number .* --data.label_column"),
        ([["a"], ["b"]], r"label \['a'\] in a.jsonl row 1 is a list: .* --data.label_column"),
        ([{"a": 1}, "b"], r"label \{'a': 1\} in a.jsonl row 1 is a dict"),
        (["1.0", "0.0"], r"label '0.0' in a.jsonl row 2 is a decimal number"),
        (["a", None, "", "b"], r"label is missing in 2 rows of train \(a.jsonl row 2, a.jsonl row 3\)"),
        (["a", "\\N", "b"], r"label is missing in 1 row of train \(a.jsonl row 2\)"),
        ([None, None], r"label is missing in 2 rows of train .* --data.splits.train none"),
        ([-1, -1], "label is missing in 2 rows of train"),
        (["a", "a"], "has one class only, 'a': .* Set --data.label_column"),
        (["0", "spam"], r"labels are of different kinds \(a.jsonl row 1: '0', a.jsonl row 2: 'spam'\): .* --data.class_names"),
        ([True, 1], "labels are of different kinds"),
        (["a\0b", "c"], r"label 'a\\x00b' in a.jsonl row 1 has the character '\\x00': a class needs a readable name"),
        (["a\nb", "c"], "has the character"),
        (["\ud800", "c"], r"a.jsonl row 1 has the character '\\ud800'"),
    ],
)
def test_labels_that_name_no_classes_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", labels))


def test_more_classes_than_possible_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"id-{i}" for i in range(10_001)])
    with pytest.raises(
        DataError, match=r"a.jsonl row 10001 has the 10,001th different label, 'id-10000': .* --data.label_column"
    ):
        load(path)


def test_labels_count_from_1(tmp_path):
    path = write(tmp_path / "a.jsonl", [1, 2, 3])
    unnamed, from_1 = load(path).findings
    assert (unnamed.what, from_1.what) == ("3 classes without names", "labels seem to count from 1 to 3")
    # Names in data.class_names count from 0, so they are no way out here.
    assert "--data.class_names" not in str(unnamed)
    with pytest.raises(
        DataError,
        match=r"in 1 row \(a.jsonl row 3: 3\): classes are x, y, z, or 0 to 2; they seem to count from 1. Number them",
    ):
        load(path, names=["x", "y", "z"])


def test_names_that_differ_in_case_are_reported(tmp_path):
    (finding,) = load(write(tmp_path / "a.jsonl", ["Spam", "spam", "ham"])).findings
    assert "1 pair of classes with names that differ only in case" in str(finding)
    assert "'Spam' and 'spam'" in str(finding)


# A test split without labels


@pytest.mark.parametrize("labels", [[None, None], [-1, -1], ["-1", "-1"], ["", ""]])
def test_a_test_split_may_have_no_labels(tmp_path, labels):
    write(tmp_path / "train.jsonl", ["a", "b", "a", "b"])
    write(tmp_path / "test.jsonl", labels)
    corpus = load(tmp_path)
    assert labels_of(corpus, "test") == [-1, -1]
    assert corpus.class_names == ("a", "b")
    assert "predicted, not scored" in corpus.facts["test"]


def test_a_test_split_may_have_no_label_column(tmp_path):
    write(tmp_path / "train.jsonl", ["a", "b", "a", "b"])
    (tmp_path / "test.jsonl").write_text('{"text": "x"}\n')
    assert labels_of(load(tmp_path), "test") == [-1]
    (tmp_path / "validation.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"validation.jsonl has no column that is usually the label"):
        load(tmp_path)


def test_a_test_split_with_some_labels_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", ["a", "b", "a", "b"])
    write(tmp_path / "test.jsonl", ["a", None])
    with pytest.raises(DataError, match=r"label is missing in 1 row of test \(test.jsonl row 2\)"):
        load(tmp_path)


# data.class_names


def test_class_names_fix_names_and_order(tmp_path):
    path = write(tmp_path / "a.jsonl", ["ham", "spam", 1])
    names = tmp_path / "names.txt"
    names.write_text("spam\nham\nnever seen\n")
    for given in (["spam", "ham", "never seen"], [str(names)]):
        corpus = load(path, names=given)
        assert corpus.class_names == ("spam", "ham", "never seen")
        assert labels_of(corpus) == [1, 0, 1]
    for content in (b"spam\r\n ham\r\n\r\n", b"spam\rham", "\ufeffspam\nham".encode(), "spam\nham\n".encode("utf-16")):
        names.write_bytes(content)
        assert load(path, names=[str(names)]).class_names == ("spam", "ham")
    (tmp_path / "names.json").write_text("[spam]")
    with pytest.raises(DataError, match=r"names.json' is not valid JSON"):
        load(path, names=[str(tmp_path / "names.json")])
    (tmp_path / "names.json").write_text('["spam", "ham"]')
    assert load(path, names=[str(tmp_path / "names.json")]).class_names == ("spam", "ham")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na\n", r"names.txt': 'a' is there twice, as name 1 and 3: names must be unique"),
        ("a\n\nb\n", "name 2 is '': a class needs a readable name"),
        ("a\tb\nc\n", r"name 1 is 'a\\tb'"),
        ("", "it has 0 names, and 2 to 10,000 are possible"),
        ("a\n", "it has 1 names"),
        (b"a\ncaf\xe9\n", r"data.class_names '.*names.txt' line 2 has the byte 0xe9, which is not valid UTF-8"),
    ],
)
def test_wrong_files_of_class_names_are_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", ["a", "b"]), names=[str(path)])
    with pytest.raises(DataError, match=r"data.class_names 'nowhere.txt': .* no such file exists"):
        load(tmp_path / "a.jsonl", names=["nowhere.txt"])


def test_a_label_outside_of_the_names_shows_the_way_out(tmp_path):
    with pytest.raises(
        DataError, match=r"a.jsonl row 2: 'Sport'\): .*Did you mean 'Sports'\?.*--data.class_names or --data.label_column"
    ):
        load(write(tmp_path / "a.jsonl", ["World", "Sport"]), names=CLASS_NAMES)


# Labels for a saved model


def test_labels_mean_the_classes_of_a_saved_model(tmp_path):
    path = write(tmp_path / "a.jsonl", ["spam", "ham"])
    assert labels_of(load(path, model=("spam", "eggs", "ham"))) == [0, 2]
    numbered = load(write(tmp_path / "b.jsonl", [0, 2]), model=("spam", "eggs", "ham"))
    assert (labels_of(numbered), numbered.findings) == ([0, 2], ())
    (finding,) = load(write(tmp_path / "b.jsonl", [1, 2]), model=("spam", "eggs", "ham")).findings
    assert str(finding).startswith("labels are numbers from 1 to 2, without 0: they count from 0, so 1 is 'eggs'.")
    assert load(tmp_path / "b.jsonl", names=["2", "1"]).findings == ()
    assert labels_of(load(write(tmp_path / "c.jsonl", [2, 3]), model=("LABEL_1", "LABEL_2", "LABEL_3"))) == [1, 2]
    with pytest.raises(DataError, match=r"classes are spam, eggs"):
        load(path, model=("spam", "eggs"))
    with pytest.raises(DataError, match=r"label is not a class"):
        load(tmp_path / "c.jsonl", model=("LABEL_0", "LABEL_1", "LABEL_2"))


def test_rows_to_score_may_be_without_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", [None, None])
    corpus = load(path, model=("spam", "ham"))
    assert labels_of(corpus) == [-1, -1]
    assert corpus.facts["train"] == "without labels: it is predicted, not scored"
    with pytest.raises(DataError, match=r"has no column 'labels' .*data.label_column names it"):
        load(path, model=("spam", "ham"), label="labels")
    with pytest.raises(DataError, match=r"label is missing in 2 rows of train"):
        load(path, names=["spam", "ham"], hold_out=True)


def test_a_model_without_names_takes_those_of_the_data(tmp_path):
    path = write(tmp_path / "a.jsonl", ["spam", "ham"])
    corpus = load(path, model=("LABEL_0", "LABEL_1"))
    assert (corpus.class_names, labels_of(corpus)) == (("ham", "spam"), [1, 0])
    assert corpus.facts["classes"].startswith("2: ham, spam; the model names none, and its LABEL_0 is taken for the first")
    with pytest.raises(DataError, match=r"has 2 classes \(ham, spam\), the model 3 without names"):
        load(path, model=("LABEL_0", "LABEL_1", "LABEL_2"))
    (tmp_path / "unlabelled.jsonl").write_text('{"text": "a"}\n')
    assert load(tmp_path / "unlabelled.jsonl", model=("LABEL_0", "LABEL_1")).class_names == ("LABEL_0", "LABEL_1")


def test_ten_thousand_classes_with_two_rows_each(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"topic {i % 10_000:05}" for i in range(20_000)])
    corpus = load(path, hold_out=True)
    assert len(corpus.class_names) == 10_000
    train = corpus.splits["train"].labels
    assert (np.bincount(train, minlength=10_000) >= 1).all()
    assert len(train) + len(corpus.splits["validation"]) == 20_000
