"""Requests to the Hugging Face hub, bounded: a question by time, a download by lack of progress.

The hub may be slow, silent or wrong in any way. Requests run in threads that are left behind at the limit: no limit of a
library holds for all of it (resolving a name has none, and an answer may come byte by byte).
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from agnews_dist.data.hub_cache import Repository, keep_choices
from agnews_dist.errors import count_noun, shorten

ASK_SECONDS = 10.0
"""Limit for all questions together: is it there, at which commit, with which files."""
STALL_SECONDS = 30.0
"""A download ends if this long no file is complete, and fewer than `STALL_RATE` bytes per second arrive."""
STALL_RATE = 1_000
NOTICE_SECONDS = 5.0
"""A wait that takes longer is announced."""
_PAUSES = (1.0, 2.0, 4.0)
"""Seconds before the hub is asked again."""
_NUM_THREADS = 4
_CHUNK_BYTES = 1 << 18
"""Bytes of a download that are written at once. The library's 10 MB would look like a stall on a slow line."""
PREPARE = "Run 'python -m agnews_dist prepare' with a network and copy its HF_HOME"
"""Remedy where the hub cannot be reached."""
LOGGERS = ("huggingface_hub", "httpx", "httpx2")
"""Names under which the hub's library logs."""
Notify = Callable[[str], None]
"""Takes a line about a wait."""


@dataclass(frozen=True)
class Answer:
    """The hub's answer: the commit of a revision, and the names of its files."""

    commit: str
    files: tuple[str, ...]


class HubFailureError(Exception):
    """The hub cannot be used, for the reason of the text. `is_final`: to ask again would not help."""

    def __init__(self, reason: str, remedy: str = PREPARE, *, is_final: bool = True) -> None:
        super().__init__(reason)
        self.remedy, self.is_final = remedy, is_final


def ask(repositories: Sequence[Repository], notify: Notify, *, may_retry: bool) -> dict[Repository, Answer | HubFailureError]:
    """Ask for commit and files of all repositories at once, for `ASK_SECONDS` at most."""
    start = time.monotonic()
    deadline, notice = start + ASK_SECONDS, start + NOTICE_SECONDS
    outcomes: dict[Repository, Answer | HubFailureError] = {}

    def work(repository: Repository) -> None:
        outcomes[repository] = _ask_one(repository, deadline, may_retry=may_retry)

    threads = [_start(work, repository) for repository in repositories]
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        if time.monotonic() > notice:
            notice = deadline
            notify(f"ask {endpoint()} for {', '.join(each.name for each in repositories)}, {ASK_SECONDS:g} s at most")
        time.sleep(0.02)
    return {repository: outcomes.get(repository) or _silent() for repository in repositories}


def download(at_commit: Repository, files: Sequence[str], folder: Path, notify: Notify) -> None:
    """Fetch files of a repository, whose revision is a commit, to its `folder` in the cache.

    Raises:
        HubFailureError: a file cannot be downloaded or written, or nothing arrives any more.
    """
    from huggingface_hub import constants, hf_hub_download

    # Plain HTTP: a transfer of hf_xet may show no progress for long.
    constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = True, _CHUNK_BYTES
    left, failures = list(reversed(files)), list[BaseException]()

    def work(_: int) -> None:
        while left and not failures:
            try:
                name, kind, commit = left.pop(), at_commit.kind, at_commit.revision
                hf_hub_download(at_commit.name, name, repo_type=kind, revision=commit, endpoint=endpoint())
            except IndexError:
                return  # another thread took the last file
            except Exception as error:  # of any kind: the answer may be anything
                failures.append(error)

    threads = [_start(work, number) for number in range(min(_NUM_THREADS, len(files)))]
    start = mark = time.monotonic()
    first = at_mark = _count_bytes(folder)
    num_left, next_notice = len(left), NOTICE_SECONDS
    while any(thread.is_alive() for thread in threads) and not failures:
        time.sleep(0.02)
        now = time.monotonic()
        if now - start > next_notice:
            next_notice *= 2
            megabytes = (_count_bytes(folder) - first) / 1e6
            notify(
                f"download {count_noun(len(files), 'file')} of {at_commit.name} from {endpoint()}: {megabytes:.1f} MB so far"
            )
        if now - mark > STALL_SECONDS:
            total = _count_bytes(folder)
            if len(left) == num_left and total - at_mark < STALL_RATE * STALL_SECONDS:
                failures.append(HubFailureError(f"the download from {endpoint()} stalls"))
            mark, at_mark, num_left = now, total, len(left)
    if failures:
        failure = failures[0]
        raise failure if isinstance(failure, HubFailureError) else _explain(failure, at_commit) from failure


def silence() -> None:
    """Keep the hub's library from printing retries and progress bars, also in threads that are left behind.

    It sends no telemetry either: before its first request it would ask the hub for something of its own, for up to 3 s.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    constants.HF_HUB_DISABLE_TELEMETRY = True


@contextmanager
def keep_hub_settings() -> Generator[None]:
    """Reset at the end of the block what `silence`, `go_offline` and `choose` did in it: the process is another program's."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    offline, telemetry, has_bars = (
        constants.HF_HUB_OFFLINE,
        constants.HF_HUB_DISABLE_TELEMETRY,
        not are_progress_bars_disabled(),
    )
    try:
        with keep_choices():
            yield
    finally:
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = offline, telemetry
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if has_bars and are_progress_bars_disabled():
            enable_progress_bars()


def endpoint() -> str:
    """Return the address of the hub (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    """Return whether the hub is not to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def go_offline() -> None:
    """Let no library of this process send requests to the hub any more."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def _ask_one(repository: Repository, deadline: float, *, may_retry: bool) -> Answer | HubFailureError:
    from huggingface_hub import HfApi

    api, pauses = HfApi(endpoint=endpoint()), iter(_PAUSES if may_retry else ())
    while True:
        try:
            info: Any = api.repo_info(
                repository.name, repo_type=repository.kind, revision=repository.revision, timeout=ASK_SECONDS
            )
            return Answer(str(info.sha), tuple(str(file.rfilename) for file in info.siblings or ()))
        except Exception as error:  # of any kind: the answer may be anything
            failure = _explain(error, repository)
        pause = next(pauses, None)
        if failure.is_final or pause is None or time.monotonic() + pause > deadline:
            return failure
        time.sleep(pause)


def _explain(error: BaseException, repository: Repository) -> HubFailureError:
    """Return why a request to the hub failed."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".: ") or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return HubFailureError(f"{endpoint()} gives it only to users with access", "Set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubFailureError(f"{endpoint()} has no such {repository.kind}, or it is private", "Correct the id, set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubFailureError(f"{endpoint()} has no revision {repository.revision!r} of it", "Correct the revision")
    if isinstance(error, errors.HFValidationError):
        return HubFailureError(f"it is not an id of the hub ({shorten(reason, 100)})", "Correct the id")
    if status is not None:
        return HubFailureError(f"{endpoint()} answers {status}", is_final=status < 500 and status not in (408, 429))
    if isinstance(error, OSError) and error.strerror and error.filename:
        return HubFailureError(f"{error.filename} cannot be written ({error.strerror})", "Set HF_HOME to another directory")
    if "timed out" in reason or "Timeout" in type(error).__name__:
        return _silent()
    return HubFailureError(f"{endpoint()} cannot be reached ({shorten(reason, 100)})", is_final=False)


def _silent() -> HubFailureError:
    return HubFailureError(f"{endpoint()} does not answer within {ASK_SECONDS:g} s", is_final=False)


def _count_bytes(folder: Path) -> int:
    """Count the bytes of a repository in the cache, those of unfinished files included."""
    total = 0
    with suppress(OSError):
        for path in (folder / "blobs").iterdir():
            with suppress(OSError):
                total += path.stat().st_size
    return total


def _start(work: Callable[[Any], None], argument: object) -> Thread:
    # A daemon: the process can end although it hangs.
    thread = Thread(target=work, args=(argument,), name="hub", daemon=True)
    thread.start()
    return thread
