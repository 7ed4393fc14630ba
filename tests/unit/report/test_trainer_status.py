"""Progress for Kubeflow Trainer: what is posted, when, and that no failure of the server reaches the run."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.status_server import StatusServer, serve_status
from support.tools import requires_tool

from agnews_dist import events
from agnews_dist.report import trainer_status
from agnews_dist.report.trainer_status import TrainerStatus

pytestmark = requires_tool("openssl")

SCORES = events.Scores(num_examples=8, num_correct=7, accuracy=0.875, macro_f1=0.5, loss=0.25, confusion=None)
EVALUATION = events.EvalDone(
    split="validation", epoch=1, scores=SCORES, class_names=None, num_classes=2, classes=(), seconds=1.0
)
STARTED = events.RunStarted(facts={}, parameters={}, num_steps=10)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusServer]:
    monkeypatch.setattr(trainer_status, "INTERVAL", 0.1)
    monkeypatch.setattr(trainer_status, "TIMEOUT", 2.0)
    with serve_status(tmp_path) as running:
        yield running


def step(number: int, loss: float = 0.5) -> events.StepDone:
    return events.StepDone(step=number, epoch=1, loss=loss, lr=1e-3, grad_norm=None, num_examples=2, num_tokens=9, seconds=0.1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last(server: StatusServer) -> dict[str, object]:
    """The newest status; its metrics as one dictionary."""
    status = server.posts[-1][1].to_dict()
    return status | {"metrics": {metric["name"]: metric["value"] for metric in status["metrics"]}}


def test_a_training_is_posted_from_start_to_end(server: StatusServer) -> None:
    now = 0.0
    warnings: list[events.Event] = []
    with closing(TrainerStatus(server.environ, warnings.append, clock=lambda: now)) as sink:
        sink(events.Resumed(path="step-4", step=4, attempt=2))
        sink(STARTED)
        wait_for(lambda: len(server.posts) == 1)
        assert (last(server)["progressPercentage"], last(server)["metrics"]) == (40, {"current_step": "4", "total_steps": "10"})
        assert "estimatedRemainingSeconds" not in last(server)
        sink(step(5))
        now = 3.0
        sink(step(6, loss=float("nan")))
        sink(EVALUATION)
        wait_for(lambda: "validation_loss" in last(server)["metrics"])
        status = last(server)
        assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (60, 12)
        assert status["metrics"] == {
            "current_step": "6",
            "total_steps": "10",
            "loss": "nan",
            "learning_rate": "0.001",
            "current_epoch": "1",
            "validation_accuracy": "0.875",
            "validation_macro_f1": "0.5",
            "validation_loss": "0.25",
        }
        num_posts = len(server.posts)
        sink(events.Progress(task="evaluate", done=1, total=2))
        time.sleep(0.3)
        assert len(server.posts) == num_posts, "nothing changed"
        sink(step(10))
        wait_for(lambda: last(server)["progressPercentage"] == 99)
        sink(events.RunDone())
    assert (last(server)["progressPercentage"], last(server)["estimatedRemainingSeconds"]) == (100, 0)
    assert warnings == []


def test_posts_keep_their_distance_and_the_last_state_is_sent(server: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer_status.INTERVAL == 0.1
    monkeypatch.setattr(trainer_status, "INTERVAL", 0.5)
    with closing(TrainerStatus(server.environ, [].append)) as sink:
        sink(STARTED)
        end = time.monotonic() + 1.2
        number = 0
        while time.monotonic() < end:
            number += 1
            sink(step(number))
            time.sleep(0.01)
    times = [moment for moment, _ in server.posts]
    assert 3 <= len(times) <= 4
    # The last one does not wait.
    assert min(later - earlier for earlier, later in itertools.pairwise(times[:-1])) >= 0.4
    assert last(server)["metrics"]["current_step"] == str(number)


def test_token_and_authority_are_read_again_for_each_post(server: StatusServer, tmp_path: Path) -> None:
    warnings: list[events.Event] = []
    with closing(TrainerStatus(server.environ, warnings.append)) as sink:
        sink(STARTED)
        wait_for(lambda: len(server.posts) == 1)
        server.token = "second"
        sink(step(1))
        wait_for(lambda: server.num_refused >= 2)
        (tmp_path / "token").write_text("second")
        wait_for(lambda: len(server.posts) == 2)
        authority = (tmp_path / "ca.crt").read_text()
        (tmp_path / "ca.crt").write_text("")
        sink(step(2))
        time.sleep(0.3)
        assert len(server.posts) == 2
        (tmp_path / "ca.crt").write_text(authority)
        wait_for(lambda: len(server.posts) == 3)
    url = server.environ["KUBEFLOW_TRAINER_SERVER_URL"]
    assert [warning.message for warning in warnings] == [
        f"KUBEFLOW_TRAINER_SERVER_URL {url}: cannot post progress (HTTP 403 Forbidden). The run continues."
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"KUBEFLOW_TRAINER_SERVER_CA_CERT": ""}, "CERTIFICATE_VERIFY_FAILED"),
        ({"KUBEFLOW_TRAINER_SERVER_CA_CERT": "/nowhere/ca.crt"}, "No such file"),
        ({"KUBEFLOW_TRAINER_SERVER_TOKEN": "/nowhere/token"}, "No such file or directory: '/nowhere/token'"),
        ({"KUBEFLOW_TRAINER_SERVER_TOKEN": ""}, "HTTP 403 Forbidden"),
        ({"KUBEFLOW_TRAINER_SERVER_URL": "https://127.0.0.1:9/status"}, "Connection refused"),
        ({"KUBEFLOW_TRAINER_SERVER_URL": "no url"}, "unknown url type"),
    ],
)
def test_a_failure_is_one_warning(server: StatusServer, changed: dict[str, str], reason: str) -> None:
    warnings: list[events.Event] = []
    with closing(TrainerStatus({**server.environ, **changed}, warnings.append)) as sink:
        sink(STARTED)
        for number in range(1, 2000):
            sink(step(number))
            if warnings:
                break
            time.sleep(0.01)
        sink(step(number + 1))
        sink(events.RunDone())
    assert len(warnings) == 1
    assert reason in warnings[0].message
    assert server.posts == []


def test_a_server_that_never_answers_delays_only_the_end(server: StatusServer) -> None:
    server.answers.clear()
    sink = TrainerStatus(server.environ, [].append)
    sink(STARTED)
    start = time.monotonic()
    for number in range(1, 1000):
        sink(step(number))
    assert time.monotonic() - start < 2.0, "a step waited for the server"
    sink.close()
    assert time.monotonic() - start < 10.0


def test_nothing_is_posted_before_a_run_starts(server: StatusServer) -> None:
    with closing(TrainerStatus(server.environ, [].append)) as sink:
        sink(events.Warned(message="no run"))
    assert server.posts == []
