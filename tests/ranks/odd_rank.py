"""Tells a story in which one rank is unlike the others: `odd_rank.py RANK CHANGE STORY [WORD ...]`.

CHANGE is `--section.field=VALUE`, which only that rank is told, or what happens in its third training step (or $ODD_STEP):
`crash` (a bug: an exception that is no user's error), `crash once` (unless the file $CRASHED says that it has been), `nan` (the
loss of its first example is not finite), `vanish` (it ends without a word, as one that is out of memory), `hang` (it waits for
ever) or `stop` (it is suspended).
"""

import os
import signal
import sys
import threading
from pathlib import Path

from agnews_dist.__main__ import main


def change_third_step(change: str) -> None:
    from agnews_dist.training import step

    compute, num_calls = step.example_losses, 0

    def changed(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls < int(os.environ.get("ODD_STEP", "3")):
            return compute(*arguments)
        losses_B = compute(*arguments)
        if change == "nan":
            factors_B = losses_B.new_ones(len(losses_B))
            factors_B[0] = float("nan")
            return losses_B * factors_B
        if change == "crash once" and not Path(os.environ["CRASHED"]).exists():
            Path(os.environ["CRASHED"]).touch()
        elif change == "crash once":
            return losses_B
        if change.startswith("crash"):
            raise ZeroDivisionError("a bug on one rank")
        if change == "vanish":
            os._exit(9)
        if change == "hang":
            threading.Event().wait()
        if change == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return losses_B

    step.example_losses = changed


if __name__ == "__main__":
    rank, change, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        if change.startswith("--"):
            words.append(change)
        else:
            change_third_step(change)
    sys.exit(main(words))
