"""Check of hub and cache: by the rules of the run. `test_doctor_faults.py` has the whole command."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import HubServer, cache_copy, commit_of, serve_hub, use_hub

from agnews_dist.data.hub import request_data
from agnews_dist.data.hub_files import fetch
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.model.pretrained import request_model
from agnews_dist.preflight.findings import Finding
from agnews_dist.preflight.hub_check import REMEDY, check_hub

MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
NEWS = {"train.csv": b"text,label\na,0\n"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub() as server:
        server.repositories["me/mini"] = {"main": MODEL}
        server.datasets["me/news"] = {"main": NEWS}
        use_hub(monkeypatch, tmp_path, server.address)
        yield server


MODEL_REQUEST, SMALL_REQUEST = (request_model("me/mini", None, needs_weights=needed) for needed in (True, False))
REQUESTS = [MODEL_REQUEST, request_data("me/news", None, SplitSettings())]


def check() -> Finding:
    return check_hub(REQUESTS, [SMALL_REQUEST])[0]


def test_local_inputs_need_no_hub() -> None:
    assert check_hub([], [])[0] == Finding("hub", "ok", "not needed: model and data are local")


def test_files_to_download_are_named_and_only_the_small_ones_are_there_then(hub: HubServer) -> None:
    finding, fetched = check_hub(REQUESTS, [SMALL_REQUEST])
    assert finding == Finding("hub", "ok", f"me/mini, me/news will be downloaded; {hub.address} answers")
    directory = fetched.directories[MODEL_REQUEST.repository]
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "tokenizer.json"]


def test_a_complete_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(REQUESTS)
    assert check() == Finding("hub", "ok", f"all is in {tmp_path}/hub")
    hub.faults["/api/"] = "503"
    assert check() == Finding("hub", "warn", fetch(REQUESTS).warning.rstrip("."), REMEDY)
    use_hub(monkeypatch, tmp_path, None)
    assert check() == Finding("hub", "ok", f"all is in {tmp_path}/hub; offline mode (HF_HUB_OFFLINE)")


def test_an_incomplete_cache_fails_as_the_run_does(hub: HubServer, tmp_path: Path) -> None:
    cache_copy(tmp_path, "models--me--mini", {"config.json": b"{}", "tokenizer.json": b"{}"}, commit=commit_of(MODEL))
    hub.faults["/api/datasets"] = "403"
    finding = check()
    assert finding.found.startswith(f"not in {tmp_path}/hub: me/news (no file): {hub.address} answers 403. Run ")
    with pytest.raises(Exception, match="answers 403") as caught:
        fetch(REQUESTS)
    assert str(caught.value) == finding.found


def test_a_wrong_subset_fails(hub: HubServer) -> None:
    finding, _ = check_hub([request_data("me/news", None, SplitSettings("fr"))], [])
    assert finding.verdict == "fail"
    assert finding.found.startswith("data.subset 'fr': me/news has no folder of that name")
