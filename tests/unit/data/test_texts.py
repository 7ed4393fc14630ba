"""Texts as bytes: the same in memory and in a file, and a file that cannot be written is an error."""

import resource
from pathlib import Path

import numpy as np
import pytest

from agnews_dist.data import texts as module
from agnews_dist.data.texts import Texts, TextWriter
from agnews_dist.errors import DataError

WORDS = ["", "a", "é😀", "line\nbreak", "\0", " spaces "]


def written(texts: list[str], directory=None) -> Texts:
    writer = TextWriter(directory)
    for text in texts:
        writer.add(text.encode())
    return writer.finish()


@pytest.mark.parametrize("memory_bytes", [1 << 26, 10])
def test_texts_are_the_same_in_memory_and_in_a_file(tmp_path, monkeypatch, memory_bytes):
    monkeypatch.setattr(module, "MEMORY_BYTES", memory_bytes)
    expected = [WORDS[i % len(WORDS)] + str(i) for i in range(2500)]
    texts = written(expected, tmp_path / "new")
    assert list(texts) == expected
    assert texts[7:9] == expected[7:9]
    assert [texts.encoded(i).decode() for i in range(len(texts))] == expected
    ids = np.array([2400, 3, 3])
    assert list(texts.take(ids)) == [expected[i] for i in ids]
    assert not list(tmp_path.glob("new/*"))  # the file has no name


def test_a_file_that_cannot_grow_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(DataError, match=r"texts of 0\.0 GB cannot be kept in .*: File too large\. .* --data\.cache_dir"):
            written(["text"] * 1000, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_directory_that_cannot_be_written_is_not_used(monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 10)
    # Not even root can write there.
    assert list(written(WORDS * 9, Path("/proc/nowhere"))) == WORDS * 9
