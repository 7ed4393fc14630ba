"""`agnews-dist push` against a local stand-in of the hub."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import TOKEN, HubServer, serve_hub
from support.processes import python

from agnews_dist.__main__ import main
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


def refuse(run: Path, *words: str, **variables: str) -> str:
    """Return the error of a push in a process of its own: the library reads its variables when it is imported."""
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **variables}
    done = python("-m", "agnews_dist", "push", str(run), *words, check=False, **online)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    return done.stderr


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
def test_refusals_of_the_hub(hub: HubServer, run: Path, repository: str, token: str, message: str) -> None:
    error = refuse(run, repository, HF_TOKEN=token, HF_ENDPOINT=hub.address)
    assert re.search(message, error), error


def test_push_without_network_or_token(run: Path, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}
    assert "push owner/news: ConnectError: " in refuse(run, "owner/news", **nowhere)
    assert "offline mode is enabled" in refuse(run, "owner/news", **nowhere, HF_HUB_OFFLINE="1")
    without = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "none")}
    assert "push owner/news: the hub needs a token. Set HF_TOKEN" in refuse(run, "owner/news", **without)


def test_push_without_model_or_repository(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model" / "model.safetensors").unlink()
    assert main(["push", str(run), "owner/news"]) == 1
    assert "it has no exported model (model.safetensors is missing)" in capsys.readouterr().err
    assert main(["push", str(run)]) == 2
    assert "push with 1 arguments: it takes two" in capsys.readouterr().err
