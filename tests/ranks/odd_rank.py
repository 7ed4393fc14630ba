"""Tells a story in which one rank is unlike the others: `odd_rank.py RANK CHANGE STORY [WORD ...]`.

CHANGE is `--section.field=VALUE`, which only that rank is told, or what happens in its third training step: `crash` (a bug:
an exception that is no user's error) or `nan` (its loss is not finite).
"""

import os
import sys

from agnews_dist.__main__ import main


def change_third_step(change: str) -> None:
    from agnews_dist import step

    compute, num_calls = step.summed_loss, 0

    def changed(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls < 3:
            return compute(*arguments)
        if change == "nan":
            return compute(*arguments) * float("nan")
        raise ZeroDivisionError("a bug on one rank")

    step.summed_loss = changed


if __name__ == "__main__":
    rank, change, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        if change.startswith("--"):
            words.append(change)
        else:
            change_third_step(change)
    sys.exit(main(words))
