"""A local stand-in of the hub's HTTP API: creates repositories and takes commits with small and large files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: name -> branch -> path -> content. Large files arrive by their sha256 first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
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
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(404, {"error": "not found"})

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

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
