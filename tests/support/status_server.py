"""A local stand-in of Kubeflow Trainer's status server: HTTPS with a certificate of an own authority, and a bearer token."""

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kubeflow_trainer_api.models.trainer_v1alpha1_trainer_status import TrainerV1alpha1TrainerStatus
from kubeflow_trainer_api.models.trainer_v1alpha1_update_train_job_status_request import (
    TrainerV1alpha1UpdateTrainJobStatusRequest,
)


class StatusServer(ThreadingHTTPServer):
    """Keeps every accepted status with the time of its arrival. `directory` has `ca.crt` and `token`, as a pod has them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.token = "first"
        (directory / "token").write_text("first\n")
        self.posts: list[tuple[float, TrainerV1alpha1TrainerStatus]] = []
        self.num_refused = 0
        self.answers = threading.Event()
        """Not set: requests are read and never answered."""
        self.answers.set()
        _create_certificates(directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server.crt", directory / "server.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def environ(self) -> dict[str, str]:
        """The variables that the controller sets in a pod."""
        path = "apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs/agnews/status"
        return {
            "KUBEFLOW_TRAINER_SERVER_URL": f"https://127.0.0.1:{self.server_port}/{path}",
            "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(self.directory / "ca.crt"),
            "KUBEFLOW_TRAINER_SERVER_TOKEN": str(self.directory / "token"),
        }

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that do not trust the certificate."""


def _create_certificates(directory: Path) -> None:
    """Create an authority in ca.crt, and server.crt with server.key for 127.0.0.1 that it signed."""
    new_key = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    ca = ["-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority", "-addext", "keyUsage=critical,keyCertSign"]
    of_server = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    signed = [
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-keyout",
        "server.key",
        "-out",
        "server.crt",
        "-subj",
        "/CN=status",
        *of_server,
    ]
    for arguments in (ca, signed):
        subprocess.run([*new_key, *arguments], cwd=directory, check=True, capture_output=True, timeout=60)


@contextmanager
def serve_status(directory: Path) -> Iterator[StatusServer]:
    with StatusServer(directory) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.answers.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answers.wait()
        is_right = self.headers["Authorization"] == f"Bearer {self.server.token}" and self.path.endswith("/agnews/status")
        if is_right:
            status = TrainerV1alpha1UpdateTrainJobStatusRequest.from_dict(json.loads(body)).trainer_status
            self.server.posts.append((time.monotonic(), status))
        else:
            self.server.num_refused += 1
        self.send_response(200 if is_right else 403)
        self.send_header("Content-Length", "0")
        self.end_headers()
