"""Runs a command in which one rank differs from the others: `faulty_rank.py RANK FAULT COMMAND [WORD ...]`.

FAULT is `--section.field=VALUE`, an option of that rank alone, or a fault in its third training step (or step $FAULT_STEP):

    crash       an exception that is a bug
    crash once  the same, unless the file $CRASHED exists
    nan         the loss of its first example is not finite
    vanish      the process exits without a message, as if killed for lack of memory
    hang        it waits forever
    suspend     it is stopped by SIGSTOP
"""

import os
import signal
import sys
import threading
from pathlib import Path

from agnews_dist.__main__ import main


def inject(fault: str) -> None:
    """Wrap the losses of a micro-batch."""
    from agnews_dist.training import losses

    compute, num_calls = losses.example_losses, 0

    def example_losses(*arguments):
        nonlocal num_calls
        num_calls += 1
        losses_B = compute(*arguments)
        if num_calls < int(os.environ.get("FAULT_STEP", "3")):
            return losses_B
        if fault == "nan":
            factors_B = losses_B.new_ones(len(losses_B))
            factors_B[0] = float("nan")
            return losses_B * factors_B
        if fault == "crash once" and not Path(os.environ["CRASHED"]).exists():
            Path(os.environ["CRASHED"]).touch()
        elif fault == "crash once":
            return losses_B
        if fault.startswith("crash"):
            raise ZeroDivisionError("a bug on one rank")
        if fault == "vanish":
            os._exit(9)
        if fault == "hang":
            threading.Event().wait()
        if fault == "suspend":
            os.kill(os.getpid(), signal.SIGSTOP)
        return losses_B

    losses.example_losses = example_losses


if __name__ == "__main__":
    rank, fault, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        if fault.startswith("--"):
            words.append(fault)
        else:
            inject(fault)
    sys.exit(main(words))
