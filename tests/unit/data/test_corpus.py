"""Corpus of every kind of source; every fault is an error that names its place and a fix."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from support.processes import python

from agnews_dist.data.corpus import Source, choose_rows, load_corpus
from agnews_dist.data.quality import find_faults
from agnews_dist.data.rows import Corpus
from agnews_dist.data.synthetic import CLASS_NAMES, generate
from agnews_dist.errors import DataError

Row = tuple[object, object]
ODD_ROWS = [
    ("NUL \0 inside", 0),
    ("emoji 😀 and accents é", 1),
    ('quotes "here", commas\nand a line break', 2),
    ("NA", 3),
    ("  spaces kept  \\ <|endoftext|>", 0),
    ("2004-01-02", 1),
    ("\u2028 other line \x85 ends \x1c", 2),
    ("007", 3),
]


LABEL_NAMES = ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def load(source: Path | str, *, limits=None, seed=0, fraction=0.25, hold_out=True) -> Corpus:
    return load_corpus(Source(str(source)), validation_fraction=fraction, limits=limits or {}, seed=seed, hold_out=hold_out)


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write rows as parquet, csv, jsonl, json or (`.original.csv`) AG News' csv, without the package."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    objects = [{"text": text, "label": label} for text, label in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
    elif path.name.endswith(".original.csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for text, label in rows:
                title, _, description = text.partition(" ")
                writer.writerow([label + 1, title, description])
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in objects), encoding="utf-8")
    else:
        path.write_text(json.dumps(objects, ensure_ascii=False), encoding="utf-8")
    return path


def rows_of(corpus: Corpus, split: str) -> list[Row]:
    return list(zip(corpus.splits[split].texts, corpus.splits[split].labels.tolist(), strict=True))


FORMATS = ["rows.parquet", "rows.csv", "rows.jsonl", "rows.json", "rows.original.csv"]


@pytest.mark.parametrize("name", FORMATS)
def test_load_corpus_reads_every_format_unchanged(tmp_path, name):
    rows = [row for row in [*ODD_ROWS, ("last row", 3)] if name != "rows.original.csv" or " " in row[0].lstrip() == row[0]]
    assert len(rows) >= 4
    corpus = load(write_rows(tmp_path / name, rows), hold_out=False)
    assert list(corpus.splits) == ["train"]
    assert rows_of(corpus, "train") == rows
    assert corpus.class_names == (CLASS_NAMES if name == "rows.original.csv" else LABEL_NAMES)
    assert corpus.splits["train"].labels.dtype == np.int64
    assert corpus.splits["train"].origin.name(3) == f"{name} row 4"


def test_fingerprint_depends_on_content_not_on_format_or_path(tmp_path):
    rows = [row for row in ODD_ROWS if " " in row[0]]
    formats = [name for name in FORMATS if name != "rows.original.csv"]  # has names for its classes
    prints = {load(write_rows(tmp_path / name / name, rows), hold_out=False).fingerprint for name in formats}
    assert len(prints) == 1
    changed = {
        "text": [("x " + rows[0][0], 0), *rows[1:]],
        "label": [(rows[0][0], 1), *rows[1:]],
        "order": rows[::-1],
        "fewer": rows[1:],
    }
    others = [load(write_rows(tmp_path / f"{what}.jsonl", changed[what]), hold_out=False).fingerprint for what in changed]
    directory = tmp_path / "test-only"
    write_rows(directory / "test.jsonl", rows)
    others.append(load(directory, hold_out=False).fingerprint)
    assert len({*others, *prints}) == 6


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json", "original.csv"])
@pytest.mark.parametrize("place", ["", "data"])
def test_load_corpus_reads_a_directory_in_the_hubs_layout(tmp_path, suffix, place):
    directory = tmp_path / "odd [name] *"
    (directory / place).mkdir(parents=True)
    (directory / "README.md").write_text("# card")
    for split in ("train", "validation", "test"):
        write_rows(directory / place / f"{split}-00000-of-00002.{suffix}", generate(12, 0, split)[:8])
        write_rows(directory / place / f"{split}-00001-of-00002.{suffix}", generate(12, 0, split)[8:])
    corpus = load(directory)
    assert list(corpus.splits) == ["train", "validation", "test"]
    for split in corpus.splits:
        assert rows_of(corpus, split) == generate(12, 0, split)
    name = str(Path(place) / f"validation-00001-of-00002.{suffix}")
    assert corpus.splits["validation"].origin.name(8) == f"{name} row 1"


def test_load_corpus_knows_other_names_of_splits_and_folders(tmp_path):
    write_rows(tmp_path / "train" / "0000.jsonl", ODD_ROWS)
    write_rows(tmp_path / "ag_news.dev.jsonl", [("a dev text", 1)])
    write_rows(tmp_path / "Test.jsonl", [("a test text", 2)])
    write_rows(tmp_path / "latest_trained.jsonl", [("no split", 2)])
    corpus = load(tmp_path)
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 8, "validation": 1, "test": 1}


def test_load_corpus_reads_the_original_csv_with_a_header(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(
        '\ufeffClass Index,Title,Description\r\n3,"Wall St.","Short-sellers, again"\r\n4,Mars,"rover\r\nlands"\r\n'
        "1,a,b\r\n2,c,d\r\n"
    )
    corpus = load(path, hold_out=False)
    assert rows_of(corpus, "train")[:2] == [("Wall St. Short-sellers, again", 2), ("Mars rover\r\nlands", 3)]
    assert corpus.class_names == CLASS_NAMES


def test_load_corpus_reads_class_labels(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good", "ugly"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    rows.to_parquet(str(tmp_path / "named.parquet"))
    named = load(tmp_path / "named.parquet", hold_out=False)
    assert named.class_names == ("bad", "good", "ugly")
    assert named.splits["train"].labels.tolist() == [2, 0]


def test_origin_counts_blank_lines_of_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n\n\n{"text": "b", "label": 1}\n')
    corpus = load(path, hold_out=False)
    assert [corpus.splits["train"].origin.name(i) for i in range(2)] == ["a.jsonl row 1", "a.jsonl row 4"]


def test_load_corpus_reads_ag_news(shared):
    corpus = load(shared / "data/ag_news")
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 12_423, "validation": 1_000}
    table = pq.read_table(shared / "data/ag_news/train-00000-of-00001.parquet")
    assert [finding.what for finding in find_faults(corpus)] == ["4 classes without names"]
    assert list(corpus.splits["train"].texts) == table["text"].to_pylist()
    assert corpus.splits["train"].labels.tolist() == table["label"].to_pylist()
    assert corpus.class_names == LABEL_NAMES


@pytest.mark.slow
def test_load_corpus_generates_synthetic_text():
    corpus = load("synthetic", limits={"train": 100})
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 100, "validation": 500, "test": 500}
    assert rows_of(corpus, "test") == generate(500, 0, "test")
    assert find_faults(corpus) == []
    assert load("synthetic", limits={"train": 100}, seed=1).fingerprint != corpus.fingerprint


# The held-out part and limits


def test_held_out_rows_are_stratified_seeded_and_disjoint(tmp_path):
    rows = [(f"text {i}", 0 if i < 100 else 1 + i % 3) for i in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    corpus = load(path, fraction=0.1)
    train, validation = rows_of(corpus, "train"), rows_of(corpus, "validation")
    assert len(validation) == 40
    assert [row for row in rows if row in set(train)] == train
    assert [row for row in rows if row in set(validation)] == validation
    assert set(train) | set(validation) == set(rows)
    assert not set(train) & set(validation)
    assert np.bincount(corpus.splits["validation"].labels).tolist() == [10, 10, 10, 10]
    origin = corpus.splits["validation"].origin
    assert [origin.name(i) for i in range(40)] == [f"rows.jsonl row {rows.index(row) + 1}" for row in validation]
    assert rows_of(load(path, fraction=0.1), "validation") == validation
    assert rows_of(load(path, fraction=0.1, seed=1), "validation") != validation


def test_limit_of_train_leaves_the_held_out_rows_as_they_are(tmp_path):
    path = write_rows(tmp_path / "train.csv", generate(40, 0, "train"))
    wanted = load(path).splits["validation"]
    limited = load(path, limits={"train": 12}).splits
    assert len(limited["train"]) == 12
    assert list(limited["validation"].texts) == list(wanted.texts)


def test_held_out_rows_have_unique_texts(tmp_path):
    rows = [(f"twin {i // 2}", 0) for i in range(40)] + [(f"single {i}", 1) for i in range(8)]
    corpus = load(write_rows(tmp_path / "rows.csv", rows), fraction=0.1)
    texts = list(corpus.splits["validation"].texts)
    assert len(texts) == 5
    assert all(text.startswith("single") for text in texts)
    assert not [finding for finding in find_faults(corpus) if "validation" in finding.what]
    with pytest.raises(DataError, match=r"no text of train .* occurs only once: .* Remove the duplicates"):
        load(write_rows(tmp_path / "twins.csv", [*rows[:40], ("both", 1), ("both", 1)]))


def test_hold_out_leaves_one_row_on_each_side(tmp_path):
    path = write_rows(tmp_path / "four.csv", [("a", 0), ("b", 1), ("c", 0), ("d", 1)])
    assert [len(split) for split in load(path, fraction=0.001).splits.values()] == [3, 1]
    assert [len(split) for split in load(path, fraction=0.999).splits.values()] == [2, 2]


def test_hold_out_leaves_every_class_a_row(tmp_path):
    rows = [(f"common {i}", 0) for i in range(10)] + [(f"rare {i}", i) for i in range(1, 9)] + [("second", 8)]
    corpus = load(write_rows(tmp_path / "r.csv", rows), fraction=0.9)
    assert set(corpus.splits["train"].labels.tolist()) == set(range(9))
    assert set(corpus.splits["validation"].labels.tolist()) == {0, 8}
    with pytest.raises(DataError, match=r"no class of train .* has two rows .* Add rows, or a validation file"):
        load(write_rows(tmp_path / "one.csv", [(f"text {i}", i) for i in range(9)]))


def test_hold_out_refuses_a_single_row(tmp_path):
    path = write_rows(tmp_path / "one" / "train.csv", [("a", 0)])
    write_rows(tmp_path / "one" / "test.csv", [("b", 1)])
    with pytest.raises(DataError, match=r"train has 1 row \(train.csv row 1\): .* Add rows"):
        load(path.parent)
    assert rows_of(load(path.parent, hold_out=False), "train") == [("a", 0)]


@pytest.mark.slow
def test_limits_are_stratified_seeded_and_ordered():
    limits = {"train": 41, "validation": 8, "test": None}
    corpus, full = load("synthetic", limits=limits), load("synthetic")
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 41, "validation": 8, "test": 500}
    counts = np.bincount(corpus.splits["train"].labels)
    assert sorted(counts) == [10, 10, 10, 11]
    assert np.bincount(corpus.splits["validation"].labels).tolist() == [2, 2, 2, 2]
    rows = rows_of(corpus, "train")
    assert [row for row in rows_of(full, "train") if row in set(rows)] == rows
    assert rows != rows_of(full, "train")[:41]
    assert rows == rows_of(load("synthetic", limits=limits), "train")


@pytest.mark.parametrize("num_rows", [1, 7, 50, 99, 100, 101])
def test_choose_keeps_the_class_proportions(num_rows):
    labels = np.array([0] * 50 + [1] * 30 + [2] * 19 + [3])
    chosen = choose_rows(labels, num_rows, seed=3, stream=0)
    assert len(chosen) == min(num_rows, 100)
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(labels[chosen], minlength=4)
    assert (np.abs(counts - np.bincount(labels) * len(chosen) / 100) < 1).all()


def test_choose_values_are_frozen():
    assert choose_rows(np.arange(20) % 2, 4, seed=5, stream=1).tolist() == [6, 7, 13, 16]


# Errors


def test_check_source_refuses_a_missing_path(tmp_path):
    for source in ("./nowhere", str(tmp_path / "none"), "~/no-such-directory", "news.csv", "a/b/c", "data.jsonl"):
        with pytest.raises(DataError, match=r"data.source '.*' does not exist: .* set --data.source to a hub id"):
            load(source)


@pytest.mark.parametrize(("text", "shown"), [(5, "5"), (None, "null"), (["a"], r"\['a'\]")])
def test_texts_that_are_not_strings_are_named(tmp_path, text, shown):
    with pytest.raises(DataError, match=rf"text is not a string in 1 row \(r.jsonl row 2: {shown}\): .* Fill in or remove"):
        load(write_rows(tmp_path / "r.jsonl", [("a", 0), (text, 1)]))


def test_wrong_rows_are_counted_and_five_are_listed(tmp_path):
    rows = [(f"a{i}" if i % 2 else " ", 0) for i in range(2_000)]
    with pytest.raises(DataError, match=r"in 1,000 rows \(r.jsonl row 1, .*, r.jsonl row 9 and 995 more\)"):
        load(write_rows(tmp_path / "r.jsonl", rows))


@pytest.mark.parametrize("name", ["r.csv", "r.parquet", "r.jsonl"])
def test_missing_column_is_named_with_those_found(tmp_path, name):
    path = tmp_path / name
    {
        "r.csv": lambda: path.write_text("texts,label\na,0\n"),
        "r.parquet": lambda: pq.write_table(pa.table({"texts": ["a"], "label": [0]}), path),
        "r.jsonl": lambda: path.write_text('{"texts": "a", "label": 0}\n'),
    }[name]()
    with pytest.raises(
        DataError, match=rf"{name} has no column that is usually the text \(found: 'texts', 'label'; usual: text"
    ):
        load(path)


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl", "e.json"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is empty: at least one row is needed. Check how it was written"):
        load(tmp_path / name)


def test_files_without_rows_are_refused(tmp_path):
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "list.json").write_text("[]")
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    for name in ("header.csv", "list.json", "e.parquet"):
        with pytest.raises(DataError, match=rf"{name}\)? has no rows: .* Check how"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["latin.csv", "latin.jsonl", "latin.json", "train.csv"])
def test_bytes_that_are_not_utf8_are_named_with_line(tmp_path, name):
    row = b'"%s",0' if name.endswith("csv") else b'{"text": "%s", "label": 0}'
    (tmp_path / name).write_bytes(b"text,label\n" * name.endswith("csv") + row % b"a" + b"\n" + row % b"caf\xe9" + b"\n")
    line = 2 + name.endswith("csv")
    with pytest.raises(DataError, match=rf"{name} line {line} has the byte 0xe9, .* Save the file as UTF-8"):
        load(tmp_path / name)


BROKEN_FILES = {
    "comma.csv": ("text,label\nhello, world,0\nhi, all,1\n", "line 2 has 3 fields.*in double quotes"),
    "some.csv": ("text,label\nhello,0\nhi, all,1\n", "line 3 has 3 fields, and the first line 2.*in double quotes"),
    "open.csv": ('text,label\n"hello,0\nhi,1\n', "line 2: the quote that begins field 1 is not closed.*in double quotes"),
    "twice.csv": ("text,label,label\na,0,1\n", "two columns of the same name.*Rename or remove one"),
    "cut.jsonl": ('{"text": "a", "label": 0}\n{"text": "b", "lab', "row 2 is not valid JSON.*Write one object"),
    "list.jsonl": ('["a", 0]\n', r"row 1 is .*, not an object.*Write it as"),
    "half.jsonl": ('{"text": "a \\ud83d", "label": 0}\n{"text": "b", "label": 1}', "row 1 holds .*surrogate.*Write"),
    "cut.parquet": ("PAR1 not the whole file", "cannot be read.*Copy or download"),
    "rows.txt": ("a\n", "unsupported suffix '.txt'.*Convert it to one of .csv, .tsv, .jsonl"),
    "rows.jsn": ("a\n", r"unsupported suffix '.jsn'.*Did you mean '.json'\?"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_refused(tmp_path, name):
    content, message = BROKEN_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"(?s){name}.*{message}"):
        load(tmp_path / name, hold_out=name != "half.jsonl")


def test_ambiguous_directories_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no data file of a split \(found: nothing\): .* Name files train"):
        load(empty)
    (empty / "en").mkdir()
    with pytest.raises(DataError, match=r"\(found: en\): .* Choose a folder with --data.subset"):
        load(empty)
    (empty / "en").rmdir()
    for name in ("news.csv", "old.csv"):
        write_rows(empty / name, ODD_ROWS)
    with pytest.raises(DataError, match=r"no data file of a split \(found: news.csv, old.csv\)"):
        load(empty)
    write_rows(tmp_path / "test.csv", ODD_ROWS)
    with pytest.raises(DataError, match=r"has no train split \(only test\): .* begins with train"):
        load(tmp_path)
    assert list(load(tmp_path, hold_out=False).splits) == ["test"]
    write_rows(tmp_path / "train.csv", ODD_ROWS)
    write_rows(tmp_path / "train.jsonl", ODD_ROWS)
    with pytest.raises(DataError, match=r"files of several formats \(train.csv, train.jsonl\): .* Leave only one format"):
        load(tmp_path)


def write_class_labels(path: Path, names: list[str], labels: list[int]) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    texts = [f"{path.stem} {i}" for i in range(len(labels))]
    Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(str(path))


@pytest.mark.parametrize("form", ["other order", "more classes", "text", "integers"])
def test_labels_of_other_splits_mean_the_names_of_a_class_label(tmp_path, form):
    write_class_labels(tmp_path / "train.parquet", ["z", "a"], [0, 1, 0, 1])
    if form == "other order":
        write_class_labels(tmp_path / "test.parquet", ["a", "z"], [0, 1])
    elif form == "more classes":
        write_class_labels(tmp_path / "test.parquet", ["b", "a", "z"], [1, 2])
    else:
        labels = ("a", "z") if form == "text" else (1, 0)
        (tmp_path / "test.csv").write_text("text,label\n" + "".join(f"test {label},{label}\n" for label in labels))
    corpus = load(tmp_path)
    assert corpus.class_names == ("z", "a") + ("b",) * (form == "more classes")
    assert [corpus.class_names[label] for label in corpus.splits["test"].labels] == ["a", "z"]


def test_splits_with_different_classes_are_refused(tmp_path):
    write_class_labels(tmp_path / "train.parquet", ["a", "b"], [0, 1])
    write_class_labels(tmp_path / "test.parquet", ["a", "c"], [0, 1])
    with pytest.raises(DataError, match=r"different classes \(train: a, b; test: a, c\): .* the same class names"):
        load(tmp_path)
    (tmp_path / "test.parquet").unlink()
    (tmp_path / "test.csv").write_text("text,label\nx,c\n")
    with pytest.raises(DataError, match=r"test.csv row 1: 'c'\): classes are a, b"):
        load(tmp_path)
    write_rows(tmp_path / "mixed" / "train-0.original.csv", [("a b", 0)])
    write_rows(tmp_path / "mixed" / "train-1.csv", [("c d", 0)])
    with pytest.raises(DataError, match=r"train-1.csv and train-0.original.csv name or number .* Write both"):
        load(tmp_path / "mixed")


def test_import_of_corpus_loads_no_heavy_library():
    code = "import sys, agnews_dist.data.corpus; print({'torch', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules))"
    assert python("-c", code).stdout.strip() == "set()"


@pytest.mark.slow
def test_two_processes_load_the_same_corpus(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [(f"{text}", label) for text, label in generate(2_000, 0, "train")])
    code = (
        "import sys; from agnews_dist.data.corpus import Source, load_corpus\n"
        "c = load_corpus(Source(sys.argv[1]), validation_fraction=0.1, limits={}, seed=0)\n"
        "print(c.fingerprint)"
    )
    assert python("-c", code, str(path)).stdout.strip() == load(path, fraction=0.1).fingerprint
