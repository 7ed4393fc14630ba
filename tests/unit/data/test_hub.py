"""Data sets of the hub: subsets, splits and names of classes as their cards declare them; caches of older versions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from huggingface_hub import constants
from support.hub_server import HubServer, cache_copy, commit_of, serve_hub, use_hub

from agnews_dist.data.hub import open_hub, request_data
from agnews_dist.data.hub_cache import Repository
from agnews_dist.data.hub_files import fetch
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.errors import DataError


def rows(text: str, label: object = 0) -> bytes:
    return f"text,label\n{text},{label}\n".encode()


SUBSETS = b"""---
configs:
- config_name: en
  default: true
  data_files:
  - {split: train, path: en/part-a*}
  - {split: held_out, path: en/part-b.csv}
- config_name: de
  data_dir: de
dataset_info:
- config_name: en
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': bad, '1': good}}}
- config_name: de
  features:
  - {name: label, dtype: {class_label: {names: [schlecht, gut]}}}
---
"""
FILES = {
    "README.md": SUBSETS,
    "en/part-a1.csv": rows("first"),
    "en/part-a2.csv": rows("second", 1),
    "en/part-b.csv": rows("third", 1),
    "de/train.csv": rows("erste"),
    "de/dev.csv": rows("zweite"),
    "other/train.csv": rows("none"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub() as server:
        server.datasets["me/news"] = {"main": FILES, "v1": {"train.csv": rows("early"), "test.jsonl": b'{"text": "t"}\n'}}
        use_hub(monkeypatch, tmp_path, server.address)
        yield server


def read(settings: SplitSettings, revision: str | None = None) -> dict[str, list[object]]:
    """Fetch and open; return split -> texts."""
    request = request_data("me/news", revision, settings)
    fetch([request])
    tables = open_hub("me/news", revision, settings)
    return {
        split: [text for table in found for chunk in table.chunks(("text",)) for text in chunk.columns["text"]]
        for split, found in tables.items()
    }


@pytest.mark.parametrize(
    ("settings", "revision", "expected"),
    [
        (SplitSettings(), None, {"train": ["first", "second"]}),
        (SplitSettings("en", {"test": "held_out"}), None, {"train": ["first", "second"], "test": ["third"]}),
        (SplitSettings("en", {"train": "held_out", "test": "none"}), None, {"train": ["third"]}),
        (SplitSettings("de"), None, {"train": ["erste"], "validation": ["zweite"]}),
        (SplitSettings("other"), None, {"train": ["none"]}),
        (SplitSettings(), "v1", {"train": ["early"], "test": ["t"]}),
        (SplitSettings("de"), commit_of(FILES)[:9], {"train": ["erste"], "validation": ["zweite"]}),
    ],
)
def test_subsets_splits_and_revisions(hub: HubServer, settings: SplitSettings, revision: str | None, expected) -> None:
    assert read(settings, revision) == expected


@pytest.mark.parametrize(("subset", "names"), [(None, None), ("en", ("bad", "good")), ("de", ("schlecht", "gut"))])
def test_the_card_names_the_classes(hub: HubServer, subset: str | None, names: tuple[str, ...] | None) -> None:
    if subset is None:
        hub.datasets["me/news"] = {"main": {**FILES, "README.md": b"---\ndataset_info: 7\n---\n", "train.csv": rows("x")}}
    fetch([request_data("me/news", None, SplitSettings(subset))])
    tables = open_hub("me/news", None, SplitSettings(subset))
    assert {table.class_names("label") for found in tables.values() for table in found} == {names}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SplitSettings("fr"), r"^data.subset 'fr': it is unknown: me/news has the subsets en, de\. Set --data.subset to one"),
        (
            SplitSettings("en", {"train": "tain"}),
            r"^data.splits.train 'tain': subset en of me/news has only the splits train, held_out",
        ),
        (SplitSettings("../x"), r"^data.subset '../x'"),
    ],
)
def test_a_wrong_subset_or_split_is_named_with_those_of_the_hub(hub: HubServer, settings: SplitSettings, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch([request_data("me/news", None, settings)])
    # The same from the cache, offline.
    fetch([request_data("me/news", None, SplitSettings())])
    with pytest.raises(DataError, match=message):
        open_hub("me/news", None, settings)


def test_what_is_not_in_the_cache_is_not_opened(hub: HubServer, tmp_path: Path) -> None:
    message = rf"^data.source 'me/news': it is neither a path nor in {tmp_path}/hub\. Run 'python -m agnews_dist prepare' with"
    with pytest.raises(DataError, match=message):
        open_hub("me/news", None, SplitSettings())


def test_a_data_set_written_by_save_to_disk_is_downloaded_whole(hub: HubServer, tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.datasets["me/news"] = {"main": files}
    assert read(SplitSettings()) == {"train": ["a"]}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build the cache that earlier versions of `prepare` left: that of `datasets`, of one commit, without the hub's."""
    use_hub(monkeypatch, tmp_path, None)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for split in ("train", "dev"):
        table = Dataset.from_dict({"text": [f"{split} {i}" for i in range(3)], "label": [0, 1, 0]}, features=features)
        (tmp_path / "source").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "source" / f"{split}.parquet"))
    load_dataset(str(tmp_path / "source"), cache_dir=str(tmp_path / "first"))
    [info] = (tmp_path / "first").rglob("dataset_info.json")
    target = tmp_path / "datasets" / "me___news" / "default" / "0.0.0" / ("d" * 40)
    target.parent.mkdir(parents=True)
    info.parent.rename(target)
    return target


def test_what_datasets_has_built_is_read(built: Path) -> None:
    request = request_data("me/news", None, SplitSettings())
    assert fetch([request]).directories == {Repository("dataset", "me/news"): built}
    tables = open_hub("me/news", None, SplitSettings())
    assert {split: found[0].name for split, found in tables.items()} == {
        "train": "me/news split train",
        "validation": "me/news split validation",
    }
    [chunk] = tables["validation"][0].chunks(("text", "label"))
    assert chunk.columns == {"text": ["dev 0", "dev 1", "dev 2"], "label": [0, 1, 0]}
    assert tables["train"][0].class_names("label") == ("bad", "good")


def test_a_copy_of_the_hub_is_preferred_to_what_datasets_has_built(built: Path) -> None:
    snapshot = cache_copy(Path(constants.HF_HOME), "datasets--me--news", {"train.csv": rows("new")})
    request = request_data("me/news", None, SplitSettings())
    assert fetch([request]).directories == {request.repository: snapshot}
    assert "train" in open_hub("me/news", None, SplitSettings())


def test_damaged_caches_of_datasets_are_named(built: Path) -> None:
    with pytest.raises(DataError, match=r"^data.splits.train 'x': me/news has only the splits train, validation"):
        open_hub("me/news", None, SplitSettings(names={"train": "x"}))
    with pytest.raises(
        DataError, match=r"^data set 'me/news' has the splits train, validation: none is train, .* Set --data.splits.train"
    ):
        open_hub("me/news", None, SplitSettings(names={"train": "none", "validation": "none"}))
    next(built.glob("*-validation.arrow")).unlink()
    with pytest.raises(
        DataError, match=r"^me/news: it has 0 of 1 files of split 'validation'\. Remove it, and run prepare again\.$"
    ):
        open_hub("me/news", None, SplitSettings())
    (built / "dataset_info.json").write_text("{")
    with pytest.raises(
        DataError, match=r"dataset_info.json cannot be read: JSONDecodeError .* Remove its folder, and run prepare"
    ):
        open_hub("me/news", None, SplitSettings())
