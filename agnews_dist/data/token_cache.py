"""Token caches on disk: arrays with checksums, published whole or not at all, verified when opened, listed and removed.

<root>/<key>/                  one cache: meta.json and three arrays per split
<root>/<key>.lock              held while it is built or removed
<root>/<key>.building-*/       an unpublished cache; its name holds node and process
"""

import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.rows import Ints
from agnews_dist.errors import DataError
from agnews_dist.events import DataFinding, Emit, Warned
from agnews_dist.storage import atomic
from agnews_dist.storage.directories import used_disk_bytes
from agnews_dist.storage.locks import is_locked, locked_or_bypassed, try_lock

FORMAT = 1
"""Version of the files, part of the key. Raise it when the files or their meaning change."""
_META = "meta.json"
_ARRAYS = ("tokens", "offsets", "labels")
_KEY = re.compile("[0-9a-f]{64}")
_BUILDING = ".building-"
_ABANDONED_SECONDS = 24 * 3600


class DamagedCache(Exception):  # noqa: N818 (not an error of the user: the cache is built again)
    """Difference between a directory and what was published; the message says which."""


@dataclass(frozen=True)
class TokenSplit:
    """Tokens of N texts, end to end: text i is `tokens[offsets[i]:offsets[i + 1]]`, never empty."""

    name: str
    tokens: NDArray[Any]
    """uint16, or int32 for vocabularies above 65,536; memory-mapped, read-only."""
    offsets: Ints
    """int64, shape (N + 1,)."""
    labels: Ints
    """int64 class indices, shape (N,)."""
    num_truncated: int
    """Texts that were longer than the maximum length."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Ints:
        """Tokens per text, int64, shape (N,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class CachedTokens:
    """Content of one cache."""

    splits: Mapping[str, TokenSplit]
    class_names: tuple[str, ...]
    findings: tuple[DataFinding, ...]
    """Findings about the data, emitted when it was tokenised and at every opening."""
    files: tuple[str, ...]
    """Files of the rows that the findings name."""


def read_or_build(directory: Path, build: Callable[[Path], CachedTokens], emit: Emit) -> tuple[CachedTokens, bool]:
    """Read a cache; if it is missing or damaged, one process builds it while the others wait for the lock and say so.

    A builder that is suspended or gone is not waited for: publishing is atomic, so two builders do no harm.

    `build` may write token files to the directory that it gets (see `TokenWriter`). Returns (content, whether it was found).

    Raises:
        DataError: no valid cache exists and none can be written.
    """
    root = directory.parent
    with suppress(FileNotFoundError, DamagedCache):
        return read_tokens(directory), True
    try:
        with ExitStack() as stack:
            try:
                root.mkdir(parents=True, exist_ok=True)
                say = partial(_warn, emit)
                stack.enter_context(locked_or_bypassed(_lock_of(directory), f"token cache {directory}", say))
            except OSError as unwritable:
                # A valid cache of another user may be read-only.
                try:
                    return read_tokens(directory), True
                except (FileNotFoundError, DamagedCache):
                    raise unwritable from None
            try:
                return read_tokens(directory), True
            except (FileNotFoundError, DamagedCache) as fault:
                if isinstance(fault, DamagedCache):
                    emit(Warned(message=f"token cache {directory} is damaged ({fault}): building it again."))
                publish(directory, lambda building: write_tokens(building, build(building), directory.name))
                return read_tokens(directory), False
    except (OSError, DamagedCache) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"token cache {root} cannot be written: {reason}. Set --data.cache_dir to a writable directory with free space, or "
            "build it there with 'python -m agnews_dist prepare'."
        ) from error


def _warn(emit: Emit, message: str) -> None:
    emit(Warned(message=message))


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Publish the files that `write` creates in a new directory, whole or not at all; remove leftovers of killed builders.

    The caller holds the lock and found no valid cache at `directory`.
    """
    for leftover in directory.parent.glob(f"{directory.name}{_BUILDING}*"):
        if is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    # Not tempfile: its directories are private to one user, and a cache may be shared.
    owner = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    building = directory.with_name(f"{directory.name}{_BUILDING}{owner}")
    atomic.sweep(directory.parent, directory.name)
    with atomic.new_directory(directory, staging=building):
        write(building)


def is_abandoned(building: Path) -> bool:
    """Return whether the process in the name is dead. On another node, which locks may not reach, only the age is known."""
    node, pid, _ = building.name.split(_BUILDING)[1].rsplit("-", 2)
    if node != platform.node():
        return time.time() - building.stat().st_mtime > _ABANDONED_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(pid) == os.getpid()


def write_tokens(directory: Path, tokens: CachedTokens, key: str) -> None:
    """Write the arrays and then `meta.json`, which holds the checksums of the arrays and of itself."""
    files: dict[str, str] = {}
    for split in tokens.splits.values():
        for array in _ARRAYS:
            file = directory / f"{split.name}-{array}.npy"
            if not file.exists():  # not written by a TokenWriter
                np.save(file, getattr(split, array))
            files[file.name] = _sha256(file)
    content = {
        "format": FORMAT,
        "key": key,
        "class_names": tokens.class_names,
        "findings": [asdict(finding) for finding in tokens.findings],
        "source_files": tokens.files,
        "splits": {
            split.name: {"texts": len(split), "tokens": len(split.tokens), "num_truncated": split.num_truncated}
            for split in tokens.splits.values()
        },
        "files": files,
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "numpy")},
    }
    meta = {"content": content, "sha256": hash_json(content)}
    (directory / _META).write_text(json.dumps(meta, indent=1, allow_nan=False), encoding="utf-8")


class TokenWriter:
    """Writer of the tokens of one split, piece by piece: those of ten million texts do not fit in memory."""

    def __init__(self, directory: Path, split: str, dtype: Any) -> None:
        """Begin the file `<split>-tokens.npy`."""
        self._path, self._dtype = directory / f"{split}-tokens.npy", np.dtype(dtype)
        self._num_tokens = 0
        self._file = self._path.open("w+b")
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header, so that a longer count takes no more space.
        fields = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._num_tokens,)}
        np.lib.format.write_array_header_1_0(self._file, fields)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tokens: NDArray[Any]) -> None:
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._num_tokens += len(tokens)

    def finish(self) -> NDArray[Any]:
        """Complete the file; return its tokens, memory-mapped."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        return np.load(self._path, mmap_mode="r")


def read_tokens(directory: Path) -> CachedTokens:
    """Open a published cache, verified and with its tokens memory-mapped.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedCache: a file is missing, changed, cut off or has another format.
    """
    if not directory.exists():
        raise FileNotFoundError(directory)
    try:
        meta = cast(dict[str, Any], json.loads((directory / _META).read_text(encoding="utf-8")))
        content = meta["content"]
        if meta["sha256"] != hash_json(content):
            raise DamagedCache(f"{_META} was changed")
        if (content["format"], content["key"]) != (FORMAT, directory.name):
            raise DamagedCache(f"{_META} belongs to other data or another version")
        for name, sha256 in content["files"].items():
            if _sha256(directory / name) != sha256:
                raise DamagedCache(f"{name} has another checksum than when it was written")
        splits = {
            name: TokenSplit(
                name,
                np.load(directory / f"{name}-tokens.npy", mmap_mode="r"),
                np.load(directory / f"{name}-offsets.npy"),
                np.load(directory / f"{name}-labels.npy"),
                facts["num_truncated"],
            )
            for name, facts in content["splits"].items()
        }
        with suppress(OSError):
            os.utime(directory)  # the last use, for lists
        # Caches of before have no findings.
        findings = [DataFinding(**each) for each in content.get("findings", [])]
        return CachedTokens(splits, tuple(content["class_names"]), tuple(findings), tuple(content.get("source_files", [])))
    except FileNotFoundError as error:
        raise DamagedCache(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Foreign or partly written files can also be valid JSON of another shape.
        raise DamagedCache(f"{_META} or an array cannot be read: {type(error).__name__}: {error}") from error


def describe(directory: Path) -> Mapping[str, Any]:
    """Read the content of `meta.json` unverified, for a list; empty if it cannot be read."""
    try:
        content = json.loads((directory / _META).read_bytes())["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(content: object) -> str:
    """Hash a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class TokenCache:
    """State of one cache on disk, or of the leftovers of a killed builder."""

    key: str
    path: Path
    about: Mapping[str, Any]
    """Content of its meta.json; empty while it is built, or if it cannot be read."""
    disk_bytes: int
    last_used: float
    """Seconds since 1970."""
    is_used: bool
    """Being built now. After opening it, a job has the tokens mapped and no longer needs the files."""


def list_token_caches(root: Path) -> list[TokenCache]:
    """List the caches below `root`, longest unused first; none if `root` is not a directory."""
    try:
        keys = {path.name.partition(_BUILDING)[0] for path in root.iterdir() if path.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: list[TokenCache] = []
    for key in filter(_KEY.fullmatch, keys):
        path = root / key
        with suppress(FileNotFoundError):  # removed or published in the meantime
            if parts := _directories(path):
                size, last_used = sum(map(used_disk_bytes, parts)), max(part.stat().st_mtime for part in parts)
                found.append(TokenCache(key, path, describe(path), size, last_used, is_locked(_lock_of(path))))
    return sorted(found, key=lambda cache: (cache.last_used, cache.key))


def remove_token_cache(path: Path) -> bool:
    """Remove a cache unless it is being built or opened; returns whether it is gone.

    Raises:
        OSError: this user may not remove it.
    """
    lock = try_lock(_lock_of(path))
    if lock is None:
        return False
    try:
        for part in _directories(path):
            if part == path or is_abandoned(part):
                shutil.rmtree(part)
        return not _directories(path)
    finally:
        lock.close()


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _directories(path: Path) -> list[Path]:
    """List the published directory and those of builders."""
    return [part for part in (path, *path.parent.glob(f"{path.name}{_BUILDING}*")) if part.is_dir()]
