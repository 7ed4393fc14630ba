"""Runs that the fault tests share."""

from pathlib import Path

import pytest
from support.small_run import finish


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The directory of an uninterrupted run; its ranks recorded the examples of every step."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "recorded").mkdir()
    finish(directory, fault="support.faults:inject", RECORD=str(directory / "recorded"))
    return directory
