"""What every story has around it: find the world, load the config, report errors by rank, leave cleanly."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout

from agnews_dist.config.command_line import Loaded, Option, load
from agnews_dist.distributed.preemption import PreemptionHandler, preempted_exit_code
from agnews_dist.distributed.world import World, detect_world
from agnews_dist.errors import SharedError, Stopped, UserError

TRAINING_OPTIONS = (
    Option(
        "--profile", "Write a torch.profiler trace of a few steps on rank 0 and print the top operators.", bool, False
    ),
    Option(
        "--accept",
        "Settings that may differ from those of the checkpoint that is continued, such as optim.lr; several with commas.",
        default="",
    ),
)
"""Options of a training besides its configuration; commands that run before or after a training take them too."""


def run_command(
    story: str,
    argv: Sequence[str] | None,
    body: Callable[[World, Loaded], None],
    options: Sequence[Option] = (),
    preemption: PreemptionHandler | None = None,
) -> int:
    """Run `body` and return the process's exit code; `preemption`: what it is told by signals, watched from here on.

    A user error is printed without traceback. An error raised by all ranks together is printed once, by rank 0, and names the
    rank that saw it; one in the arguments or the launcher's variables, the same for all, by the first rank of each node; any
    other by the rank that has it.
    """
    if preemption is None:
        return _tell(story, argv, body, options, None)
    preemption.start()
    try:
        return _tell(story, argv, body, options, preemption)
    finally:
        preemption.close()


def _tell(
    story: str,
    argv: Sequence[str] | None,
    body: Callable[[World, Loaded], None],
    options: Sequence[Option],
    preemption: PreemptionHandler | None,
) -> int:
    world = World()
    is_loaded = False
    try:
        world = detect_world(os.environ)
        # --help and --print_config print and end the process: once is enough.
        with nullcontext() if world.is_main else redirect_stdout(io.StringIO()):
            loaded = load(story, sys.argv[1:] if argv is None else argv, options)
        is_loaded = True
        body(world, loaded)
        exit_code = 0
    except SharedError as error:
        if world.is_main and error.exit_code == 0:
            print(error, flush=True)
        elif world.is_main:
            _say(f"{_label(error.rank, world)}error: {error}")
        exit_code = error.exit_code
    except Stopped as stopped:
        if world.is_main:
            _say(str(stopped))
        exit_code = preempted_exit_code(os.environ)
    except UserError as error:
        if preemption is not None and is_loaded:
            # So that the others, which will miss this rank in a collective, say why they end.
            preemption.failed(str(error))
        if is_loaded or world.local_rank == 0:
            _say(f"{_label(world.rank, world)}error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        if world.is_main:
            _say("interrupted")
        return 130
    except Exception:
        # A bug of ours: the whole traceback, every line marked with the rank, since ranks share one stderr. The process group
        # is left as it is: the other ranks may be inside a collective, and closing it here could wait for them.
        text = traceback.format_exc()
        # Of ranks that fail because another one did, one line is enough.
        consequence = preemption.failed(text.strip().splitlines()[-1]) if preemption is not None else None
        _say(_marked(consequence or text, world))
        return 1
    # After the except clauses, when no traceback keeps the wrapped model alive: it must be gone before its process group is.
    # Only a process that loaded torch can have one.
    if "torch" in sys.modules:
        from agnews_dist.distributed import collectives

        collectives.close()
    return exit_code


def _marked(text: str, world: World) -> str:
    return "\n".join(f"{world.label} {line}" for line in text.splitlines())


def _label(rank: int, world: World) -> str:
    return f"[rank {rank}/{world.num_ranks}] " if world.num_ranks > 1 else ""


def _say(text: str) -> None:
    """On standard error in a single write: the ranks share it, and torchrun's are unbuffered, so that `print` would let another
    rank speak between a line and its end."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
