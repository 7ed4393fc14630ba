"""The format of a checkpoint: a directory of tensors and state, written whole or not at all, verified before it is used.

    step-00000123/weights.safetensors   one file per group of tensors, in the format of the safetensors library
    step-00000123/state.json            everything else
    step-00000123/MANIFEST              `sha256 bytes name` of each file above, then the sha256 of these lines

The directory is written and fsynced under a hidden name, then renamed.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from agnews_dist.errors import UserError
from agnews_dist.storage import atomic
from agnews_dist.storage.capacity import is_out_of_memory

MANIFEST = "MANIFEST"
STATE = "state.json"
SUFFIX = ".safetensors"
PIECE_BYTES = 4 << 20
"""Size of the pieces in which a tensor is hashed and written."""

_NAME = re.compile(r"(?P<prefix>step|best)-(?P<number>[0-9]{8,18})(?P<scored>-scored)?")
_ENTRY = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,18}) ([!-~]+)")
_GROUP = re.compile(r"[a-z][a-z0-9_]*")
_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
}
"""torch dtype -> its name in a safetensors header."""


Groups = Mapping[str, Mapping[str, Tensor]]
"""Group -> name -> tensor."""


_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)
"""Errors that say that a file is not there. All others (EIO, ESTALE, EACCES) may pass, and the file may be whole."""


class DamagedError(UserError):
    """A checkpoint directory is incomplete or changed."""


class UnreadableError(UserError):
    """The file system does not give the content of a checkpoint, which may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """The verified content of a checkpoint directory."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """Groups, on the CPU."""
    state: dict[str, Any]


def write_checkpoint(path: Path, tensors: Groups, state: Mapping[str, Any]) -> int:
    """Write a checkpoint to `path`, replacing what is there; return the bytes written. May run in a thread.

    After a kill or a loss of power at any instant, `path` holds the old content or the new one, or is absent.

    `path` has a name that `list_checkpoints` finds. `tensors` are contiguous, on the CPU, and unchanged until this returns.
    `state` is JSON-ready.

    Raises:
        OSError: something cannot be written; `path` is as it was, unless only the last fsync failed.
        ValueError: a name or a tensor cannot be stored; nothing was written.
    """
    for name, form in {path.name: _NAME, **dict.fromkeys(tensors, _GROUP)}.items():
        if not form.fullmatch(name):
            raise ValueError(f"{name!r} is not a name for a checkpoint or a group of tensors")
    parts = {group + SUFFIX: _encode_tensors(named) for group, named in tensors.items()}
    # Only `read_checkpoint` reads it: numbers that are not finite must come back.
    parts[STATE] = [memoryview(json.dumps(dict(state), indent=1, allow_nan=True).encode())]
    with atomic.new_directory(path, sync_files=False) as staging:
        entries = {name: _write(staging / name, parts[name]) for name in sorted(parts)}
        manifest = _format_manifest(entries)
        _write(staging / MANIFEST, [memoryview(manifest)])
    return sum(size for _, size in entries.values()) + len(manifest)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify the checkpoint at `path`, or raise a `DamagedError` or `UnreadableError`."""
    contents = _read_verified(path)
    try:
        state: Any = json.loads(contents.pop(STATE))
        if not isinstance(state, dict):
            raise TypeError(f"{STATE} holds no object")
        # `pop` frees each file's bytes as soon as its tensors exist.
        groups = sorted(contents)
        tensors = {name.removesuffix(SUFFIX): safetensors.torch.load(contents.pop(name)) for name in groups}
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # The checksums are right, so another program or version wrote this; the parsers may raise anything.
        raise _damaged(path, f"its content has another format, {type(error).__name__}") from error
    return Checkpoint(path, tensors, dict[str, Any](state))


def list_checkpoints(directory: Path, prefix: str = "step") -> list[Path]:
    """List the checkpoints with names `<prefix>-...`, newest first. Of one step, the scored one comes first.

    Raises:
        OSError: the directory exists and cannot be listed.
    """
    try:
        matches = [match for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)) and match["prefix"] == prefix]
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches.sort(key=lambda match: (int(match["number"]), match[0]), reverse=True)
    return [directory / match[0] for match in matches]


def prune(directory: Path, keep: int, also: Collection[str]) -> None:
    """Remove all checkpoints except the newest `keep` and those named in `also`; of best weights, all except the latter."""
    try:
        outdated = [*list_checkpoints(directory)[keep:], *list_checkpoints(directory, "best")]
    except OSError:
        return
    atomic.discard([path for path in outdated if path.name not in also])


def sweep(directory: Path) -> None:
    """Remove checkpoints that killed processes left half written or half removed. No other process may be writing."""
    atomic.sweep(directory, _NAME.pattern)


def _encode_tensors(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Return a safetensors file in parts: its header, and the memory of each tensor, which is not copied."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[memoryview] = []
    offset = 0
    # Widest numbers first: then each tensor starts at a multiple of its item size, and readers can map it.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if name in header or tensor.dtype not in _TYPES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name!r} ({tensor.dtype}, {tensor.device}, strides {tensor.stride()}) cannot be stored")
        parts.append(tensor.detach().view(-1).view(torch.uint8).numpy().data)
        end = offset + parts[-1].nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def _format_manifest(entries: Mapping[str, tuple[str, int]]) -> bytes:
    """Format MANIFEST. `entries`: file name -> (sha256, size in bytes)."""
    lines = "".join(f"{sha256} {size} {name}\n" for name, (sha256, size) in sorted(entries.items())).encode()
    return lines + hashlib.sha256(lines).hexdigest().encode() + b"\n"


def _read_verified(path: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint: name -> content."""
    try:
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    except OSError as error:
        raise _unreadable(path, "it cannot be listed", error) from error
    manifest = _read_file(path, MANIFEST)
    matches = [match for match in map(_ENTRY.fullmatch, manifest.split(b"\n")) if match]
    entries = {match[3].decode(): (match[1].decode(), int(match[2])) for match in matches}
    # Formatting the parsed entries again must give the same bytes: this finds any difference.
    if _format_manifest(entries) != manifest:
        raise _damaged(path, f"{MANIFEST} is changed")
    for name in sorted((names ^ {*entries, MANIFEST}) | ({STATE} - {*entries})):
        raise _damaged(path, f"{name} is missing" if name not in names else f"{name} does not belong there")
    contents: dict[str, bytes] = {}
    for name, (sha256, size) in entries.items():
        contents[name] = _read_file(path, name, size)
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise _damaged(path, f"{name} has another checksum than in {MANIFEST}")
    return contents


def _read_file(path: Path, name: str, size: int | None = None) -> bytes:
    """Read the file `name` of the checkpoint at `path`. `size`: the bytes it must have."""
    file = path / name
    try:
        found = file.stat()
        if not S_ISREG(found.st_mode):
            raise _damaged(path, f"{name} is missing")
        # Before reading: the file may be huge.
        if size not in (None, found.st_size):
            raise _damaged(path, f"{name} has {found.st_size} bytes instead of {size}")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise _damaged(path, f"{name} is missing") from error
    except OSError as error:
        raise _unreadable(path, f"{name} cannot be read", error) from error


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"{path} is damaged ({what}): no run can resume from it. Restore the directory from a copy, or remove it."
    )


def _unreadable(path: Path, what: str, error: OSError) -> DamagedError | UnreadableError:
    if error.errno in _ABSENT:
        return _damaged(path, f"{what}, {error.strerror}")
    return UnreadableError(
        f"{path} may be whole ({what}, {error.strerror}): an older one would lose its steps. Run the same command again once "
        "it can be read, or remove it."
    )


def _write(file: Path, parts: Sequence[memoryview]) -> tuple[str, int]:
    """Write and fsync a new file; return its sha256 and its size in bytes."""
    sha256, size = hashlib.sha256(), 0
    with file.open("xb", buffering=0) as stream:
        for part in parts:
            size += part.nbytes
            for start in range(0, part.nbytes, PIECE_BYTES):
                piece = part[start : start + PIECE_BYTES]
                sha256.update(piece)
                while piece.nbytes:
                    piece = piece[stream.write(piece) :]
        os.fsync(stream.fileno())
    return sha256.hexdigest(), size


def best_name(state: Mapping[str, Any]) -> str | None:
    """Return the name of the best weights' directory, next to the checkpoint with this `state`; None: nothing is scored yet."""
    best = state.get("best")
    return best["name"] if best else None
