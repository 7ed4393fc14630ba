"""Shared fixtures and settings of all tests, and a guard against unnoticed skips in CI."""

import gc
import os
from pathlib import Path

import hypothesis
import pytest
from support.processes import SHARED

# Offline, an accidental hub id fails at once and not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# No test depends on a duration.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# The objects of imported libraries stay for good. To visit them in each garbage collection takes half a second.
gc.disable()

_skipped: list[str] = []


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with real AG News rows, GPT-2's tokenizer and a small trained GPT-2."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared test data at {SHARED}; set AGNEWS_SHARED")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session with skipped tests if AGNEWS_NO_SKIPS is set, as in CI; a GPU or a container builder may be missing."""
    skipped = [name for name in _skipped if not name.startswith(("tests/gpu/", "tests/run/test_image.py::test_image_builds"))]
    if os.environ.get("AGNEWS_NO_SKIPS") and skipped:
        print(f"\nskipped although AGNEWS_NO_SKIPS is set: {', '.join(skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
