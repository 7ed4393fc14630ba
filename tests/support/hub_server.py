"""A local stand-in of the hub's HTTP API: creates repositories, takes commits, serves models and data sets, and has faults."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import close_session, constants

from agnews_dist.data import hub_cache

TOKEN = "hf_of_the_test"
_FILE_PATH = "/{repo_id}/resolve/{revision}/{filename}"
RUN = """
import sys
from support.hub_server import read_environment

read_environment()
from agnews_dist.__main__ import main

sys.exit(main(sys.argv[1:]))
"""
"""Program of a forked process, in which huggingface_hub was imported with other variables."""


def read_environment() -> None:
    """Make huggingface_hub take HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE from the environment as it is now."""
    constants.HF_HOME = os.environ["HF_HOME"]
    constants.HF_HUB_CACHE = os.environ.get("HF_HUB_CACHE", f"{constants.HF_HOME}/hub")
    constants.ENDPOINT = os.environ.get("HF_ENDPOINT", "http://127.0.0.1:9")
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + _FILE_PATH
    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"


def use_hub(monkeypatch: pytest.MonkeyPatch, home: Path, address: str | None) -> None:
    """Let this process use an empty cache below `home`, and the hub at `address`; None: offline."""
    for name, value in (
        ("HF_HOME", str(home)),
        ("HF_HUB_CACHE", str(home / "hub")),
        ("ENDPOINT", address or "http://127.0.0.1:9"),
        ("HUGGINGFACE_CO_URL_TEMPLATE", (address or "http://127.0.0.1:9") + _FILE_PATH),
        ("HF_HUB_OFFLINE", address is None),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_TELEMETRY", constants.HF_HUB_DISABLE_TELEMETRY),
        ("DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_cache, "_chosen", {})
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    close_session()


def cache_copy(home: Path, folder: str, files: dict[str, bytes], *, commit: str = "c" * 40, ref: str | None = "main") -> Path:
    """Write a commit as the hub's library has it in its cache; return its directory. `ref`: branch or tag; None: none."""
    snapshot = home / "hub" / folder / "snapshots" / commit
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    if ref is not None:
        (home / "hub" / folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "hub" / folder / "refs" / ref).write_text(commit)
    return snapshot


def commit_of(files: dict[str, bytes]) -> str:
    """Return the commit that the server names for these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: name -> branch -> path -> content. Large files arrive by their sha256 first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        """Requests for files and facts."""
        self.faults: dict[str, str] = {}
        """Part of a path -> what happens to requests for it: a method of the handler, or a status."""
        self.is_closing = threading.Event()
        self.private: set[str] = set()
        self.large_files: dict[str, bytes] = {}
        self.read_only_owners = {"others"}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.is_closing.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        fault = next((fault for part, fault in self.server.faults.items() if part in path), None)
        if fault is not None and not fault.isdigit():
            # The client may be gone.
            with suppress(OSError):
                getattr(self, fault)()
            self.close_connection = True
        elif fault is not None:
            self._answer(int(fault), {"error": "a fault"})
        elif path.startswith("/api/"):
            self._describe(path.removeprefix("/api/"))
        else:
            self._send_file(path.removeprefix("/"))

    def stay_silent(self) -> None:
        self.server.is_closing.wait(60)

    def trickle(self) -> None:
        """Send a header byte by byte, without an end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        while not self.server.is_closing.wait(0.05):
            self.wfile.write(b"x")

    def stop_halfway(self) -> None:
        self.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nX-Repo-Commit: abc\r\nContent-Length: 100000\r\n\r\n')
        if self.command == "GET":
            self.wfile.write(b'{"sha": ')
        self.server.is_closing.wait(60)

    def hang_up_halfway(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{")

    def send_slowly(self) -> None:
        """Send 30 kB in nine seconds."""
        self.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nX-Repo-Commit: abc\r\nContent-Length: 30000\r\n\r\n')
        for _ in range(30 if self.command == "GET" else 0):
            self.wfile.write(b"x" * 1_000)
            self.server.is_closing.wait(0.3)

    def send_late(self) -> None:
        """Send the content of a file after nine seconds."""
        if self.command == "GET":
            self.server.is_closing.wait(9)
        self._send_file(unquote(urlparse(self.path).path).removeprefix("/"))

    def answer_with_a_page(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 16\r\n\r\n<html>Log in</h>")

    def _find(self, kind: str, words: list[str]) -> tuple[dict[str, dict[str, bytes]], list[str]] | None:
        """Return a repository and the words behind its name. Names have one word or two, in any case."""
        of_kind = self.server.datasets if kind == "datasets" else self.server.repositories
        for length in (1, 2):
            for name, repository in of_kind.items():
                if name.lower() == "/".join(words[:length]).lower():
                    return repository, words[length:]
        self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return None

    def _find_files(self, repository: dict[str, dict[str, bytes]], revision: str) -> dict[str, bytes] | None:
        for branch, files in repository.items():
            if branch == revision or (len(revision) > 6 and commit_of(files).startswith(revision)):
                return files
        self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _describe(self, path: str) -> None:
        kind, *words = path.split("/")
        found = self._find(kind, words)
        if found is None:
            return
        repository, rest = found
        files = self._find_files(repository, "/".join(rest[1:]) if rest else "main")
        if files is not None:
            name = path.split("/revision/")[0].removeprefix(f"{kind}/")
            siblings = [{"rfilename": file} for file in files]
            self._answer(200, {"id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings})

    def _send_file(self, path: str) -> None:
        kind, words = "models", path.split("/")
        if words[0] == "datasets":
            kind, words = "datasets", words[1:]
        found = self._find(kind, words)
        if found is None:
            return
        repository, (_, revision, *rest) = found
        files = self._find_files(repository, revision)
        if files is None:
            return
        name, headers = "/".join(rest), {"X-Repo-Commit": commit_of(files)}
        if name not in files:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers})
            return
        headers |= {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "Content-Length": str(len(files[name]))}
        self.send_response(200)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(files[name])

    def do_PUT(self) -> None:
        content = self._read()
        self.server.large_files[self.path.rsplit("/", 1)[-1]] = content
        self._answer(200 if hashlib.sha256(content).hexdigest() == self.path.rsplit("/", 1)[-1] else 400, {})

    def do_POST(self) -> None:
        body = self._read()
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and parts[-1] != "validate-yaml":
            self._answer(401, {"error": "Invalid credentials"})
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[-1] == "batch":
            self._offer_uploads(json.loads(body))
        elif parts[4:5] == ["branch"]:
            repository = self.server.repositories["/".join(parts[2:4])]
            repository.setdefault(parts[5], dict(repository["main"]))
            self._answer(200, {})
        elif parts[4:5] == ["preupload"]:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), parts[5], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": self.path})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name.split("/")[0] in self.server.read_only_owners:
            self._answer(403, {"error": "You don't have the rights"})
            return
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(name)
        is_new = name not in self.server.repositories
        self.server.repositories.setdefault(name, {"main": {}})
        self._answer(200 if is_new else 409, {"url": f"{self.server.address}/{name}", "name": name})

    def _offer_uploads(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.address}/large/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
        url = f"{self.server.address}/{name}/commit/abc"
        self._answer(200, {"success": True, "commitOid": "a" * 40, "commitUrl": url})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
