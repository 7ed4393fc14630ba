"""The files of the Hugging Face hub that a run reads: downloaded, or found in the local cache.

The hub names the commit of a revision and its files, so that a copy is known to be complete and current. If it cannot be asked,
a copy in the cache is used, with a warning.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from agnews_dist.data import hub_requests
from agnews_dist.data.hub_cache import (
    DEFAULT_BRANCH,
    Copy,
    Repository,
    cache_directory,
    choose,
    find_copies,
    is_commit,
    repository_folder,
)
from agnews_dist.data.hub_requests import Answer, HubFailureError, Notify
from agnews_dist.data.rows import list_first
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.storage import atomic


@dataclass(frozen=True)
class Request:
    """A repository, and the choice of the files that a run reads."""

    repository: Repository
    choose: Callable[[Path], Sequence[str]]
    """Returns the names of the needed files of a directory, in which files may be empty. Raises UserError if it is unfit."""
    read_first: tuple[str, ...] = ()
    """Files whose content `choose` reads."""
    find_built: Callable[[], Path | None] = lambda: None
    """Returns a directory to use if no copy in the cache is complete."""


@dataclass(frozen=True)
class Fetched:
    """The directories of the requested files."""

    directories: Mapping[Repository, Path] = field(default_factory=dict[Repository, Path])
    warning: str = ""
    """The reason why copies are used that the hub did not confirm; empty if it did, or was not to be asked."""
    pending: tuple[str, ...] = ()
    """Names of repositories of which files are still to be downloaded."""


class HubError(UserError):
    """Files are neither in the local cache nor to be had from the hub."""


@dataclass(frozen=True)
class _Local:
    """The best copy of a repository in the cache."""

    directory: Path | None = None
    missing: tuple[str, ...] = ("no file",)
    fault: str = ""
    """The reason why `choose` refuses it."""

    @property
    def is_complete(self) -> bool:
        return self.directory is not None and not self.missing and not self.fault


def fetch(requests: Sequence[Request], *, download: bool = True, notify: Notify = lambda _: None) -> Fetched:
    """Return the directories with the files of all requests, after downloading those that are missing.

    If the hub cannot be used and everything is in the local cache, that is used, with a warning. A whole commit that is in the
    cache is not asked for. Libraries of Hugging Face stay silent from here on.

    `download` False: only find out what is to be downloaded. `notify`: takes a line about a wait of more than some seconds.

    Raises:
        HubError: files are missing and cannot be downloaded; one error for all requests.
        UserError: the files on the hub are unfit for a request.
    """
    hub_requests.silence()
    found = {request.repository: _look(request) for request in requests}
    answers: dict[Repository, Answer | HubFailureError] = {}
    if hub_requests.is_offline():
        answers = {repository: HubFailureError("HF_HUB_OFFLINE is set") for repository in found}
    elif asked := [each for each, local in found.items() if not (local.is_complete and is_commit(each.revision))]:
        # A start with everything in the cache does not wait for a hub that is down.
        answers = hub_requests.ask(asked, notify, may_retry=not all(local.is_complete for local in found.values()))
    directories = {repository: local.directory for repository, local in found.items() if local.directory is not None}
    pending: list[str] = []
    failures: dict[Repository, HubFailureError] = {}
    for request in requests:
        repository, answer = request.repository, answers.get(request.repository)
        try:
            if isinstance(answer, HubFailureError):
                raise answer
            if answer is not None:
                directory, is_complete = _bring(request, answer, download=download, notify=notify)
                directories[repository] = directory
                pending += [] if is_complete else [repository.name]
        except HubFailureError as failure:
            failures[repository] = failure
    _check_complete({repository: found[repository] for repository in failures}, failures)
    warning = ""
    if failures and not hub_requests.is_offline():
        reasons = "; ".join(dict.fromkeys(map(str, failures.values())))
        names = list_first([repository.name for repository in failures], str)
        warning = f"{reasons}: {names} in {cache_directory()} used as before. Set HF_HUB_OFFLINE=1 where no network is."
    return Fetched(directories, warning, tuple(pending))


def share_directories(fetched: Sequence[Fetched | None], world: World) -> None:
    """Use the directories that the first rank of this node has fetched, and no hub any more. `fetched`: by rank."""
    mine = fetched[world.rank - world.local_rank]
    for repository, directory in mine.directories.items() if mine is not None else ():
        choose(repository, directory)
    hub_requests.go_offline()


def _check_complete(found: Mapping[Repository, _Local], failures: Mapping[Repository, HubFailureError]) -> None:
    """Raise one HubError for all repositories whose copy in the cache is not complete."""
    missing, remedies = dict[str, list[str]](), dict[str, None]()
    for repository, local in found.items():
        if local.fault:
            raise HubError(f"{repository.name}: {local.fault.rstrip('.')}. Nothing else can be read: {failures[repository]}.")
        if not local.is_complete:
            names = f"{repository.name} ({list_first(local.missing, str)})"
            missing.setdefault(str(failures[repository]), []).append(names)
            remedies[failures[repository].remedy] = None
    listing = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in missing.items())
    if missing:
        raise HubError(
            f"not in {cache_directory()}: {listing}. {', '.join(remedies)}, or set --model.name and --data.source "
            "to local paths."
        )


def _look(request: Request) -> _Local:
    """Return the first complete copy in the cache, or else the first."""
    found = [_examine(request, copy) for copy in find_copies(request.repository)]
    complete = next((local for local in found if local.is_complete), None)
    if complete is None and (built := request.find_built()) is not None:
        return _Local(built, ())
    return complete or next(iter(found), _Local())


def _examine(request: Request, copy: Copy) -> _Local:
    """Find what a copy lacks. Without a listing of the commit, `choose` decides by the files that are there."""
    try:
        needed = _choose(request, copy.listing, copy.directory)
    except UserError as error:
        return _Local(copy.directory, (), str(error))
    return _Local(copy.directory, tuple(_absent(needed, copy.directory)))


def _bring(request: Request, answer: Answer, *, download: bool, notify: Notify) -> tuple[Path, bool]:
    """Return the directory of the hub's commit and whether its files are complete, after downloading if that is wanted."""
    repository = request.repository
    folder, at_commit = repository_folder(repository), Repository(repository.kind, repository.name, answer.commit)
    new = folder / "snapshots" / answer.commit
    # Another spelling of the id may have it.
    directory = next((copy.directory for copy in find_copies(at_commit)), new)
    if first := _absent([name for name in request.read_first if name in answer.files], directory):
        hub_requests.download(at_commit, first, folder, notify)
        directory = new
    if missing := _absent(_choose(request, answer.files, directory), directory):
        if not download:
            return directory, False
        if directory != new:
            directory, missing = new, _absent(_choose(request, answer.files, new), new)
        hub_requests.download(at_commit, missing, folder, notify)
    if directory == new and not answer.commit.startswith(repository.revision or "-"):
        _write_ref(folder / "refs" / (repository.revision or DEFAULT_BRANCH), answer.commit)
    return directory, True


def _choose(request: Request, listing: Sequence[str] | None, directory: Path) -> Sequence[str]:
    """Return the needed files of a directory that should have those of `listing`; None: unknown, those that are there."""
    if listing is None:
        return request.choose(directory)
    with _sketch(listing, directory) as sketch:
        try:
            # What the hub does not have either is named by who reads it.
            return [name for name in request.choose(sketch) if name in listing]
        except UserError as error:
            raise type(error)(str(error).replace(str(sketch), request.repository.name)) from error


def _absent(names: Sequence[str], directory: Path) -> list[str]:
    """Return the files that are not there. A dangling link is not."""
    return [name for name in names if not (directory / name).is_file()]


def _write_ref(ref: Path, commit: str) -> None:
    """Record the commit of a branch or tag, as the hub's library does before its files are there."""
    with suppress(OSError):  # a cache that is read-only
        if not ref.is_file() or ref.read_text(encoding="utf-8").strip() != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(ref, [commit])


@contextmanager
def _sketch(files: Sequence[str], directory: Path) -> Generator[Path]:
    """Make a directory with files of these names: links to those in `directory`, else empty ones."""
    with TemporaryDirectory() as folder:
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                continue
            path, real = Path(folder) / name, (directory / name).absolute()
            path.parent.mkdir(parents=True, exist_ok=True)
            if real.is_file():
                path.symlink_to(real)
            else:
                path.touch()
        yield Path(folder)
