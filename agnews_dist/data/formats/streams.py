"""Bytes and lines of a file: decompressed by its suffix, decoded strictly as UTF-8, or as UTF-16 or UTF-32 with a mark."""

import codecs
import io
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from agnews_dist.errors import DataError, UserError

COMPRESSIONS = (".gz", ".zst", ".zip", ".bz2", ".xz")
"""Suffixes of compressed files."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_READ_BYTES = 1 << 18
MAX_LINE = 1 << 27
"""Characters of a line, or of a row of several lines, that are read at most: a damaged file does not fill the memory."""
_FOREIGN = {
    b"\x1f\x8b": ("holds gzip data", "Add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("holds zstd data", "Add .zst to its name"),
    b"PK\3\4": ("is a zip archive or an Excel sheet", "Unpack it, or save the sheet as csv"),
    b"\xd0\xcf\x11\xe0": ("is an Excel sheet", "Save it as csv"),
    b"PAR1": ("holds parquet data", "Let it end in .parquet"),
    b"PARE": ("is encrypted", "Write it again without encryption"),
    b"ARROW1": ("holds arrow data", "Let it end in .arrow"),
    b"FEA1": ("has version 1 of Feather", "Write it again with version 2"),
    b"%PDF": ("is a PDF document", "Extract its texts"),
    b"version https://git-lfs": ("is a pointer of Git LFS", "Run 'git lfs pull'"),
    b"<!doctype html": ("is a web page", "Download the file itself"),
    b"<html": ("is a web page", "Download the file itself"),
}
"""First bytes of files that are not what their name says -> (what they are, the way out)."""


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
    if compression in (".bz2", ".xz"):
        import bz2
        import lzma

        make = bz2.BZ2Decompressor if compression == ".bz2" else partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
        return cast(BinaryIO, io.BufferedReader(_Decompressed(path, make), _READ_BYTES))
    if compression == ".zst":
        import pyarrow as pa

        # pyarrow's own stream is slow at reading lines.
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), _READ_BYTES))
    if compression == ".zip":
        return _open_zip(path, name)
    return path.open("rb", buffering=_READ_BYTES)


class _Decompressed(io.RawIOBase):
    """A file of bz2 or xz streams. Python's own readers ignore whatever follows the first one and is not another one."""

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self._file, self._make = path.open("rb"), make
        self._stream = make()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while True:
            content = b""
            if self._stream.eof:
                # Zeros between streams are padding.
                content = self._stream.unused_data.lstrip(b"\0")
                while not content:
                    block = self._file.read(_READ_BYTES)
                    if not block:
                        return 0
                    content = block.lstrip(b"\0")
                self._stream = self._make()
            elif self._stream.needs_input and not (content := self._file.read(_READ_BYTES)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            found = self._stream.decompress(content, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)


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
    if members[0].flag_bits & 1:
        raise DataError(f"{name} is protected by a password: it cannot be read. Unpack it, and name the unpacked file.")
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


def check_content(head: bytes, name: str, *, own: tuple[bytes, ...] = ()) -> None:
    """Check that the first bytes of a file are not those of another kind of file; `own`: those that its name promises.

    Raises:
        DataError: they are; says which.
    """
    for mark, (what, fix) in _FOREIGN.items():
        if mark not in own and head[: len(mark)].lower() == mark.lower():
            raise DataError(f"{name} {what}: that is not what its suffix says. {fix}.")


@contextmanager
def open_text(path: Path, name: str) -> Generator[TextIO]:
    """Open a text file to read, without a byte order mark; only a line feed ends a line.

    Raises:
        DataError: the file cannot be read, or is not the text that its first bytes promise; also inside the block.
    """
    with open_bytes(path, name) as file:
        head = file.read(4096)
    check_content(head, name)
    encoding = _find_encoding(head, name)
    with open_bytes(path, name) as file, io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            raise _describe_bytes(path, name, encoding) from error


def _describe_bytes(path: Path, name: str, encoding: str) -> DataError:
    """Find the line that cannot be decoded."""
    if encoding not in ("utf-8", "utf-8-sig"):
        return DataError(
            f"{name} is not valid {encoding.upper()}, which its first bytes promise: it is damaged. Save it again as UTF-8."
        )
    with open_bytes(path, name) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return _describe_byte(name, number, line, error)
    return DataError(f"{name} was changed while it was read. Start again once it is complete.")


def _describe_byte(name: str, number: int, line: bytes, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{name} line {number} has the byte 0x{line[error.start]:02x}, which is not valid UTF-8: text must be UTF-8. Save the "
        "file as UTF-8, for example with 'iconv -f WINDOWS-1252 -t UTF-8'."
    )


def _find_encoding(head: bytes, name: str) -> str:
    """Return the encoding of a text by its byte order mark; UTF-8 without one."""
    encoding = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and _looks_like_utf16(head):
        raise DataError(
            f"{name} has a NUL as every second byte: it is probably UTF-16 without a byte order mark. Save it as UTF-8, "
            "for example with 'iconv -f UTF-16LE -t UTF-8'."
        )
    return encoding


def read_lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file with their line feeds; the last one may have none.

    Raises:
        DataError: the file cannot be read, or is not the text that its first bytes promise; names the line.
    """
    with open_text(path, name) as file:
        yield from _bounded_lines(file.readline, name)


def split_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of a stream that can be read only once; see `read_lines`."""
    buffered = io.BufferedReader(cast(io.RawIOBase, file), _READ_BYTES)
    try:
        encoding = _find_encoding(buffered.peek(4096)[:4096], name)
        if not encoding.startswith("utf-8"):
            with io.TextIOWrapper(buffered, encoding=encoding, newline="\n") as text:
                yield from _bounded_lines(text.readline, name)
            return
        for number, line in enumerate(iter(partial(buffered.readline, MAX_LINE), b""), start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _describe_byte(name, number, line, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not valid {error.encoding}: it is damaged. Save it again as UTF-8.") from error
    finally:
        if not buffered.closed:
            buffered.detach()  # the stream is the caller's


def _bounded_lines(readline: Callable[[int], str], name: str) -> Iterator[str]:
    for line in iter(partial(readline, MAX_LINE), ""):
        if len(line) == MAX_LINE and not line.endswith("\n"):
            raise DataError(f"{name} has a line of more than {MAX_LINE:,} characters: a row is shorter. Correct the file.")
        yield line


def _looks_like_utf16(head: bytes) -> bool:
    """Return whether the text is UTF-16 without a mark: among letters of Europe, every second byte is NUL."""
    few, many = sorted((head[::2].count(0), head[1::2].count(0)))
    return len(head) >= 8 and many > 0.15 * len(head) and few < 0.1 * many
