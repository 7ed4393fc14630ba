"""System tools that some tests need: skip a test that needs a missing one. `launch/tools.sh` lists and installs them."""

import os
import shutil

import pytest


def find_missing(*tools: str) -> list[str]:
    """Return the tools that are not installed. Debian installs daemons outside of a user's PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [tool for tool in tools if shutil.which(tool, path=path) is None]


def explain_skip(*missing: str) -> str:
    """Return the reason of a skipped test."""
    return f"not installed: {', '.join(missing)} (bash launch/test.sh --install)"


def requires_tool(*tools: str) -> pytest.MarkDecorator:
    """Mark a test, or a module as `pytestmark`, that needs all `tools`; without them it is skipped."""
    missing = find_missing(*tools)
    return pytest.mark.skipif(bool(missing), reason=explain_skip(*missing))


def skip_without(*tools: str) -> None:
    """Skip the running test or fixture unless all `tools` are installed."""
    if missing := find_missing(*tools):
        pytest.skip(explain_skip(*missing))
