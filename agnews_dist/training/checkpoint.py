"""A checkpoint: a directory of tensors and state that is on disk whole, or not at all.

    step-00000123/weights.safetensors   one file per group of tensors, as the safetensors library reads it
    step-00000123/state.json            all else
    step-00000123/MANIFEST              `sha256 bytes name` of each of these files, then the sha256 of those lines

It is written and fsynced under a hidden name, and then renamed. Nothing of it is used before all of it is verified.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from agnews_dist.errors import UserError
from agnews_dist.storage import atomic

MANIFEST = "MANIFEST"
STATE = "state.json"
SUFFIX = ".safetensors"
PIECE_BYTES = 4 << 20
"""What is hashed and written at once."""

_NAME = re.compile(r"(?P<prefix>step|best)-(?P<number>[0-9]{8,18})(?P<scored>-scored)?")
_ENTRY = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,18}) ([!-~]+)")
_GROUP = re.compile(r"[a-z][a-z0-9_]*")
_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
}
"""What safetensors calls them."""


class DamagedError(UserError):
    """A directory is not the checkpoint that was once written there."""


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, verified."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """By group and name; on the CPU."""
    state: dict[str, Any]


def write_checkpoint(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> int:
    """Put a checkpoint at `path`, in the place of whatever is there; the bytes written.

    `tensors`: by group and name, contiguous, on the CPU, unchanged until this returns; `state`: what JSON can hold. May run in
    a thread. A kill or a loss of power at any instant leaves `path` whole or absent, or, if it is damaged now, as it is.

    Raises:
        OSError: something cannot be written; `path` is as it was. Where only the last fsync failed, it is the new one.
        ValueError: a name or a tensor that cannot be stored; nothing was written.
    """
    for name, form in {path.name: _NAME, **dict.fromkeys(tensors, _GROUP)}.items():
        if not form.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a checkpoint or of a group of tensors")
    parts = {group + SUFFIX: _safetensors(named) for group, named in tensors.items()}
    parts[STATE] = [memoryview(json.dumps(dict(state), indent=1).encode())]
    with atomic.new_directory(path, sync_files=False) as staging:
        entries = {name: _write(staging / name, parts[name]) for name in sorted(parts)}
        manifest = _manifest(entries)
        _write(staging / MANIFEST, [memoryview(manifest)])
    return sum(size for _, size in entries.values()) + len(manifest)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        DamagedError: it is not, or not all of it, what was written, or cannot be read.
    """
    contents = _verified_contents(path)
    try:
        state: Any = json.loads(contents.pop(STATE))
        if not isinstance(state, dict):
            raise TypeError(f"{STATE} holds no object")
        # Each file's bytes are let go once there are tensors of them.
        groups = sorted(contents)
        tensors = {name.removesuffix(SUFFIX): safetensors.torch.load(contents.pop(name)) for name in groups}
    except MemoryError:
        raise
    except Exception as error:
        # Whatever the parsers raise: the checksums are right, so another program, or another version, has written this.
        raise _damaged(path, f"its content is not of this format, {type(error).__name__}") from error
    return Checkpoint(path, tensors, dict[str, Any](state))


def checkpoints(directory: Path, prefix: str = "step") -> list[Path]:
    """The checkpoints of one kind (`step` or `best`) by their names, newest first; of one step, the scored one first.

    Raises:
        OSError: the directory is there and cannot be listed.
    """
    try:
        paths = [path for path in directory.iterdir() if path.name.startswith(f"{prefix}-")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = [path for path in paths if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path: Path) -> int:
    """The number in a checkpoint's name.

    Raises:
        ValueError: it is not the name of one.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no name of a checkpoint")
    return int(match["number"])


def prune(directory: Path, keep: int, also: Collection[str]) -> None:
    """Remove all but the newest `keep` checkpoints and those named in `also`; of `best-` ones, all but the latter."""
    try:
        outdated = [*checkpoints(directory)[keep:], *checkpoints(directory, "best")]
    except OSError:
        return
    atomic.discard([path for path in outdated if path.name not in also])


def sweep(directory: Path) -> None:
    """Remove what killed processes left half written or half removed; no other process may be writing."""
    atomic.sweep(directory, _NAME.pattern)


def _safetensors(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """A safetensors file in parts: its header, and the tensors' own memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[memoryview] = []
    offset = 0
    # The widest numbers first, so that each tensor lies at a multiple of its own width, where a reader may map it.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if name in header or tensor.dtype not in _TYPES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name!r} ({tensor.dtype}, {tensor.device}, strides {tensor.stride()}) cannot be stored")
        parts.append(tensor.detach().view(-1).view(torch.uint8).numpy().data)
        end = offset + parts[-1].nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def _manifest(entries: Mapping[str, tuple[str, int]]) -> bytes:
    """The one text that tells of files with these checksums and sizes."""
    lines = "".join(f"{sha256} {size} {name}\n" for name, (sha256, size) in sorted(entries.items())).encode()
    return lines + hashlib.sha256(lines).hexdigest().encode() + b"\n"


def _verified_contents(path: Path) -> dict[str, bytes]:
    """The files of the checkpoint at `path`, where nothing is missing, additional, different or unreadable."""
    try:
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    except OSError as error:
        raise _damaged(path, f"it cannot be listed, {error.strerror}") from error
    manifest = _bytes_of(path, MANIFEST)
    matches = [match for match in map(_ENTRY.fullmatch, manifest.split(b"\n")) if match]
    entries = {match[3].decode(): (match[1].decode(), int(match[2])) for match in matches}
    # Written again from what was understood of it: no other text is right, whatever may differ.
    if _manifest(entries) != manifest:
        raise _damaged(path, f"{MANIFEST} is not as it was written")
    for name in sorted((names ^ {*entries, MANIFEST}) | ({STATE} - {*entries})):
        raise _damaged(path, f"{name} is missing" if name not in names else f"{name} does not belong there")
    contents: dict[str, bytes] = {}
    for name, (sha256, size) in entries.items():
        contents[name] = _bytes_of(path, name, size)
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise _damaged(path, f"{name} has another checksum than {MANIFEST} tells")
    return contents


def _bytes_of(path: Path, name: str, size: int | None = None) -> bytes:
    """All of a file that should have `size` bytes."""
    file = path / name
    try:
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        # Asked before, lest something huge be read.
        there = file.stat().st_size
        if size not in (None, there):
            raise _damaged(path, f"{name} has {there} bytes instead of {size}")
        return file.read_bytes()
    except OSError as error:
        raise _damaged(path, f"{name} cannot be read, {error.strerror}") from error


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"{path} is damaged ({what}): what goes on from it would be another training. Restore the directory from a copy, or "
        "remove it."
    )


def _write(file: Path, parts: Sequence[memoryview]) -> tuple[str, int]:
    """Write and fsync a new file; its sha256 and its size."""
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
    """The directory of the best epoch that a checkpoint with this `state` refers to, beside it."""
    best = state.get("best")
    return best["name"] if best else None
