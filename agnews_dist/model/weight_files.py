"""The files from which a model's weights were read: copied to memory where that costs little, and watched for changes.

`from_pretrained` maps the files. Overwriting one in place would change the weights of a run. Truncating it would end the run by
SIGBUS, which names no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agnews_dist.errors import ModelError
from agnews_dist.events import Emit, Warned
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.storage.capacity import free_host_bytes

MAX_COPIED_SHARE = 0.1
"""Share of the node's free memory that the copies of all its ranks may take. More would be too much for large models."""
_SUFFIXES = (".safetensors", ".bin")
_REMOVED = (-1, -1)
"""State of a file that was removed or renamed, which changes no mapped page."""


@dataclass(frozen=True)
class WeightFiles:
    """The files and their state when they were read."""

    states: Mapping[Path, tuple[int, int]]
    """Path -> size and modification time (ns)."""
    are_copied: bool
    """False: the weights are mapped, so a change of a file changes them."""
    _reported: set[Path] = field(default_factory=set[Path])

    def check(self, emit: Emit) -> None:
        """Warn once about a file that has changed since, if the weights are copies of it.

        Raises:
            ModelError: the weights are mapped, so they are not those that the run began with.
        """
        for path in [
            path
            for path, state in self.states.items()
            if path not in self._reported and _state_of(path) not in (state, _REMOVED)
        ]:
            if not self.are_copied:
                raise ModelError(
                    f"model file {path} has changed while the run uses it: its weights are no longer those that the run began "
                    "with. Restore the file and start again."
                )
            self._reported.add(path)
            message = (
                f"model file {path} has changed since it was read: this run keeps the weights that it read, and a restart "
                "would refuse the new ones. Restore the file."
            )
            emit(Warned(message=message))


def copy_weights(classifier: Classifier, ranks_per_node: int) -> WeightFiles:
    """Replace mapped weights by copies, unless they are large compared with the node's free memory; return their files."""
    states = {path: _state_of(path) for path in _find_mapped_files()}
    parameters = [*classifier.prefix.parameters(), *classifier.suffix.parameters()]
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    are_copied = num_bytes * ranks_per_node <= MAX_COPIED_SHARE * free_host_bytes()
    if states and are_copied:
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        for name, weight in classifier.prefix.named_parameters():
            classifier.frozen_state[f"transformer.{name}"] = weight.detach()
    return WeightFiles(states, are_copied)


def _find_mapped_files() -> list[Path]:
    """Return the files of weights that this process has mapped now; none on systems without /proc."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    # Address, permissions, offset, device, inode, path.
    names = {fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}
    return sorted(Path(name) for name in names if name.endswith(_SUFFIXES))


def _state_of(path: Path) -> tuple[int, int]:
    """Return size and modification time."""
    try:
        status = path.stat()
    except OSError:
        return _REMOVED
    return status.st_size, status.st_mtime_ns
