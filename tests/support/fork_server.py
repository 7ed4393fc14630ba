"""Processes with the slow imports behind them: forked from a server that has loaded other people's packages, and none of ours.

A cold start costs four seconds of imports, and a run of two ranks under torchrun has three. A test that is about what a run
does, not about how it is launched, starts it here. What a warm process has in common with a cold one: arguments, environment,
working directory, standard streams, signals, exit code, and the end of the interpreter. Variables that a library reads while it
is imported (HF_HOME, OMP_NUM_THREADS) are those of `launching.environment()`, and all hash strings alike.
"""

import atexit
import faulthandler
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
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from support.processes import REPOSITORY, environment, told

PRELOADED = (
    *(
        "accelerate",
        "datasets",
        "deepspeed",
        "psutil",
        "pyarrow.parquet",
        "rich.console",
        "rich.progress",
        "safetensors.torch",
    ),
    *("sklearn.metrics", "torch", "torch.distributed", "torch.nn.parallel", "yaml"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "transformers.pipelines"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.gpt2.tokenization_gpt2"),
)
_CONTEXT = multiprocessing.get_context("forkserver")


def python(*arguments: str, check: bool = True, timeout: float = 240, stdin: str | None = None, **extra: str):
    """As `launching.python`."""
    return _all_of(arguments, [{}], check=check, timeout=timeout, stdin=stdin, extra=extra)


def ranks(num_ranks: int, *arguments: str, check: bool = True, timeout: float = 240, **extra: str):
    """The ranks that `launching.torchrun` would start with `arguments`, without the agent over them: each says itself what it
    has to say, and the exit code is the first rank's that failed."""
    places = rank_variables(num_ranks)
    return _all_of(arguments, places, check=check, timeout=timeout, stdin=None, extra=extra)


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """What a launcher without an agent tells each of the ranks; rank 0 hosts the store."""
    # Not above: the processes that are started import this module, and nothing of ours may be there before their own path is.
    from agnews_dist.distributed.node_resources import free_port

    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _all_of(
    command: Sequence[str],
    places: Sequence[Mapping[str, str]],
    *,
    check: bool,
    timeout: float,
    stdin: str | None,
    extra: Mapping[str, str],
):
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        out, err, given = (Path(folder) / name for name in ("out", "err", "in"))
        for path in (out, err):
            path.touch()
        given.write_text(stdin or "", encoding="utf-8")
        processes = [
            start(command, {**environment(**extra), **place}, out=out, err=err, stdin=given) for place in places
        ]
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            os.kill(process.pid, signal.SIGABRT)
            process.join(5)
            process.kill()
            process.join()
        output = [path.read_text(encoding="utf-8") for path in (out, err)]
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    if late:
        raise AssertionError(f"no end after {timeout} s: {told(command, *output)}")
    if check and code != 0:
        raise AssertionError(f"exit code {code}: {told(command, *output)}")
    return subprocess.CompletedProcess(command, code, *output)


def start(
    command: Sequence[str], environ: Mapping[str, str], *, out: Path, err: Path, stdin: Path | None = None
) -> BaseProcess:
    """A process that does what `python *command` would (`-c code`, `-m module` or a script, and arguments).

    `out`, `err`: what it writes is appended there; `environ`: the whole environment.
    """
    _start_server()
    process = _CONTEXT.Process(target=_live, args=(list(command), dict(environ), out, err, stdin))
    process.start()
    return process


def _start_server() -> None:
    if forkserver.get_inherited_fds() is not None:
        # This process was forked itself: it goes on with the server it comes from, which Python does not do of itself.
        forkserver._forkserver.ensure_running = lambda: None
        return
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(DS_ACCELERATOR="cpu"))
    try:
        _CONTEXT.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _live(command: list[str], environ: dict[str, str], out: Path, err: Path, stdin: Path | None) -> None:
    """The child's whole life."""
    code = 1
    try:
        _take_place(environ, out, err, stdin)
        # Whoever finds it hanging ends it with ABRT, and reads where it was.
        faulthandler.enable()
        code = _run(command)
    except KeyboardInterrupt:
        traceback.print_exc()
        # As the interpreter does, so that whoever waits sees which signal it was.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        # As the interpreter ends: threads, what asked to be called, what is buffered.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take_place(environ: dict[str, str], out: Path, err: Path, stdin: Path | None) -> None:
    names = [file.read_text().strip() for file in Path(f"/proc/{os.getppid()}/task").glob("*/comm")]
    # jemalloc (pyarrow's) is made for forks.
    threads = [name for name in names if name != "jemalloc_bg_thd"]
    for number, path, flags in (
        (0, stdin or os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, err, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    assert len(threads) == 1, f"{threads}: it has inherited locks that nobody will open"
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    multiprocessing.set_start_method(None, force=True)
    # What multiprocessing has put in their place is not for programs that handle signals themselves.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(REPOSITORY)
    libraries = [path for path in sys.path if not path.startswith(str(REPOSITORY / "tests"))]
    sys.path[:] = [*filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)), *libraries]


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
