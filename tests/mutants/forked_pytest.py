"""Runs pytest on a copy of the repository in a child of a process that has the slow imports behind it.

Starting a test of the model costs seconds of imports and milliseconds of work; a fork server pays for the imports once. This
module imports nothing of the repository, lest the child hold the original's modules instead of the copy's.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

# Only other people's packages, and none that is a plugin of pytest.
_SLOW = [
    "torch",
    "accelerate",
    "datasets",
    "pyarrow.parquet",
    "safetensors.torch",
    "sklearn.metrics",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt2.tokenization_gpt2",
    "transformers.pipelines",
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(_SLOW)


def run(root: Path, test: str, environ: dict[str, str], *, timeout: float) -> tuple[int | None, str]:
    """(exit code, what it printed) of pytest on the node id `test` of the repository at `root`; a hang is an error."""
    log = root / "pytest.log"
    process = _SERVER.Process(target=_child, args=(root, test, environ, log))
    process.start()
    process.join(timeout)
    for ending in (signal.SIGTERM, signal.SIGKILL):
        if process.is_alive():
            assert process.pid is not None
            # The first lets torchrun end its workers, which are in sessions of their own.
            os.killpg(process.pid, ending)
            process.join(20)
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _child(root: Path, test: str, environ: dict[str, str], log: Path) -> None:
    os.setsid()
    # pytest collects garbage several times at its end: not among the objects of libraries, which cost half a second each time.
    gc.freeze()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    # With these pytest spells out every difference: minutes, where long values differ.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    os.chdir(root)
    sys.path[:0] = [str(root), str(root / "tests")]
    package = importlib.import_module("agnews_dist")
    assert package.__file__ == str(root / "agnews_dist" / "__init__.py"), "the test would run on another package"
    # The libraries above are loaded already, so pytest cannot look into the asserts of those that have a plugin for it.
    quiet = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    # Where a test hangs is printed before `run` ends it.
    options = ["-x", "-q", "--tb=short", "-o", "faulthandler_timeout=150", "-p", "no:cacheprovider", "-W", quiet]
    options.append(f"--basetemp={root / 'tmp'}")
    sys.exit(int(pytest.main([*options, test])))
