"""Every contract has a test that turns red when the contract is broken: each patch here breaks one on purpose.

A patch's first lines say which contract it breaks, which test must fail, and what that test must say (a regular expression), so
that no other failure is taken for it:

    # contract: what is promised
    # test: path::name
    # red: what pytest prints
    # needs: shared        where the test needs the shared data

After a refactoring a patch may no longer apply: it is to be made again, not dropped.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import forked_pytest
import pytest
from conftest import SHARED
from support.processes import REPOSITORY, environment

PATCHES = sorted(Path(__file__).parent.glob("*.patch"))
HEADER = re.compile(r"# contract: (.{20,})\n# test: (tests/\S.*)\n# red: (.+)\n(# needs: shared\n)?(?=--- a/)")


def test_there_is_a_patch_per_contract():
    assert len(PATCHES) >= 30


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in ("agnews_dist", "configs", "tests", "launch", "slurm"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(REPOSITORY / ".venv", target_is_directory=True)  # the scripts start its interpreter
    return tmp_path


def pytest_on(copy: Path, test: str) -> tuple[int | None, str]:
    paths = os.pathsep.join(map(str, (copy, copy / "tests")))
    return forked_pytest.run(
        copy, test, environment(AGNEWS_SHARED=str(SHARED), AGNEWS_MUTANT="1", PYTHONPATH=paths), timeout=180
    )


def test_an_unharmed_copy_stays_green(copy):
    """The negative control: neither the copy nor the way it is tested turns a test red."""
    code, output = pytest_on(copy, "tests/unit/batching/test_loader.py")
    assert code == 0, output
    assert " passed" in output


@pytest.mark.timeout(240)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_breaking_the_contract_turns_its_test_red(request, patch, copy):
    header = HEADER.match(patch.read_text(encoding="utf-8"))
    assert header, f"{patch.name} does not begin with the lines that this module's first lines ask for"
    _, test, red, needs_shared = header.groups()
    if needs_shared:
        request.getfixturevalue("shared")
    # A repository around the copy, or one that a git hook names, would make git skip the files without a word.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ["GIT_CEILING_DIRECTORIES"] = str(copy.parent)
    applied = subprocess.run(
        ["git", "apply", str(patch)], cwd=copy, env=environ, capture_output=True, text=True, check=False
    )
    assert applied.returncode == 0, f"{patch.name} is to be made again:\n{applied.stderr}"
    code, output = pytest_on(copy, test)
    assert code == 1, f"pytest ended with {code}, 1 (a failed test) was expected\n{output[-3000:]}"
    assert re.search(red, output), f"the test failed for another reason than {red!r}\n{output[-3000:]}"
