"""Files of the hub: downloaded once, complete or refused, and taken from the cache if the hub fails."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import HubServer, cache_copy, commit_of, serve_hub, use_hub

from agnews_dist.data import hub_requests
from agnews_dist.data.hub import request_data
from agnews_dist.data.hub_files import Fetched, HubError, Request, fetch
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.errors import DataError
from agnews_dist.model.pretrained import request_model

MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "vocab.json": b"{}", "model.safetensors": b"weights", "big.onnx": b"x"}
NEEDED = set(MODEL) - {"big.onnx"}
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
NEWS = {"README.md": CARD, "data/train-0.csv": b"text,label\na,0\nb,1\n", "picture.png": b"x"}
REMEDY = "Run 'python -m agnews_dist prepare' with a network and copy its HF_HOME, or set --model.name and --data.source"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(hub_requests, "_PAUSES", ())
    with serve_hub() as server:
        server.repositories["me/mini"] = {"main": dict(MODEL)}
        server.datasets["me/news"] = {"main": dict(NEWS)}
        use_hub(monkeypatch, tmp_path, server.address)
        yield server


def model(revision: str | None = None, *, needs_weights: bool = True) -> Request:
    return request_model("me/mini", revision, needs_weights=needs_weights)


def news(revision: str | None = None, *, subset: str | None = None) -> Request:
    return request_data("me/news", revision, SplitSettings(subset))


def files_of(fetched: Fetched, request: Request) -> set[str]:
    directory = fetched.directories[request.repository]
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def go_offline(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    use_hub(monkeypatch, home, None)


def test_only_the_files_that_a_run_reads_are_downloaded_and_once(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    requests = [model(), news()]
    planned = fetch(requests, download=False)
    assert planned.pending == ("me/mini", "me/news")
    fetched = fetch(requests)
    assert files_of(fetched, requests[0]) == NEEDED
    assert files_of(fetched, requests[1]) == {"README.md", "data/train-0.csv"}
    hub.requests.clear()
    assert fetch(requests) == fetched
    assert sorted(hub.requests) == ["GET /api/datasets/me/news", "GET /api/models/me/mini"]
    go_offline(monkeypatch, tmp_path)
    assert fetch(requests) == fetched
    assert fetched.warning == ""
    assert fetched.pending == ()


def test_a_whole_commit_in_the_cache_is_not_asked_for(hub: HubServer) -> None:
    request = model(commit_of(MODEL))
    fetch([request])
    hub.requests.clear()
    assert files_of(fetch([request]), request) == NEEDED
    assert hub.requests == []


def test_a_new_commit_replaces_the_old_one_only_when_it_is_there(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    old = fetch([news()]).directories
    hub.datasets["me/news"]["main"] = {**NEWS, "data/train-1.csv": b"text,label\nc,0\n"}
    hub.faults["/resolve/"] = "403"
    failed = fetch([news()])
    assert failed.directories == old
    assert failed.warning == (
        f"{hub.address} answers 403: me/news in {tmp_path}/hub used as before. Set HF_HUB_OFFLINE=1 where no network is."
    )
    hub.faults.clear()
    fetched = fetch([news()])
    assert files_of(fetched, news()) == {"README.md", "data/train-0.csv", "data/train-1.csv"}
    go_offline(monkeypatch, tmp_path)
    assert fetch([news()]) == fetched


@pytest.mark.parametrize("fault", ["503", "404", "answer_with_a_page"])
def test_one_warning_tells_that_the_cache_is_used(hub: HubServer, tmp_path: Path, fault: str) -> None:
    cached = fetch([model(), news()])
    hub.faults["/api/"] = fault
    fetched = fetch([model(), news()])
    assert fetched.directories == cached.directories
    assert fetched.warning.count(hub.address) == 1
    assert f"me/mini, me/news in {tmp_path}/hub used as before" in fetched.warning


def test_one_error_names_all_that_is_missing(hub: HubServer, tmp_path: Path) -> None:
    fetch([model(needs_weights=False)])
    hub.faults["/api/"] = "503"
    with pytest.raises(HubError) as caught:
        fetch([model(), news()])
    missing = f"not in {tmp_path}/hub: me/mini (model.safetensors), me/news (no file): {hub.address} answers 503"
    assert str(caught.value) == f"{missing}. {REMEDY} to local paths."


def test_each_reason_has_its_remedy(hub: HubServer, tmp_path: Path) -> None:
    del hub.repositories["me/mini"]
    fault = f"^not in {tmp_path}/hub: me/mini \\(no file\\): {hub.address} has no such model, or it is private"
    with pytest.raises(
        HubError, match=rf"{fault}\. Correct the id, set HF_TOKEN, or set --model\.name and --data\.source to local"
    ):
        fetch([model(), news()])


def test_offline_nothing_is_asked(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch, tmp_path)
    with pytest.raises(HubError, match=r"^not in .*: me/mini \(no file\), me/news \(no file\): HF_HUB_OFFLINE is set\. "):
        fetch([model(), news()])
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("is_dangling", [False, True], ids=["absent", "dangling"])
def test_a_missing_file_of_a_model_is_named_or_downloaded(hub: HubServer, tmp_path: Path, missing: str, is_dangling) -> None:
    """Offline too: the library may not have listed the commit."""
    snapshot = cache_copy(tmp_path, "models--me--mini", MODEL, commit=commit_of(MODEL))
    (snapshot / missing).unlink()
    (snapshot / "vocab.json").unlink()
    if is_dangling:
        (snapshot / missing).symlink_to("../../blobs/none")
    hub.faults["/api/"] = "503"
    with pytest.raises(HubError, match=rf"^not in .*: me/mini \({missing}\): "):
        fetch([model()])
    hub.faults.clear()
    assert files_of(fetch([model()]), model()) >= NEEDED


def test_a_missing_file_of_a_data_set_is_named_or_downloaded(hub: HubServer, tmp_path: Path) -> None:
    snapshot = cache_copy(tmp_path, "datasets--me--news", NEWS, commit=commit_of(NEWS))
    (snapshot / "data" / "train-0.csv").unlink()
    hub.faults["/api/"] = "503"
    with pytest.raises(HubError, match=r"README.md names data/train-\* for train: no such data file.* answers 503\.$"):
        fetch([news()])
    (snapshot / "data" / "train-0.csv").symlink_to("../../blobs/none")
    with pytest.raises(HubError, match=r"^me/news: .*train-0.csv cannot be read: No such file.*answers 503\.$"):
        fetch([news()])
    hub.faults.clear()
    assert files_of(fetch([news()]), news()) == set(NEWS)


def test_a_listing_of_the_cache_tells_what_is_missing(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    """`hf download` writes it: without the card, nothing else knows of the test split."""
    snapshot = cache_copy(tmp_path, "datasets--me--news", {"train.csv": b"text,label\na,0\n"})
    go_offline(monkeypatch, tmp_path)
    assert fetch([news()]).directories == {news().repository: snapshot}
    (snapshot.parents[1] / "trees").mkdir()
    (snapshot.parents[1] / "trees" / f"{snapshot.name}.json").write_text('{"files": {"train.csv": {}, "test.csv": {}}}')
    with pytest.raises(HubError, match=r"^not in .*: me/news \(test.csv\): "):
        fetch([news()])


def test_a_complete_copy_under_another_spelling_is_used(hub: HubServer, tmp_path: Path) -> None:
    snapshot = cache_copy(tmp_path, "models--ME--Mini", MODEL, commit=commit_of(MODEL))
    assert fetch([model()]).directories == {model().repository: snapshot}
    assert len(hub.requests) == 1


def test_weights_in_several_files_are_all_needed(hub: HubServer) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index, "pytorch_model.bin": b"x"}
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    hub.repositories["me/mini"]["main"] = {**files, **shards}
    assert files_of(fetch([model()]), model()) == {*files, *shards} - {"pytorch_model.bin"}


def test_a_data_set_that_does_not_fit_is_refused_by_its_name(hub: HubServer) -> None:
    card = b"---\nconfigs:\n- config_name: en\n  data_files: en/*.csv\n- config_name: de\n  data_files: de/*.csv\n---\n"
    rows = {f"{name}/{split}.csv": b"text,label\na,0\n" for name in ("en", "de") for split in ("train", "test")}
    hub.datasets["me/news"]["main"] = {"README.md": card, **rows}
    with pytest.raises(
        DataError, match=r"^data.subset is not set: me/news has the subsets en, de\. Set --data.subset to one\.$"
    ):
        fetch([news()])
    assert files_of(fetch([news(subset="de")]), news(subset="de")) == {"README.md", "de/train.csv", "de/test.csv"}


def test_a_read_only_cache_is_used_as_it_is(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so a file replaces the folder of blobs: no process can write below it."""
    cached = fetch([model()])
    assert fetch([model()]) == cached
    hub.repositories["me/mini"]["main"] = {**MODEL, "config.json": b'{"new": 1}'}
    blobs = tmp_path / "hub" / "models--me--mini" / "blobs"
    shutil.copytree(cached.directories[model().repository], tmp_path / "whole")
    shutil.rmtree(cached.directories[model().repository])
    (tmp_path / "whole").rename(cached.directories[model().repository])
    shutil.rmtree(blobs)
    blobs.write_text("")
    fetched = fetch([model()])
    assert fetched.directories == cached.directories
    assert f"{blobs} cannot be written (File exists): me/mini in {tmp_path}/hub used as before" in fetched.warning
