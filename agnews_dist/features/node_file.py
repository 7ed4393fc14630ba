"""A split's features on the node's own disk, in front of the file that nodes share: read from there once, mapped from here.

What is missing in the shared file is computed by one of the nodes and written to both, so later runs find it.
"""

from collections.abc import Callable

from torch import Tensor

from agnews_dist.events import Emit, Warned
from agnews_dist.features.files import FeatureFile


class NodeFile:
    """As a `FeatureFile`: the shared one to everybody else; training maps the local one while there is room for it."""

    def __init__(self, shared: FeatureFile, local: FeatureFile, emit: Emit) -> None:
        """Two files of the same key."""
        self._shared, self._emit = shared, emit
        self._local: FeatureFile | None = local
        self.directory, self.num_bytes = shared.directory, shared.num_bytes

    @property
    def found(self) -> frozenset[int]:
        """The segments that are marked where training reads."""
        return self._shared.found if self._local is None else self._local.found

    @property
    def is_complete(self) -> bool:
        """Whether every segment is marked in either."""
        return self._shared.is_complete or (self._local is not None and self._local.is_complete)

    def allocate(self) -> None:
        """Reserve the whole space in both; if the node has none, in the shared file alone.

        Raises:
            OSError: the shared file has none.
        """
        self._shared.allocate()
        if self._local is None:
            return
        try:
            self._local.allocate()
        except OSError as error:
            place, self._local = self._local.directory.parent, None
            self._emit(
                Warned(
                    message=f"no features can be kept in {place} ({error.strerror or error}): they are read from "
                    f"{self._shared.directory.parent}."
                )
            )

    def hold(self) -> None:
        """Mark both as in use."""
        for file in self._both():
            file.hold()

    def close(self) -> None:
        """Others may remove both."""
        for file in self._both():
            file.close()

    def worker(
        self,
        compute: Callable[[int], Tensor | None],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        done: Callable[[int], None] = lambda _: None,
    ) -> Callable[[], None]:
        """As the shared file's; what is read there is read once per node, under the local segment's lock."""
        if self._local is None:
            return self._shared.worker(compute, rank=rank, num_ranks=num_ranks, done=done)
        shared = self._shared
        return self._local.worker(
            lambda segment: shared.obtain(segment, compute), rank=rank, num_ranks=num_ranks, done=done
        )

    def read(self, segment: int) -> Tensor | None:
        """The rows of one segment if they are whole in either."""
        return next((rows for file in reversed(self._both()) if (rows := file.read(segment)) is not None), None)

    def rows(self) -> Tensor:
        """All rows, mapped from the node's own disk."""
        return (self._local or self._shared).rows()

    def _both(self) -> list[FeatureFile]:
        return [self._shared] if self._local is None else [self._shared, self._local]
