"""Child processes without the cost of imports: forked from a server that has loaded the third-party packages.

A cold start spends four seconds on imports. A test of what a run does, and not of how it is launched, starts it here:
`run_python`, `run_ranks` and `run_pytest` run a command to its end, `start` returns the process.

A forked process has the arguments, environment, working directory, standard streams, signals and exit code of a cold one. The
server holds no module of this repository, so a child may import another copy of it. Three things differ: libraries read their
import-time variables (HF_HOME, OMP_NUM_THREADS) from `processes.environment()`, all children share one hash seed, and what
libraries do at exit is left out.
"""

import atexit
import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

from support.processes import REPOSITORY, TIMEOUT, describe_output, environment, without_report

PRELOADED = """
    accelerate datasets deepspeed deepspeed.runtime.zero.muon.original_muon docstring_parser hypothesis.strategies
    psutil pyarrow.parquet pydantic.main pytest rich.console rich.progress safetensors.torch sklearn.metrics torch
    torch.distributed torch.distributed.algorithms.ddp_comm_hooks.default_hooks torch.nn.parallel yaml
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto transformers.pipelines
    transformers.models.gpt2.modeling_gpt2 transformers.models.gpt2.tokenization_gpt2
""".split()  # noqa: SIM905
"""Third-party modules. None is a plugin of pytest."""
_CONTEXT = multiprocessing.get_context("forkserver")
_OWN_PACKAGES = ("agnews_dist", "support", "conftest", "__mp_main__")
_PYTEST = """
import sys
from pathlib import Path
import pytest
import agnews_dist

assert Path(agnews_dist.__file__).is_relative_to(Path.cwd()), f"{agnews_dist.__file__} is not the copy to test"
sys.exit(pytest.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Streams:
    """Files for the standard streams of a child; output is appended."""

    out: Path
    err: Path
    stdin: Path | None = None


def run_python(*arguments: str, check: bool = True, timeout: float = TIMEOUT, stdin: str | None = None, **extra: str):
    """Run `python *arguments` as `processes.python` does."""
    return _run_all(arguments, [environment(**extra)], check=check, timeout=timeout, stdin=stdin)


def run_ranks(num_ranks: int, *arguments: str, check: bool = True, timeout: float = TIMEOUT, **extra: str):
    """Run the ranks that `torchrun *arguments` would start, without its agent.

    The exit code is that of the first rank in rank order that failed.
    """
    environs = [{**environment(**extra), **own} for own in rank_variables(num_ranks)]
    return _run_all(arguments, environs, check=check, timeout=timeout)


def run_pytest(copy: Path, test: str, environ: Mapping[str, str], *, timeout: float) -> tuple[int | None, str]:
    """Run pytest on the node id `test` of the repository copy `copy`; return exit code and output.

    A process that takes longer than `timeout` seconds is ended, with all it has started; its exit code is negative.
    """
    log = copy / "pytest.log"
    # pytest cannot rewrite the asserts of plugins that are already loaded, and warns of it.
    quiet = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", quiet, f"--basetemp={copy / 'tmp'}"]
    options += ["-o", f"faulthandler_timeout={timeout * 0.8:.0f}"]
    # With CI set, pytest prints every difference of long values, which takes minutes.
    environ = {name: value for name, value in environ.items() if name not in ("CI", "BUILD_NUMBER")}
    process = start(["-c", _PYTEST, *options, test], environ, Streams(log, log), directory=copy, new_session=True)
    process.join(timeout)
    # TERM first: torchrun then ends its workers, which are in sessions of their own.
    for ending in (signal.SIGTERM, signal.SIGKILL):
        if process.is_alive() and process.pid is not None:
            os.killpg(process.pid, ending)
            process.join(20)
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def start(
    command: Sequence[str],
    environ: Mapping[str, str],
    streams: Streams,
    *,
    directory: Path = REPOSITORY,
    new_session: bool = False,
) -> BaseProcess:
    """Start `python *command` (`-c code`, `-m module` or a script, and arguments) with exactly the variables `environ`."""
    _start_server()
    command = without_report(command)
    process = _CONTEXT.Process(target=_live, args=(command, dict(environ), streams, directory, new_session))
    main = sys.modules["__main__"]
    # multiprocessing would run the main module of this process again in the child.
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
    return process


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """Return the launcher variables of each rank; rank 0 hosts the store."""
    # Imported late: a child imports this module before the copy of the package that it tests is on its path.
    from agnews_dist.distributed.node_resources import free_port

    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _run_all(
    command: Sequence[str], environs: Sequence[Mapping[str, str]], *, check: bool, timeout: float, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        streams = Streams(Path(folder, "out"), Path(folder, "err"), Path(folder, "in"))
        streams.out.touch()
        streams.err.touch()
        Path(folder, "in").write_text(stdin or "", encoding="utf-8")
        processes = [start(command, environ, streams) for environ in environs]
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            abort(process)
        output = [path.read_text(encoding="utf-8") for path in (streams.out, streams.err)]
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    if late:
        raise AssertionError(f"not ended after {timeout:.0f} s: {describe_output(command, *output)}")
    if check and code != 0:
        raise AssertionError(f"exit code {code}: {describe_output(command, *output)}")
    return subprocess.CompletedProcess(command, code, *output)


def abort(process: BaseProcess) -> None:
    """End a process that hangs; it writes the stack of every thread to its standard error first."""
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, signal.SIGABRT)
        process.join(5)
    process.kill()
    process.join()


def _start_server() -> None:
    if forkserver.get_inherited_fds() is not None:
        # This process is a child itself: use the server that it comes from. Python would start another one.
        forkserver._forkserver.ensure_running = lambda: None
        return
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(DS_ACCELERATOR="cpu"))
    try:
        _CONTEXT.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _live(command: list[str], environ: dict[str, str], streams: Streams, directory: Path, new_session: bool) -> None:
    """Run the command in the child, from its first to its last instruction."""
    code = 1
    try:
        _set_up(environ, streams, directory)
        if new_session:
            os.setsid()
        # ABRT prints the stacks of a hanging child.
        faulthandler.enable()
        code = _run(command)
    except KeyboardInterrupt:
        traceback.print_exc()
        # End by the signal itself, as the interpreter does: the parent sees which one it was.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        # The end of the interpreter: threads, exit functions, buffers.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _set_up(environ: dict[str, str], streams: Streams, directory: Path) -> None:
    names = [file.read_text().strip() for file in Path(f"/proc/{os.getppid()}/task").glob("*/comm")]
    # The threads of jemalloc (pyarrow) survive a fork.
    threads = [name for name in names if name != "jemalloc_bg_thd"]
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, flags in (
        (0, streams.stdin or os.devnull, os.O_RDONLY),
        (1, streams.out, appending),
        (2, streams.err, appending),
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    assert len(threads) == 1, f"the server has threads ({threads}): a child would inherit locks that no thread releases"
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    multiprocessing.set_start_method(None, force=True)
    # multiprocessing replaces some of these handlers, and `nohup` ignores one; programs under test handle signals themselves.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(directory)
    libraries = [path for path in sys.path if not path.startswith(str(REPOSITORY / "tests"))]
    sys.path[:] = [*filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)), *libraries]
    for name in list(sys.modules):
        if name.partition(".")[0] in _OWN_PACKAGES:
            del sys.modules[name]
    # The objects of the libraries stay for good: a collection that visits them takes half a second. Nor does torch have to
    # remove its operators one by one at exit.
    gc.freeze()
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False


def _run(command: list[str]) -> int:
    kind, *rest = command
    try:
        if kind == "-c":
            sys.argv[:] = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv[:] = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = command
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0
