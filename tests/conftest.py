"""What all tests share: where the shared data is, and a guard that no test is skipped unnoticed in CI."""

import os
from pathlib import Path

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared"))

# Tests never reach for the network: an accidental hub id must fail at once, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# No test asserts a time.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with real AG News rows, GPT-2's tokenizer and a small trained GPT-2."""
    if not SHARED.is_dir():
        pytest.skip(f"shared test data not found at {SHARED}; set AGNEWS_SHARED")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With AGNEWS_NO_SKIPS (set by CI) a skipped test fails the session; GPU tests may skip where there is no GPU."""
    skipped = [name for name in _skipped if not name.startswith("tests/gpu/")]
    if os.environ.get("AGNEWS_NO_SKIPS") and skipped:
        print(f"\nskipped although AGNEWS_NO_SKIPS is set: {', '.join(skipped)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
