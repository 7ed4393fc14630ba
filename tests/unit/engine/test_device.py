"""Checks of a rank's machine before anything is loaded."""

from pathlib import Path

import pytest

from agnews_dist.engine.device import check_compiler
from agnews_dist.errors import UserError


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    check_compiler("auto")
    refusal = r"engine\.compile always: torch\.compile needs a C\+\+ compiler, and {} is not found\. Install one, set CXX to"
    with pytest.raises(UserError, match=refusal.format(r"(g|clang)\+\+")):
        check_compiler("always")
    (tmp_path / "g++").touch(mode=0o755)
    # The variable wins, as in torch.
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match=refusal.format(r"/nowhere/g\+\+")):
        check_compiler("always")
    compiler = tmp_path / "my-g++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    check_compiler("always")
