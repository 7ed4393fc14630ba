"""The processes of `fit(launch=N)`: the launcher, and the ranks that it starts.

python -m agnews_dist.api.launched launcher FOLDER N
python -m agnews_dist.api.launched rank FOLDER         by torch's elastic launcher
"""

import os
import pickle
import signal
import sys
import threading
import traceback
from pathlib import Path

from agnews_dist.distributed.world import detect_world
from agnews_dist.errors import Stopped, UserError
from agnews_dist.storage.atomic import new_file

JOB, RESULT, CRASH, ERROR = "job.pickle", "result.pickle", "crash.txt", "error-{}.pickle"
"""Files of the folder: the job, what rank 0 returns, which rank was killed, and (class, message) of a rank's."""


def launch(folder: Path, num_ranks: int) -> int:
    """Start the ranks and wait for their end; return 0 if all ended well."""
    # torch would report here what `fit` raises as an error. It reads this variable when it is imported.
    os.environ["LOGLEVEL"] = "CRITICAL"
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    del os.environ["LOGLEVEL"]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    options = ["--standalone", f"--nproc_per_node={num_ranks}", "-m", "agnews_dist.api.launched", "rank", str(folder)]
    try:
        main(options)
    except (SignalException, KeyboardInterrupt):
        return 1
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # which the launcher sends to the other ranks
                (folder / CRASH).write_text(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}")
        return 1
    return 0


def _end_with_parent() -> None:
    """Wait until the other end of standard input is closed: the process that launched has ended, or wants an end."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def run_rank(folder: Path) -> int:
    """Train as one rank; leave the result, or the error, in `folder`."""
    from agnews_dist.api.in_process import train_here

    rank = detect_world(os.environ).rank
    try:
        trained = train_here(pickle.loads((folder / JOB).read_bytes()))
        if rank == 0:
            _write(folder / RESULT, trained)
    except Exception as error:
        is_explained = isinstance(error, (UserError, Stopped))
        failure = (type(error), str(error)) if is_explained else (RuntimeError, traceback.format_exc())
        _write(folder / ERROR.format(rank), failure)
        return 0 if isinstance(error, Stopped) else 1
    return 0


def _write(path: Path, value: object) -> None:
    with new_file(path, is_durable=False) as temporary:
        temporary.write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    role, directory, *rest = sys.argv[1:]
    sys.exit(launch(Path(directory), int(rest[0])) if role == "launcher" else run_rank(Path(directory)))
