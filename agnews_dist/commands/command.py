"""Running a command: detect the world, load the configuration, print errors once, choose the exit code."""

import faulthandler
import gc
import io
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from agnews_dist import __version__
from agnews_dist.api.named_settings import ACCEPTABLE
from agnews_dist.commands.arguments import Command, HelpRequest, Loaded, Option, load
from agnews_dist.commands.help import format_help
from agnews_dist.config.schema import Count
from agnews_dist.distributed.preemption import PreemptionHandler, preempted_exit_code
from agnews_dist.distributed.world import World, check_interfaces, detect_world, print_line
from agnews_dist.errors import SharedError, Stopped, UserError, shorten
from agnews_dist.events import Loading
from agnews_dist.report.display_streams import background_streams, open_missing_streams
from agnews_dist.storage.directories import provide_home

if TYPE_CHECKING:
    from agnews_dist.report.console import Console

QUIET = Option("--quiet", "Show only warnings, errors and results.", bool, False)
VERBOSE = Option("--verbose", "Show every fact, class and checkpoint.", bool, False)
TRAINING_OPTIONS = (
    QUIET,
    VERBOSE,
    Option("--profile", "Write a torch.profiler trace.", bool, False),
    Option("--accept", "Settings that may differ on resume.", tuple[Literal[ACCEPTABLE], ...], ()),
)
"""Options of a training."""
# What Optuna's generator takes.
SampleSeed = Annotated[int, Field(ge=0, lt=2**32)]
SWEEP_OPTIONS = (
    Option("--samples", "Random combinations, in place of all.", Count),
    Option("--search", "Source of --samples; default: random.", Literal["random", "optuna"]),
    Option("--sample_seed", "Seed of the random combinations; default: 0.", SampleSeed, level="advanced"),
    Option("--halving", "Successive halving: a share of 1/N survives a rung.", Annotated[int, Field(ge=2)]),
    Option("--ensemble", "Score the mean of the best setting's seeds.", bool, False),
    Option("--distil", "Train and export one member on that mean.", bool, False),
)
"""Options of a sweep, besides its output."""
PASSED_ON = tuple(replace(option, level="advanced") for option in TRAINING_OPTIONS)
"""The same for commands that run before or after a training and take its arguments."""
PASSED_ON_OF_SWEEPS = tuple(replace(option, level="advanced") for option in SWEEP_OPTIONS)
Body = Callable[[World, Loaded], None]


@contextmanager
def importing() -> Generator[None]:
    """Import libraries in this context: without garbage collection that takes a quarter less time. It would find nothing.

    Objects that exist at its end are not visited by later collections either: libraries keep theirs for good.
    """
    gc.disable()
    # tqdm warns in a notebook without ipywidgets. No bar of it is shown.
    warnings.filterwarnings("ignore", "IProgress not found")
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(command: Command, argv: Sequence[str] | None, body: Body, preemption: PreemptionHandler | None = None) -> int:
    """Run `body` and return the exit code of the process.

    A user error is printed without a traceback. Rank 0 prints an error that all ranks raise together. One rank per node prints
    an error in the arguments or the launcher's variables, as all ranks have it. Every other error is printed by its own rank.

    `argv`: arguments after the command; None: those of the process. `preemption`: handler of signals while the command runs,
    by default one for a command that handles stops.
    """
    if preemption is None and command.handles_stops:
        preemption = PreemptionHandler(os.environ)
    open_missing_streams()
    if not faulthandler.is_enabled():
        # A mapped file that another process truncates, or a disk that fails under it, ends this one by SIGBUS.
        faulthandler.enable(2)
    provide_home()
    # Standard output of other commands is data, which must not be dropped.
    with background_streams("stderr", *(["stdout"] if command.display == "stdout" else [])):
        if preemption is not None:
            preemption.start()
        try:
            exit_code, ends_together = _run_body(command, argv, body, preemption)
            # Here no traceback keeps the model alive: DDP's wrapper must be gone before its process group is.
            if ends_together and "torch" in sys.modules:
                from agnews_dist.distributed import collectives

                collectives.close()
            return exit_code
        finally:
            if preemption is not None:
                preemption.close()


@contextmanager
def open_console(command: Command, world: World, loaded: Loaded) -> "Generator[Console | None]":
    """Open the console of a command with a display, on rank 0, and show its first line: PyTorch takes seconds to load."""
    if command.display is None or not world.is_main:
        yield None
        return
    from agnews_dist.report.console import create_console
    from agnews_dist.report.formatting import create_output

    stream = sys.stdout if command.display == "stdout" else sys.stderr
    config, out = loaded.config, create_output(stream)
    with closing(create_console(out, verbosity=loaded.verbosity, every_step=config.run.debug)) as console:
        # In a pipe or job, standard error is for what goes wrong, and for long work.
        if command.display == "stdout" or stream.isatty():
            what = f"PyTorch and {shorten(config.model.name, 60)}"
            console(Loading(program=f"agnews_dist {__version__}", what=what))
        yield console


def _run_body(
    command: Command, argv: Sequence[str] | None, body: Body, preemption: PreemptionHandler | None
) -> tuple[int, bool]:
    """Return (exit code, whether all ranks end together). If not, other ranks may be in a collective with the process group."""
    world, is_loaded = World(), False
    try:
        world = detect_world(os.environ)
        if command.name != "doctor":  # which reports it with its other findings
            check_interfaces(os.environ, world)
        # `--print_config` prints and ends the process on every rank; rank 0's output is enough.
        with nullcontext() if world.is_main else redirect_stdout(io.StringIO()):
            loaded = load(sys.argv[1:] if argv is None else argv, command.options, takes_lists=command.takes_lists)
        is_loaded = True
        with open_console(command, world, loaded) as console:
            body(world, replace(loaded, console=console, preemption=preemption))
    except HelpRequest as request:
        if world.is_main:
            print(format_help(command, everything=request.level == "all"), end="")
    except SharedError as error:
        if world.is_main and error.exit_code == 0:
            print(error, flush=True)
        else:
            # torchrun shows last the failure with the earliest second.
            _record(str(error) if world.is_main else "See the error of rank 0.", delay_seconds=int(not world.is_main))
            if world.is_main:
                print_line(f"{world.prefix_of(error.rank)}error: {error}")
        return error.exit_code, True
    except Stopped as stopped:
        if world.is_main:
            print_line(str(stopped))
        return preempted_exit_code(os.environ), True
    except UserError as error:
        if preemption is not None and is_loaded:
            # Tells the ranks that wait for this one in a collective why they end.
            preemption.report_failure(str(error), is_own=True)
        _record(str(error))
        if is_loaded or world.local_rank == 0:
            print_line(f"{world.prefix_of(world.rank)}error: {error}")
        return error.exit_code, False
    except KeyboardInterrupt:
        if world.is_main:
            print_line("interrupted")
        return 130, False
    except Exception as error:
        # A bug, at the outermost frame: every line of the traceback names the rank, and the other ranks learn of it.
        text = traceback.format_exc()
        # If another rank failed first, one line replaces the traceback. Collectives raise RuntimeError.
        own, last = not isinstance(error, RuntimeError), text.strip().splitlines()[-1]
        consequence = preemption.report_failure(last, is_own=own) if preemption is not None else None
        _record(consequence or text, delay_seconds=int(consequence is not None))
        print_line("\n".join(f"{world.label} {line}" for line in (consequence or text).splitlines()))
        return 1, False
    return 0, True


def _record(text: str, delay_seconds: int = 0) -> None:
    """Write an error to the file that torchrun reads: its summary, which is the last thing on the screen, shows it then."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()) + delay_seconds)}
        with suppress(OSError):
            content = json.dumps({"message": {"message": text, "extraInfo": details}}, allow_nan=False)
            Path(path).write_text(content, encoding="utf-8")
