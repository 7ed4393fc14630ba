"""Hugging Face libraries: silent inside a block, unchanged after it; their exceptions become errors of the package."""

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from agnews_dist.data.hugging_face import silence_datasets, silence_transformers, translate_errors
from agnews_dist.errors import DataError


def state_of_datasets() -> tuple[int, bool]:
    return datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()


def state_of_transformers() -> tuple[int, bool]:
    return transformers_logging.get_verbosity(), not transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("silence", "state"),
    [(silence_datasets, state_of_datasets), (silence_transformers, state_of_transformers)],
    ids=["datasets", "transformers"],
)
def test_silence_hides_logs_and_bars_and_restores_them(silence, state) -> None:
    before = state()
    inside = []

    def fail() -> None:
        with silence():
            inside.append(state())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(datasets.logging.CRITICAL, True)]
    assert state() == before


def test_silence_datasets_can_keep_logs() -> None:
    verbosity, _ = state_of_datasets()
    with silence_datasets(logs=False):
        assert state_of_datasets() == (verbosity, True)


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


@pytest.mark.parametrize("error", [DataError("x: wrong. Fix it."), MemoryError()], ids=["user", "memory"])
def test_translate_errors_passes_user_and_memory_errors(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, translate_errors(DataError):
        raise error
    assert caught.value is error
