"""`agnews-dist push` against a local stand-in of the hub."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import TOKEN, HubServer, serve_hub
from support.processes import python

from agnews_dist.commands import push
from agnews_dist.model.export import EXPORT_FILES

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with every file of an export, and others that stay here."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    for file in EXPORT_FILES:
        (tmp_path / "run" / "model" / file).write_text(f"content of {file}")
    (tmp_path / "run" / "model" / "notes.txt").write_text("private")
    (tmp_path / "run" / "config.yaml").write_text("private")
    return tmp_path / "run"


def test_push_uploads_the_model_and_nothing_else(hub: HubServer, run: Path) -> None:
    hub.repositories["owner/other"] = {"main": {}}
    # Xet is huggingface_hub's other protocol for large files.
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = python("-m", "agnews_dist", "push", str(run), "owner/news", "--private", "--revision", "v2", **online)
    model = {file: f"content of {file}".encode() for file in EXPORT_FILES}
    assert hub.repositories == {"owner/other": {"main": {}}, "owner/news": {"main": {}, "v2": model}}
    assert hub.private == {"owner/news"}
    assert f"uploaded: {hub.address}/owner/news/commit/abc" in done.stdout


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("others/news", TOKEN, r"push others/news: the token may not write there\. Use a token with write access"),
        ("owner/news", "hf_wrong", r"push owner/news: the hub does not know the token\. Set another HF_TOKEN"),
        ("a/b/c", TOKEN, r"push a/b/c: it is not a hub id\. Write OWNER/NAME"),
    ],
)
def test_refusals_of_the_hub(
    hub: HubServer,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    repository: str,
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert push.main([str(run), repository]) in (1, 2)
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_push_without_network_token_or_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push.main([str(run), "owner/news"]) == 1
    assert "push owner/news: ConnectError: " in capfd.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push.main([str(run), "owner/news"]) == 1
    assert "push owner/news: the hub needs a token. Set HF_TOKEN" in capfd.readouterr().err
    (run / "model" / "model.safetensors").unlink()
    assert push.main([str(run), "owner/news"]) == 1
    assert "it has no exported model (model.safetensors is missing)" in capfd.readouterr().err
    assert push.main([str(run)]) == 2
    assert "push with 1 arguments: it takes two" in capfd.readouterr().err
