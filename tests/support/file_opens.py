"""How often files are opened, by this process or by ranks: told by Python's audit events, so no code under test is touched."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_listening: list[Counter[Path]] = []
_RECORDER = """
import os, runpy, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

def record(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        os.write(log, arguments[0].encode() + b"\\n")  # appended whole, whoever else writes

sys.addaudithook(record)
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        for counter in _listening:
            counter[Path(arguments[0])] += 1


@contextmanager
def opens() -> Iterator[Counter[Path]]:
    """Path -> number of times that this process opened it in the `with` block."""
    _install()
    counter: Counter[Path] = Counter()
    _listening.append(counter)
    try:
        yield counter
    finally:
        _listening[:] = [other for other in _listening if other is not counter]


@cache
def _install() -> None:
    sys.addaudithook(_hear)  # for good: there is no way to remove one


def recording(log: Path, module: str) -> tuple[str, ...]:
    """What `python` is given to run `module`, with every open file in `log`; its own arguments follow."""
    return ("-c", _RECORDER, os.fspath(log), module)


def recorded(log: Path) -> Counter[Path]:
    """Path -> number of times that the processes opened it, all together."""
    return Counter(map(Path, log.read_text(encoding="utf-8").splitlines()))
