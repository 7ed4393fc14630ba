"""Hugging Face libraries: silent inside a block, unchanged after it; their exceptions become errors of the package."""

import logging

import pytest
from transformers.utils import logging as transformers_logging

from agnews_dist.data.hugging_face import silence_transformers, translate_errors
from agnews_dist.errors import DataError


def state_of_transformers() -> tuple[int, bool]:
    return transformers_logging.get_verbosity(), not transformers_logging.is_progress_bar_enabled()


def test_silence_hides_logs_and_bars_and_restores_them() -> None:
    before = state_of_transformers()
    inside = []

    def fail() -> None:
        with silence_transformers():
            inside.append(state_of_transformers())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(logging.CRITICAL, True)]
    assert state_of_transformers() == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("no such file.\nmore"), "OSError: no such file"), (RuntimeError(""), "RuntimeError: no details")],
)
def test_translate_errors_gives_type_and_first_line(error: Exception, reason: str) -> None:
    def make_error(found: str) -> DataError:
        return DataError(f"x cannot be read: {found}. Check it.")

    with pytest.raises(DataError, match=f"^x cannot be read: {reason}. Check it.$") as caught, translate_errors(make_error):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [DataError("x: wrong. Fix it."), MemoryError(), RuntimeError("std::bad_alloc")])
def test_translate_errors_passes_user_and_memory_errors(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, translate_errors(DataError):
        raise error
    assert caught.value is error
