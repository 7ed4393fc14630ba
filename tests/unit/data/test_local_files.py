"""Local sources of every layout: hidden files, parts, subsets, save_to_disk, compressed files."""

import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Value

from agnews_dist.data.formats.registry import open_table
from agnews_dist.data.local_files import SplitSettings, is_local_path, open_local
from agnews_dist.errors import DataError

CSV = "text,label\nOil rose,b\nA goal,s\n"
ROWS = [("Oil rose", "b"), ("A goal", "s")]


def rows_of(source: Path, settings: SplitSettings | None = None) -> dict[str, list[tuple[object, object]]]:
    found: dict[str, list[tuple[object, object]]] = {}
    for split, tables in open_local(source, settings or SplitSettings()).items():
        chunks = [chunk for table in tables for chunk in table.chunks(("text", "label"))]
        found[split] = [pair for chunk in chunks for pair in zip(*chunk.columns.values(), strict=True)]
    return found


def write(path: Path, content: str = CSV) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def write_compressed(path: Path) -> None:
    content = CSV.encode()
    if path.suffix == ".gz":
        # Two members, as `cat a.gz b.gz` makes them.
        path.write_bytes(gzip.compress(content[:12]) + gzip.compress(content[12:]))
    elif path.suffix == ".zst":
        path.write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(content))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("news.csv", content)
            archive.writestr("__MACOSX/._news.csv", b"\0\5\26\7")


@pytest.mark.parametrize("suffix", [".csv.gz", ".CSV.zst", ".csv.xz", ".csv.zip"])
def test_compressed_files_are_read(tmp_path, suffix):
    path = tmp_path / f"news{suffix}"
    write_compressed(path)
    assert rows_of(path)["train"] == ROWS
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"news{suffix} cannot be decompressed"):
        rows_of(path)


def test_an_archive_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "news.csv.zip", "w") as archive:
        archive.writestr("train.csv", CSV)
        archive.writestr("test.csv", CSV)
    with pytest.raises(DataError, match=r"news.csv.zip is an archive of 2 files \(train.csv, test.csv\): .* Unpack it"):
        rows_of(tmp_path / "news.csv.zip")


@pytest.mark.parametrize(
    "suffix", [".parquet", ".feather", ".arrow", ".jsonl", ".NDJSON", ".json", ".tsv", ".parquet.gz", ".json.gz"]
)
def test_every_format_is_read(tmp_path, suffix):
    path, frame = tmp_path / f"news{suffix}", pd.DataFrame(ROWS, columns=["text", "label"])
    table = pa.Table.from_pandas(frame)
    if suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path))
    elif suffix == ".tsv":
        frame.to_csv(path, sep="\t", index=False)
    elif "json" in suffix.lower():
        frame.to_json(path, orient="records", lines=suffix != ".json")
    else:
        frame.to_parquet(tmp_path / "plain.parquet")
        content = (tmp_path / "plain.parquet").read_bytes()
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert rows_of(path)["train"] == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_encodings_with_a_mark_are_read(tmp_path, encoding, suffix):
    rows = [("Öl: café 日本", "b"), ("😀\u2028x", "s")]
    objects = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    content = {
        ".csv": "text,label\r\n" + "".join(f"{text},{label}\r\n" for text, label in rows),
        ".jsonl": "\n".join(objects),
        ".json": f"[{','.join(objects)}]",
    }[suffix]
    path = tmp_path / f"news{suffix}"
    path.write_bytes(content.encode(encoding))
    assert rows_of(path)["train"] == rows
    path.write_bytes(content.encode("utf-16-le"))
    if suffix == ".csv":
        with pytest.raises(DataError, match=r"news.csv has a NUL as every second byte: it is probably UTF-16"):
            rows_of(path)


def test_hidden_files_are_not_data(tmp_path):
    write(tmp_path / "train.csv")
    for name in ("._train.csv", "~$train.csv", ".train.csv", "_train.csv", ".ipynb_checkpoints/train.csv"):
        write(tmp_path / name, "\0\5\26\7 no data")
    assert rows_of(tmp_path) == {"train": ROWS}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("part-00000-1f.csv", "part-00001-1f.csv", "_SUCCESS", ".part-00000-1f.csv.crc"), (0, 1)),
        (("part.2.csv", "part.10.csv"), (0, 1)),
        (("0.part", "1.part"), (0, 1)),
        (("train.csv/part-00000.csv", "train.csv/part-00001.csv", "train.csv/_SUCCESS"), (0, 1)),
        (("train/part-0.csv", "train/part-1.csv"), (0, 1)),
    ],
)
def test_parts_of_spark_and_dask_are_one_split(tmp_path, names, order):
    for name in names:
        write(tmp_path / name, "" if "SUCCESS" in name else f"text,label\nof {name},x\n")
    assert [text for text, _ in rows_of(tmp_path)["train"]] == [f"of {names[i]}" for i in order]


def test_empty_parts_are_left_out(tmp_path):
    write(tmp_path / "part-0.csv")
    write(tmp_path / "part-1.csv", "")
    assert rows_of(tmp_path) == {"train": ROWS}


@pytest.fixture
def saved(tmp_path) -> Path:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "s"])})
    part = Dataset.from_dict({"text": ["Oil rose", "A goal"], "label": [0, 1]}, features=features)
    DatasetDict({"train": part, "unsupervised": part.select([1])}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_directories_of_save_to_disk_are_read(saved):
    assert rows_of(saved) == {"train": [("Oil rose", 0), ("A goal", 1)]}
    assert rows_of(saved / "unsupervised") == {"train": [("A goal", 1)]}
    (table,) = open_local(saved, SplitSettings())["train"]
    assert table.class_names("label") == ("b", "s")
    assert rows_of(saved, SplitSettings(names={"test": "unsupervised"}))["test"] == [("A goal", 1)]
    assert rows_of(saved.parent, SplitSettings("saved")) == rows_of(saved)
    (saved / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="saved was written by save_to_disk of the datasets library and cannot be read"):
        rows_of(saved)
    assert rows_of(saved / "unsupervised") == {"train": [("A goal", 1)]}
    (saved / "unsupervised" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow cannot be read: FileNotFoundError"):
        rows_of(saved / "unsupervised")


def test_save_to_disk_with_columns_of_unknown_types_is_read_at_any_path(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "s"]), "image": Array2D((1, 2), "float32")})
    columns = {"text": list("abcd"), "label": [0, 1, 0, 1], "image": [[[0.0, 1.0]]] * 4}
    dataset = Dataset.from_dict(columns, features=features).select([3, 0, 1])
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    place = (tmp_path / "saved").rename(tmp_path / "a::b #1 [x]")
    info = json.loads((place / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Hologram"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    assert rows_of(place) == {"train": [("d", 1), ("a", 0), ("b", 1)]}
    assert {table.class_names("label") for table in open_local(place, SplitSettings())["train"]} == {("b", "s")}


def test_data_without_names_of_splits_is_the_unnamed_one(tmp_path):
    write(tmp_path / "parts" / "part-00000.csv")
    Dataset.from_dict({"text": ["Oil rose", "A goal"], "label": ["b", "s"]}).save_to_disk(str(tmp_path / "saved"))
    for source in (write(tmp_path / "news.csv"), tmp_path / "parts", tmp_path / "saved"):
        assert rows_of(source) == {"train": ROWS}
        assert rows_of(source, SplitSettings(unnamed="test")) == {"test": ROWS}
    write(tmp_path / "named" / "train.csv")
    assert rows_of(tmp_path / "named", SplitSettings(unnamed="test")) == {"train": ROWS}


def test_a_split_of_save_to_disk_without_rows_is_named(tmp_path):
    rows, nothing = ({"text": texts, "label": texts} for texts in (["a"], []))
    DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(nothing)}).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved", SplitSettings(names={"test": "none"})) == {"train": [("a", "a")]}
    with pytest.raises(DataError, match=r"saved/test has no rows: .* --data.splits"):
        rows_of(tmp_path / "saved")


def test_the_only_data_file_of_a_directory_is_train(tmp_path):
    write(tmp_path / "reviews.csv")
    (tmp_path / "notes.md").write_text("x")
    assert rows_of(tmp_path) == {"train": ROWS}
    with pytest.raises(DataError, match=r"data.splits.train 'other': no file or folder"):
        rows_of(tmp_path, SplitSettings(names={"train": "other"}))
    write(tmp_path / "more.csv")
    with pytest.raises(DataError, match="has no data file of a split"):
        rows_of(tmp_path)


def test_folders_inside_those_of_splits_are_read(tmp_path):
    for name in ("train/b/x.csv", "train/a/2020/x.csv", "test/a/y.csv", "other/x.csv", "train/.cache/x.csv"):
        write(tmp_path / name, f"text,label\nof {name},x\n")
    found = {split: [text for text, _ in rows] for split, rows in rows_of(tmp_path).items()}
    assert found == {"train": ["of train/a/2020/x.csv", "of train/b/x.csv"], "test": ["of test/a/y.csv"]}
    (tmp_path / "train" / "b" / "up").symlink_to("..")
    with pytest.raises(DataError, match=r"train/b/up is a link to a folder above it: its rows would be read again"):
        rows_of(tmp_path)


def test_subsets_are_folders_or_named_by_the_card(tmp_path):
    for subset in ("en", "de"):
        write(tmp_path / subset / "train-00000.csv", f"text,label\n{subset} text,x\n")
    assert rows_of(tmp_path, SplitSettings("de"))["train"] == [("de text", "x")]
    with pytest.raises(DataError, match=r"data.subset 'fr': .*\(folders: de, en\)"):
        rows_of(tmp_path, SplitSettings("fr"))
    card = (
        "---\nconfigs:\n- config_name: {}\n  data_files:\n"
        "  - split: train\n    path: en/*.csv\n  - split: dev\n    path: [de/*.csv]\n{}---\n"
    )
    write(tmp_path / "README.md", card.format("one", ""))
    assert {split: rows[0][0] for split, rows in rows_of(tmp_path).items()} == {"train": "en text", "validation": "de text"}
    second = "- config_name: two\n  data_files: de/*.csv\n"
    write(tmp_path / "README.md", card.format("one", second))
    assert rows_of(tmp_path, SplitSettings("two"))["train"] == [("de text", "x")]
    with pytest.raises(DataError, match=r"data.subset is not set: .* has the subsets one, two. Set --data.subset"):
        rows_of(tmp_path)
    write(tmp_path / "README.md", card.format("default", second))
    assert rows_of(tmp_path)["train"] == [("en text", "x")]


def test_splits_have_other_names_or_are_left_out(tmp_path):
    for name in ("train", "test", "news_2020", "extra/rows"):
        write(tmp_path / f"{name}.csv", f"text,label\nof {name},x\n")

    def texts(**names: str) -> dict[str, object]:
        return {split: rows[0][0] for split, rows in rows_of(tmp_path, SplitSettings(names=names)).items()}

    assert texts() == {"train": "of train", "test": "of test"}
    assert texts(test="none") == {"train": "of train"}
    assert texts(validation="2020") == {"train": "of train", "validation": "of news_2020", "test": "of test"}
    assert texts(train="news_2020.csv", test="train") == {"train": "of news_2020", "test": "of train"}
    assert texts(train="extra") == {"train": "of extra/rows", "test": "of test"}
    with pytest.raises(DataError, match=r"data.splits.train 'trian': no file or folder of .* has that name \(found: extra, "):
        texts(train="trian")


def test_files_that_no_reader_knows_are_named(tmp_path):
    with pytest.raises(DataError, match=r"news.xlsx has the unsupported suffix '.xlsx'.* Save the sheet as csv"):
        open_table(write(tmp_path / "news.xlsx"), "news.xlsx")
    with pytest.raises(
        DataError, match=r"archive.zip has no suffix of a format before '.zip': .* Rename it as in data.csv.zip"
    ):
        open_table(write(tmp_path / "archive.zip"), "archive.zip")


@pytest.mark.parametrize("source", ["news.CSV", "a.csv.gz", "b.tsv", "c.feather", "../x", "d.txt"])
def test_paths_differ_from_hub_ids(source):
    assert is_local_path(source)
    assert not is_local_path("owner/name")
