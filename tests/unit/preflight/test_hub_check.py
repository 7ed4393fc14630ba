"""Check of hub and cache: what is missing, and why it cannot be downloaded. `test_doctor_faults.py` has the whole command."""

import socket
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from agnews_dist.model.pretrained import EMBEDDED
from agnews_dist.preflight import hub_check
from agnews_dist.preflight.findings import Finding


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(hub_check, "HUB_SECONDS", 0.2)


def check() -> Finding:
    return hub_check.check_hub(EMBEDDED, None, "pretrained", "owner/BigNews")


def test_cached_data_in_offline_mode_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    missing = f"owner/BigNews: not complete below {tmp_path}, and HF_HUB_OFFLINE is set"
    assert (check().verdict, check().found) == ("fail", missing)
    # `datasets` names the directory of a data set that it has built like this.
    (tmp_path / "datasets" / "owner___big_news" / "default" / "0.0.0" / "abc").mkdir(parents=True)
    assert (check().verdict, check().found) == ("ok", f"all is below {tmp_path}; offline mode (HF_HUB_OFFLINE)")


def test_missing_data_and_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        found = check()
    assert found.verdict == "fail"
    assert found.found == f"owner/BigNews: not complete below {tmp_path}, and {endpoint} cannot be reached (timed out)"
    assert constants.HF_HUB_OFFLINE, "nothing else waits for the hub"
