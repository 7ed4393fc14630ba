"""Every contract has a test that fails when the contract is broken: each patch here breaks one.

The first lines of a patch name the contract, the test that must fail, and a regular expression for its output. Another failure
does not count.

    # contract: the promise
    # test: path::name
    # red: expected output of pytest
    # needs: shared        if the test needs the shared data

A patch that no longer applies after a refactoring is made again, not deleted.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.fork_server import run_pytest
from support.processes import REPOSITORY, SHARED, TIMEOUT, environment

PATCHES = sorted(Path(__file__).parent.glob("*.patch"))
HEADER = re.compile(r"# contract: (.{20,})\n# test: (tests/\S.*)\n# red: (.+)\n(# needs: shared\n)?(?=--- a/)")


def test_there_is_a_patch_per_contract():
    assert len(PATCHES) >= 60


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the repository without the patches, compiled modules included: a patch makes its files newer."""
    for name in ("agnews_dist", "configs", "tests", "launch", "slurm"):
        ignored = shutil.ignore_patterns("mutants", "bench", "logs", "plots")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(REPOSITORY / ".venv", target_is_directory=True)  # for scripts that start python
    return tmp_path


def run_test(copy: Path, test: str) -> tuple[int | None, str]:
    paths = os.pathsep.join(map(str, (copy, copy / "tests")))
    environ = environment(AGNEWS_SHARED=str(SHARED), AGNEWS_MUTANT=test, PYTHONPATH=paths)
    return run_pytest(copy, test, environ, timeout=TIMEOUT)


def test_unpatched_copy_passes(copy):
    """Run the control: neither the copy nor the way of running a test in it makes it fail."""
    code, output = run_test(copy, "tests/unit/batching/test_loader.py")
    assert code == 0, output
    assert " passed" in output


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_makes_its_test_fail(request, patch, copy):
    header = HEADER.match(patch.read_text(encoding="utf-8"))
    assert header, f"{patch.name} lacks the first lines that this module's docstring describes"
    _, test, red, needs_shared = header.groups()
    if needs_shared:
        request.getfixturevalue("shared")
    # git would skip files without a message inside another repository, or in one that a git hook names.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ["GIT_CEILING_DIRECTORIES"] = str(copy.parent)
    applied = subprocess.run(["git", "apply", str(patch)], cwd=copy, env=environ, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"{patch.name} does not apply: make it again.\n{applied.stderr}"
    code, output = run_test(copy, test)
    if code == 0 and (skipped := re.search(r"^SKIPPED .*?: (not installed: .*)$", output, re.MULTILINE)):
        pytest.skip(skipped[1])
    assert code == 1, f"pytest ended with {code} instead of 1 (a failed test)\n{output[-3000:]}"
    assert re.search(red, output), f"the test failed without {red!r} in its output\n{output[-3000:]}"
