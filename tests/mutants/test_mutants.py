"""Every contract has a test that turns red when the contract is broken: each patch here breaks one on purpose.

A patch's first lines say which contract it breaks and which test must fail:

    # contract: what is promised
    # test: path::name [more tests]

The patch is applied to a copy of the repository; there the named tests must fail by an assertion or an error of the code, not by
a broken collection. `make mutants` after a refactoring: a patch that no longer applies is to be made again, not dropped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED
from launching import REPOSITORY, environment

PATCHES = sorted(Path(__file__).parent.glob("*.patch"))


def test_there_is_a_patch_per_contract():
    assert len(PATCHES) >= 12


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in ("agnews_dist", "configs", "tests", "launch"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.mark.timeout(180)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_breaking_the_contract_turns_its_test_red(patch, copy):
    text = patch.read_text(encoding="utf-8")
    assert re.search(r"^# contract: .{20,}", text, re.MULTILINE)
    match = re.search(r"^# test: (.+)$", text, re.MULTILINE)
    assert match, "the patch names no test"
    if not SHARED.is_dir() and "# needs: shared" in text:
        pytest.skip(f"shared test data not found at {SHARED}; set AGNEWS_SHARED")
    subprocess.run(["git", "apply", "-p1", str(patch)], cwd=copy, check=True, capture_output=True, text=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *match.group(1).split()],
        cwd=copy,
        env=environment(AGNEWS_SHARED=str(SHARED), PYTHONPATH=os.pathsep.join(map(str, (copy, copy / "tests")))),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, f"pytest ended with {done.returncode}, 1 was expected\n{done.stdout[-3000:]}"
    assert re.search(r"\b1 failed", done.stdout) or re.search(r"\b1 error", done.stdout), done.stdout[-3000:]
