"""A split's features on the node's own disk, in front of the file that nodes share: read from there once, mapped from here.

What is missing in the shared file is computed by one of the nodes and written to both, so later runs find it. A copy that fails
is `lost`; all ranks then agree to `let_go` of theirs, and the shared file is all that there is.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor

from agnews_dist.distributed import collectives
from agnews_dist.events import Emit, Warned
from agnews_dist.features.eviction import make_room, remove
from agnews_dist.features.store import FeatureFile


class NodeFile:
    """As a `FeatureFile`: the shared one to everybody else; training maps the local one."""

    def __init__(self, shared: FeatureFile, local: FeatureFile) -> None:
        """Two files of the same key."""
        self._shared = shared
        self._local: FeatureFile | None = local
        self.directory, self.num_bytes = shared.directory, shared.num_bytes
        self.lost: str | None = None
        """Why the copy cannot be finished here; nothing is copied from then on."""

    @property
    def found(self) -> frozenset[int]:
        """The segments that are marked where training reads."""
        return self._shared.found if self._local is None else self._local.found

    @property
    def is_complete(self) -> bool:
        """Whether every segment is marked in either."""
        return self._shared.is_complete or (self._local is not None and self._local.is_complete)

    def allocate(self) -> None:
        """Reserve the whole space in both.

        Raises:
            OSError: the shared file has none.
        """
        self._shared.allocate()
        if self._local is not None:
            try:
                self._local.allocate()
            except OSError as error:
                self.lose(error)

    def hold(self) -> None:
        """Mark both as in use."""
        for file in self._both():
            file.hold()

    def close(self) -> None:
        """Others may remove both."""
        for file in self._both():
            file.close()

    @property
    def place(self) -> Path | None:
        """Where the copies of this node are; None: there is none of this file."""
        return None if self._local is None else self._local.directory.parent

    def lose(self, error: OSError) -> None:
        """Copy no more."""
        self.lost = (
            f"no features can be kept in {self.place} ({error.strerror or error}): they are read from "
            f"{self.directory.parent}."
        )

    def let_go(self) -> None:
        """Forget the copy, and remove it unless another process of the node has not let go yet."""
        if self._local is not None:
            self._local.close()
            remove(self._local.directory)
        self._local, self.lost = None, None

    def worker(
        self,
        compute: Callable[[int], Tensor | None],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        done: Callable[[int], None] = lambda _: None,
    ) -> Callable[[], None]:
        """As the shared file's; what is read there is read once per node, under the local segment's lock.

        The function leaves the rest undone where the copy is `lost`.
        """
        shared, local = self._shared, self._local
        if local is None:
            return shared.worker(compute, rank=rank, num_ranks=num_ranks, done=done)
        of_shared: list[OSError] = []

        def obtain(segment: int) -> Tensor | None:
            try:
                return shared.obtain(segment, compute)
            except OSError as error:
                of_shared.append(error)
                raise

        fill = local.worker(obtain, rank=rank, num_ranks=num_ranks, done=done)

        def work() -> None:
            if self.lost is not None:
                return
            try:
                fill()
            except OSError as error:
                if error in of_shared:
                    raise
                self.lose(error)

        return work

    def read(self, segment: int) -> Tensor | None:
        """The rows of one segment if they are whole in either."""
        return next((rows for file in reversed(self._both()) if (rows := file.read(segment)) is not None), None)

    def rows(self) -> Tensor:
        """All rows, mapped from the node's own disk."""
        return (self._local or self._shared).rows()

    def _both(self) -> list[FeatureFile]:
        return [self._shared] if self._local is None else [self._shared, self._local]


def make_room_for_copies(files: Collection[FeatureFile | NodeFile], limit_bytes: int) -> None:
    """Remove copies of the longest unused features on this node, until those of `files` fit beside the others."""
    copies = [file for file in files if isinstance(file, NodeFile)]
    keep, needed = {copy.directory.name for copy in copies}, sum(copy.num_bytes for copy in copies)
    for place in {copy.place for copy in copies if copy.place is not None}:
        try:
            make_room(place, needed, limit_bytes, keep=keep)
        except OSError as error:
            for copy in copies:
                copy.lose(error)


def let_lost_go(files: Collection[FeatureFile | NodeFile], emit: Emit) -> bool:
    """Whether a copy was lost on any node; then no rank uses any: what another was to check may be unchecked. Collective."""
    copies = [file for file in files if isinstance(file, NodeFile)]
    own = next((copy.lost for copy in copies if copy.lost is not None), None)
    lost = next((message for message in collectives.all_gather(own) if message), None)
    if lost is None:
        return False
    emit(Warned(message=lost))
    for copy in copies:
        copy.let_go()
    return True
