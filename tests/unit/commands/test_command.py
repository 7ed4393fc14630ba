"""Frame around commands: imports without garbage collection."""

import gc

import pytest

from agnews_dist.commands.command import importing


def test_importing_pauses_garbage_collection_and_excludes_what_was_imported() -> None:
    def import_and_fail() -> None:
        with importing():
            assert not gc.isenabled()
            raise ImportError

    before = gc.get_freeze_count()
    with pytest.raises(ImportError):
        import_and_fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
