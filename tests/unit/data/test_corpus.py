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

from agnews_dist.data.corpus import choose_rows, load_corpus
from agnews_dist.data.hub import read_hub
from agnews_dist.data.rows import Corpus, check_corpus
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


def load(source: Path | str, *, limits=None, seed=0, fraction=0.25, hold_out=True) -> Corpus:
    return load_corpus(
        str(source), revision=None, validation_fraction=fraction, limits=limits or {}, seed=seed, hold_out=hold_out
    )


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
    rows = [row for row in ODD_ROWS if name != "rows.original.csv" or " " in row[0]]
    assert len(rows) >= 5
    corpus = load(write_rows(tmp_path / name, rows), hold_out=False)
    assert list(corpus.splits) == ["train"]
    assert rows_of(corpus, "train") == rows
    assert corpus.class_names == CLASS_NAMES
    assert corpus.splits["train"].labels.dtype == np.int64
    assert corpus.splits["train"].origin.name(4) == f"{name} row 5"


def test_fingerprint_depends_on_content_not_on_format_or_path(tmp_path):
    rows = [row for row in ODD_ROWS if " " in row[0]]
    prints = {load(write_rows(tmp_path / name / name, rows), hold_out=False).fingerprint for name in FORMATS}
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
    path.write_text('\ufeffClass Index,Title,Description\r\n3,"Wall St.","Short-sellers, again"\r\n4,Mars,"rover\r\nlands"\r\n')
    corpus = load(path, hold_out=False)
    assert rows_of(corpus, "train") == [("Wall St. Short-sellers, again", 2), ("Mars rover\r\nlands", 3)]


def test_load_corpus_reads_labels_as_digits_and_names(tmp_path):
    names = load(
        write_rows(tmp_path / "names.csv", [("a", "Sci/Tech"), ("b", "2"), ("c", "World"), ("d", "+1")]), hold_out=False
    )
    assert names.splits["train"].labels.tolist() == [3, 2, 0, 1]
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
    assert list(corpus.splits["train"].texts) == table["text"].to_pylist()
    assert corpus.splits["train"].labels.tolist() == table["label"].to_pylist()
    assert corpus.class_names == ("World", "Sports", "Business", "Sci/Tech")


@pytest.mark.slow
def test_load_corpus_generates_synthetic_text():
    corpus = load("synthetic", limits={"train": 100})
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 100, "validation": 500, "test": 500}
    assert rows_of(corpus, "test") == generate(500, 0, "test")
    assert check_corpus(corpus) == []
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


def test_held_out_rows_have_unique_texts(tmp_path):
    rows = [(f"twin {i // 2}", 0) for i in range(40)] + [(f"single {i}", 1) for i in range(8)]
    corpus = load(write_rows(tmp_path / "rows.csv", rows), fraction=0.1)
    texts = list(corpus.splits["validation"].texts)
    assert len(texts) == 5
    assert all(text.startswith("single") for text in texts)
    assert check_corpus(corpus) == []
    with pytest.raises(DataError, match=r"no text of train .* occurs only once: .* Remove the duplicates"):
        load(write_rows(tmp_path / "twins.csv", rows[:40]))


def test_hold_out_leaves_one_row_on_each_side(tmp_path):
    path = write_rows(tmp_path / "two.csv", [("a", 0), ("b", 1)])
    for fraction in (0.001, 0.999):
        assert [len(split) for split in load(path, fraction=fraction).splits.values()] == [1, 1]


def test_hold_out_refuses_a_single_row(tmp_path):
    path = write_rows(tmp_path / "one.csv", [("a", 0)])
    with pytest.raises(DataError, match=r"train has 1 row \(one.csv row 1\): .* Add rows"):
        load(path)
    assert rows_of(load(path, hold_out=False), "train") == [("a", 0)]


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


def test_read_hub_offline_fails_with_fixes():
    with pytest.raises(DataError, match=r"'fancyzhx/ag_news' cannot be loaded from the hub: ConnectionError.*OfflineMode") as e:
        load("fancyzhx/ag_news")
    assert "set --data.source to a local directory or file" in str(e.value)
    assert "python -m agnews_dist prepare" in str(e.value)
    assert "HF_HOME" in str(e.value)


def test_read_hub_converts_a_dataset_dict(tmp_path, monkeypatch):
    # The call and the DatasetDict are those of a hub id, without a network.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for split, rows in (("train", ODD_ROWS[:2]), ("dev", ODD_ROWS[2:3]), ("test", ODD_ROWS[4:6])):
        columns = {"text": [text for text, _ in rows], "label": [label % 2 for _, label in rows]}
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    splits = read_hub(str(tmp_path / "set"), None)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"].texts == [text for text, _ in ODD_ROWS[4:6]]
    assert splits["test"].labels == [0, 1]
    assert splits["train"].class_names == ("bad", "good")
    assert splits["train"].origin.name(1) == f"{tmp_path / 'set'} split train row 2"
    (tmp_path / "odd").mkdir()
    pq.write_table(pa.table({"texts": ["a"], "label": [0]}), tmp_path / "odd" / "train.parquet")
    with pytest.raises(DataError, match=r"odd split train has no column 'text' \(found: 'texts', 'label'\): .* Rename"):
        read_hub(str(tmp_path / "odd"), None)


WRONG_LABELS = [(4, "4"), (-1, "-1"), ("Sport", "'Sport'"), (None, "null"), (1.5, "1.5"), ("", "null"), ("1.0", "'1.0'")]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize(("label", "shown"), WRONG_LABELS)
def test_wrong_labels_are_named_with_file_and_row(tmp_path, name, label, shown):
    rows = [("a", 0), ("b", 1), ("c", label), ("d", 3)]
    if name == "rows.parquet" and isinstance(label, str):
        rows = [(text, str(value)) for text, value in rows]
    if name == "rows.parquet" and label == 1.5:
        rows, shown = [("c", 0.5), ("b", 1.5), ("c", 1.5)], r"0.5, rows.parquet row 2: 1.5, rows.parquet row 3: 1.5"
    elif name == "rows.csv" and isinstance(label, int | float):
        shown = f"'{label}'"
    with pytest.raises(DataError, match=rf"label is not a class in \d rows? \(rows.\w+ row \d: {shown}\): .* 0 to 3") as error:
        load(write_rows(tmp_path / name, rows))
    assert "Correct these rows" in str(error.value)
    assert ("Did you mean 'Sports'?" in str(error.value)) == (label == "Sport")


def test_labels_are_not_bools_and_start_at_1_in_the_original_csv(tmp_path):
    with pytest.raises(DataError, match=r"label is not a class in 1 row \(rows.jsonl row 2: True\)"):
        load(write_rows(tmp_path / "rows.jsonl", [("a", 1), ("b", True)]))
    path = tmp_path / "train.csv"
    path.write_text('"1","a","b"\n"0","c","d"\n"5","e","f"\n')
    with pytest.raises(DataError, match=r"2 rows \(train.csv row 2: '0', train.csv row 3: '5'\): classes are 1 to 4"):
        load(path)


def test_wrong_rows_are_counted_and_five_are_listed(tmp_path):
    rows = [(f"a{i}", 9 if i % 2 else 0) for i in range(2_000)]
    with pytest.raises(DataError, match=r"in 1,000 rows \(r.jsonl row 2: 9, .*, r.jsonl row 10: 9 and 995 more\)"):
        load(write_rows(tmp_path / "r.jsonl", rows))


@pytest.mark.parametrize(("text", "shown"), [(5, "5"), (None, "null"), (["a"], r"\['a'\]")])
def test_texts_that_are_not_strings_are_named(tmp_path, text, shown):
    with pytest.raises(DataError, match=rf"text is not a string in 1 row \(r.jsonl row 2: {shown}\): .* Fill in or remove"):
        load(write_rows(tmp_path / "r.jsonl", [("a", 0), (text, 1)]))


@pytest.mark.parametrize("name", ["r.csv", "r.parquet", "r.jsonl"])
def test_missing_column_is_named_with_those_found(tmp_path, name):
    path = tmp_path / name
    {
        "r.csv": lambda: path.write_text("texts,label\na,0\n"),
        "r.parquet": lambda: pq.write_table(pa.table({"texts": ["a"], "label": [0]}), path),
        "r.jsonl": lambda: path.write_text('{"texts": "a", "label": 0}\n'),
    }[name]()
    with pytest.raises(DataError, match=r"has no column 'text' \(found: 'texts', 'label'\): .*Did you mean 'texts'\? Rename"):
        load(path)


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl", "e.json"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is empty: at least one row is needed. Check how it was written"):
        load(tmp_path / name)


def test_files_without_rows_are_refused(tmp_path):
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "list.json").write_text("[]")
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    for name in ("header.csv", "list.json", "e.parquet"):
        with pytest.raises(DataError, match=rf"split 'train' \({name}\) has no rows: .* Check how the file was written"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["latin.csv", "latin.jsonl", "latin.json", "train.csv"])
def test_bytes_that_are_not_utf8_are_named_with_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'text,label\n"a",0\n"caf\xe9",1\n')
    with pytest.raises(DataError, match=rf"{name} line 3 has the byte 0xe9, .* Save the file as UTF-8"):
        load(tmp_path / name)


BROKEN_FILES = {
    "comma.csv": ("text,label\nhello, world,0\nhi, all,1\n", "in double quotes"),
    "some.csv": ("text,label\nhello,0\nhi, all,1\n", "Expected 2 fields in line 3, saw 3.*in double quotes"),
    "open.csv": ('text,label\n"hello,0\nhi,1\n', "EOF inside string.*in double quotes"),
    "twice.csv": ("text,label,label\na,0,1\n", "two columns of the same name.*Rename or remove one"),
    "cut.jsonl": ('{"text": "a", "label": 0}\n{"text": "b", "lab', "row 2 is not valid JSON.*Write one object"),
    "list.jsonl": ('["a", 0]\n', r"row 1 is .*, not an object.*Write it as"),
    "half.jsonl": ('{"text": "a \\ud83d", "label": 0}\n{"text": "b", "label": 0}', "row 1 holds .*surrogate.*Write"),
    "cut.parquet": ("PAR1 not the whole file", "cannot be read.*Copy or download"),
    "rows.txt": ("a\n", "unsupported suffix '.txt'.*Convert it to one of .parquet, .csv, .jsonl, .json"),
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
    write_rows(empty / "news.csv", ODD_ROWS)
    with pytest.raises(DataError, match=r"no data file of a split \(found: news.csv\)"):
        load(empty)
    write_rows(tmp_path / "test.csv", ODD_ROWS)
    with pytest.raises(DataError, match=r"has no train split \(only test\): .* begins with train"):
        load(tmp_path)
    assert list(load(tmp_path, hold_out=False).splits) == ["test"]
    write_rows(tmp_path / "train.csv", ODD_ROWS)
    write_rows(tmp_path / "train.jsonl", ODD_ROWS)
    with pytest.raises(DataError, match=r"files of several formats \(train.csv, train.jsonl\): .* Leave only one format"):
        load(tmp_path)


def test_splits_with_different_classes_are_refused(tmp_path):
    for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = Dataset.from_dict({"text": [split], "label": [0]}, features=features)
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(DataError, match=r"different classes \(train: a, b; test: b, a\): .* the same class names"):
        load(tmp_path)
    write_rows(tmp_path / "mixed" / "train-0.original.csv", [("a b", 0)])
    write_rows(tmp_path / "mixed" / "train-1.csv", [("c d", 0)])
    with pytest.raises(DataError, match=r"train-1.csv and train-0.original.csv name or number .* Write both"):
        load(tmp_path / "mixed")


# check_corpus


def test_check_corpus_refuses_blank_texts(tmp_path):
    rows = [("a", 0), ("", 1), ("b", 2), (" \t\n", 3), ("\u3000", 1)]
    corpus = load(write_rows(tmp_path / "r.jsonl", rows), hold_out=False)
    with pytest.raises(DataError, match=r"white space in 3 rows \(r.jsonl row 2, r.jsonl row 4, r.jsonl row 5\): .* Remove"):
        check_corpus(corpus)


def test_check_corpus_warns_of_texts_in_two_splits(tmp_path):
    rows = [(f"text {i}", i % 4) for i in range(40)]
    write_rows(tmp_path / "train.jsonl", [*rows, rows[0]])
    write_rows(tmp_path / "validation.jsonl", [("fresh", 0), *rows[10:12]])
    write_rows(tmp_path / "test.csv", [*rows[30:38], ("other", 2)])
    warnings = check_corpus(load(tmp_path))
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "2 rows of validation with a text that is also in train (validation.jsonl row 2 = train.jsonl row 11, validation.jsonl "
        "row 3 = train.jsonl row 12): "
    )
    assert warnings[1].startswith("8 rows of test with a text that is also in train (test.csv row 1 = train.jsonl row 31, ")
    assert "test.csv row 5 = train.jsonl row 35 and 3 more): " in warnings[1]
    assert "Remove them from train" in warnings[1]


def test_import_of_corpus_loads_no_heavy_library():
    code = "import sys, agnews_dist.data.corpus; print([m for m in ('torch', 'datasets', 'pandas') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.slow
def test_two_processes_load_the_same_corpus(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [(f"{text}", label) for text, label in generate(2_000, 0, "train")])
    code = (
        "import sys; from agnews_dist.data.corpus import load_corpus\n"
        "c = load_corpus(sys.argv[1], revision=None, validation_fraction=0.1, limits={}, seed=0)\n"
        "print(c.fingerprint)"
    )
    assert python("-c", code, str(path)).stdout.strip() == load(path, fraction=0.1).fingerprint
