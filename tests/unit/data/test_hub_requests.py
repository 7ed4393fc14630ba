"""Requests to a hub with every kind of fault: an answer, or a reason in bounded time."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub_server import HubServer, commit_of, serve_hub, use_hub

from agnews_dist.data import hub_requests
from agnews_dist.data.hub_cache import Repository, repository_folder
from agnews_dist.data.hub_requests import Answer, HubFailureError, ask, download

NEWS = Repository("dataset", "me/news")
FILES = {"README.md": b"# News", "train.csv": b"text,label\na,0\n"}
SECONDS = 1.0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(hub_requests, "ASK_SECONDS", SECONDS)
    monkeypatch.setattr(hub_requests, "NOTICE_SECONDS", SECONDS / 4)
    monkeypatch.setattr(hub_requests, "STALL_SECONDS", SECONDS)
    monkeypatch.setattr(hub_requests, "_PAUSES", (0.1, 0.1))
    with serve_hub() as server:
        server.datasets["me/news"] = {"main": FILES, "v1": {}}
        use_hub(monkeypatch, tmp_path, server.address)
        hub_requests.silence()
        yield server


def ask_for(repository: Repository = NEWS, *, may_retry: bool = False) -> Answer | HubFailureError:
    """Ask; the answer must come within the limit, with some seconds for a busy machine."""
    begin, lines = time.monotonic(), list[str]()
    [outcome] = ask([repository], lines.append, may_retry=may_retry).values()
    assert time.monotonic() - begin < SECONDS + 60
    assert lines in ([], [f"ask {constants.ENDPOINT} for {repository.name}, 1 s at most"])
    return outcome


def test_the_answer_has_commit_and_files(hub: HubServer) -> None:
    expected = Answer(commit_of(FILES), tuple(FILES))
    for revision in (None, "main", commit_of(FILES), commit_of(FILES)[:8]):
        assert ask_for(Repository("dataset", "me/news", revision)) == expected
    assert len(hub.requests) == 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stay_silent", "does not answer within 1 s"),
        ("trickle", "does not answer within 1 s"),
        ("stop_halfway", "does not answer within 1 s"),
        ("hang_up_halfway", r"cannot be reached \("),
        ("answer_with_a_page", r"cannot be reached \("),
        ("503", "answers 503"),
        ("429", "answers 429"),
        ("403", "answers 403"),
    ],
)
def test_a_fault_of_the_hub_becomes_a_reason_in_time(hub: HubServer, fault: str, reason: str) -> None:
    hub.faults["/api/"] = fault
    with pytest.raises(HubFailureError, match=f"^{hub.address} {reason}"):
        raise_(ask_for())
    assert len(hub.requests) == 1, "nothing is asked again if all is in the cache"


def raise_(outcome: Answer | HubFailureError) -> None:
    if isinstance(outcome, HubFailureError):
        raise outcome


@pytest.mark.parametrize("fault", ["no host", "refused", "tls", "resolver", "proxy"])
def test_a_fault_of_the_network_becomes_a_reason_in_time(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        endpoints = {"no host": "http://nowhere.invalid", "refused": "http://127.0.0.1:9", "tls": f"https://{address}"}
        if fault == "proxy":
            monkeypatch.setenv("HTTP_PROXY", f"http://{address}")
            monkeypatch.setenv("NO_PROXY", "")
        use_hub(monkeypatch, tmp_path, endpoints.get(fault, "http://example.invalid"))
        if fault == "resolver":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **_more: time.sleep(30))
        with pytest.raises(HubFailureError, match=r"cannot be reached|does not answer within 1 s"):
            raise_(ask_for())


def test_the_hub_is_asked_again_if_that_may_help(hub: HubServer) -> None:
    hub.faults["/api/"] = "503"
    with pytest.raises(HubFailureError, match="answers 503"):
        raise_(ask_for(may_retry=True))
    assert len(hub.requests) == 3


@pytest.mark.parametrize(
    ("repository", "reason", "remedy"),
    [
        (Repository("dataset", "me/other"), "has no such dataset, or it is private", "Correct the id, set HF_TOKEN"),
        (Repository("dataset", "me/news", "v2"), "has no revision 'v2' of it", "Correct the revision"),
        (Repository("model", "a b"), r"it is not an id of the hub \(.*a b", "Correct the id"),
    ],
)
def test_an_answer_that_does_not_change_is_not_asked_for_again(
    hub: HubServer, repository: Repository, reason: str, remedy: str
) -> None:
    with pytest.raises(HubFailureError, match=reason) as caught:
        raise_(ask_for(repository, may_retry=True))
    assert caught.value.remedy == remedy
    assert len(hub.requests) <= 1


def fetch_file(name: str = "train.csv") -> list[str]:
    """Download a file; return what was announced."""
    lines: list[str] = []
    at_commit = Repository("dataset", "me/news", commit_of(FILES))
    download(at_commit, [name], repository_folder(at_commit), lines.append)
    return lines


def test_a_file_is_downloaded(hub: HubServer) -> None:
    fetch_file()
    folder = repository_folder(NEWS)
    assert (folder / "snapshots" / commit_of(FILES) / "train.csv").read_bytes() == FILES["train.csv"]


@pytest.mark.parametrize("fault", ["stay_silent", "trickle", "stop_halfway"])
def test_a_download_without_progress_ends(hub: HubServer, fault: str) -> None:
    hub.faults["/resolve/"] = fault
    lines: list[str] = []
    at_commit = Repository("dataset", "me/news", commit_of(FILES))
    begin = time.monotonic()
    with pytest.raises(HubFailureError, match=f"^the download from {hub.address} stalls$"):
        download(at_commit, ["train.csv"], repository_folder(at_commit), lines.append)
    assert time.monotonic() - begin < SECONDS + 60
    assert lines[0] == f"download 1 file of me/news from {hub.address}: 0.0 MB so far"


def test_a_slow_download_continues_as_long_as_bytes_come(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults["/resolve/"] = "send_slowly"
    monkeypatch.setattr(hub_requests, "_CHUNK_BYTES", 1_000)
    # On a busy machine the first bytes may take seconds.
    monkeypatch.setattr(hub_requests, "STALL_SECONDS", 5.0)
    begin = time.monotonic()
    lines = fetch_file()
    assert lines[0].startswith(f"download 1 file of me/news from {hub.address}: ")
    assert time.monotonic() - begin > 5.0, "it took longer than the limit"


def test_a_cache_that_cannot_be_written_is_named(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache should be")
    with pytest.raises(HubFailureError, match=rf"^{tmp_path}/hub.* cannot be written \((Not a directory|File exists)"):
        fetch_file()
