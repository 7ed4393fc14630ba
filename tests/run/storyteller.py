"""One process that tells one story after the other, so that many checks pay for the imports once.

A line of standard input is the JSON list of a command's words (`["train", "--run.dir", ...]`); the answer is one line with exit
code, standard output and standard error, as the command alone in a process would give them.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from agnews_dist.__main__ import main


def tell(words: list[str]) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))


if __name__ == "__main__":
    # What libraries print past sys.stdout must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(tell(json.loads(line))), file=answers, flush=True)
