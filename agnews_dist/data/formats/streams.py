"""Bytes and lines of a file: decompressed by its suffix, decoded strictly as UTF-8, or as UTF-16 or UTF-32 with a mark."""

import codecs
import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from agnews_dist.errors import DataError, UserError

COMPRESSIONS = (".gz", ".zst", ".zip", ".bz2", ".xz")
"""Suffixes of compressed files."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_READ_BYTES = 1 << 18


def split_suffix(path: Path) -> tuple[str, str]:
    """Return (suffix of the format, suffix of the compression or ""), in lower case.

    >>> split_suffix(Path("News.CSV.gz")), split_suffix(Path("part-0.snappy.parquet"))
    (('.csv', '.gz'), ('.parquet', ''))
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


@contextmanager
def open_bytes(path: Path, name: str) -> Generator[BinaryIO]:
    """Open a file to read, decompressed if its suffix says so.

    Raises:
        DataError: the file cannot be read or decompressed; also while it is read inside the block.
    """
    try:
        with _open(path, name) as file:
            yield file
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise _describe(error, path, name) from error


def _open(path: Path, name: str) -> BinaryIO:
    compression = split_suffix(path)[1]
    if compression == ".gz":
        import gzip

        return cast(BinaryIO, gzip.open(path))
    if compression == ".bz2":
        import bz2

        return cast(BinaryIO, bz2.open(path))
    if compression == ".xz":
        import lzma

        return cast(BinaryIO, lzma.open(path))
    if compression == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(_Raw(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")), _READ_BYTES))
    if compression == ".zip":
        return _open_zip(path, name)
    return path.open("rb", buffering=_READ_BYTES)


class _Raw(io.RawIOBase):
    """A stream of pyarrow as a raw stream of Python: its own is slow at reading lines."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer as far as possible."""
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _open_zip(path: Path, name: str) -> BinaryIO:
    import zipfile

    archive = zipfile.ZipFile(path)
    members = [info for info in archive.infolist() if not info.is_dir() and not is_hidden(Path(info.filename))]
    if len(members) != 1:
        names = ", ".join(info.filename for info in members[:5]) or "none"
        raise DataError(
            f"{name} is an archive of {len(members)} files ({names}): a compressed file holds one. Unpack it, and give the "
            "directory."
        )
    return cast(BinaryIO, archive.open(members[0]))


def is_hidden(path: Path) -> bool:
    """Return whether a file or one of its folders is hidden: macOS, office programs and Spark leave such files next to data."""
    return any(part.startswith((".", "_", "~$")) for part in path.parts if part not in (".", ".."))


def _describe(error: Exception, path: Path, name: str) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0].rstrip(".") or type(error).__name__
    if isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read: {reason}. Check its permissions.")
    if split_suffix(path)[1]:
        return DataError(f"{name} cannot be decompressed ({reason}): it is damaged, or its suffix is wrong. Copy it again.")
    return DataError(f"{path} cannot be read: {reason}. Check the path and its permissions.")


def read_lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file, which end in a line feed (the last one perhaps not), without a byte order mark.

    Raises:
        DataError: the file cannot be read, or is not the text that its first bytes promise; names the line.
    """
    with open_bytes(path, name) as file:
        yield from split_lines(file, name)


def split_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of an open file or stream; see `read_lines`."""
    head = file.read(4096)
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    if encoding != "utf-8":
        yield from _decode_wide(codecs.getincrementaldecoder(encoding)(), head, file, name, encoding)
        return
    if _looks_like_utf16(head):
        raise DataError(
            f"{name} has a NUL as every second byte: it is probably UTF-16 without a byte order mark. "
            "Save it as UTF-8, "
            "for example with 'iconv -f UTF-16LE -t UTF-8'."
        )
    yield from _decode_lines(_join_lines(io.BytesIO(head), file, skip=len(mark)), name)


def _looks_like_utf16(head: bytes) -> bool:
    """Return whether the text is UTF-16 without a mark: among letters of Europe, every second byte is NUL."""
    few, many = sorted((head[::2].count(0), head[1::2].count(0)))
    return len(head) >= 8 and many > 0.15 * len(head) and few < 0.1 * many


def _join_lines(head: BinaryIO, file: BinaryIO, *, skip: int) -> Iterator[bytes]:
    """Yield the lines of the beginning, already read, and of the rest."""
    head.seek(skip)
    for line in head:
        yield line if line.endswith(b"\n") else line + file.readline()
    yield from file


def _decode_lines(lines: Iterator[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name} line {number} has the byte 0x{line[error.start]:02x}, which is not valid UTF-8: text must be UTF-8. "
                "Save the file as UTF-8, for example with 'iconv -f WINDOWS-1252 -t UTF-8'."
            ) from error


def _decode_wide(decoder: codecs.IncrementalDecoder, head: bytes, file: BinaryIO, name: str, encoding: str) -> Iterator[str]:
    """Decode UTF-16 or UTF-32 block by block and yield its lines."""
    line_number, pending, block = 1, "", head
    while True:
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name} near line {line_number} is not valid {encoding.upper()}, which its first bytes promise: "
                "it is damaged. "
                "Save it again as UTF-8."
            ) from error
        *lines, pending = (pending + text).split("\n")
        for line in lines:
            line_number += 1
            yield f"{line}\n"
        if not block:
            break
        block = file.read(_READ_BYTES)
    if pending:
        yield pending
