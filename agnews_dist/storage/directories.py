"""Directories: paths as users write them, the root of all caches, a home, the space that one takes or that is free below one.

`python -m agnews_dist.storage.directories PATH` prints a path with its variables replaced, for scripts.
"""

import os
import pwd
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 512
"""Unit of `st_blocks`, whatever the file system's own block size (POSIX)."""


def expand_path(text: str) -> str:
    """Replace `$NAME` and `${NAME}`, and `~` or `~user` at the start. `$$` is a dollar sign.

    Raises:
        ValueError: a variable is not set or empty, a user does not exist, or a $ or NUL means nothing.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1].strip("{}")
        if not name:
            raise ValueError("a $ without a name. Write $NAME or ${NAME}, or $$ for a dollar sign.")
        if name != "$" and not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            raise ValueError(f"the variable {name!r} is {state}. Set it, or write $$ for a dollar sign.")
        return "$" if name == "$" else os.environ[name]

    if "\0" in text:
        raise ValueError("a path has no NUL character. Remove it.")
    path = re.sub(r"\$(\$|\w+|\{\w+\}|)", value_of, text)
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        user = path.partition("/")[0][1:]
        raise ValueError(f"the user {user!r} does not exist. Write the path itself, or ./~ for a name.") from None


def check_directory_name(text: str) -> str:
    """Return the text if it names a directory inside of another.

    Raises:
        ValueError: it does not.
    """
    if not text or Path(text).name != text or text == ".." or not text.isprintable():
        raise ValueError("it must be a plain directory name. Use letters, digits, '-', '_' and '.'; run.dir sets the place.")
    return text


def cache_root(cache_dir: Path | str | None) -> Path:
    """Return the directory of all caches.

    It is `cache_dir` if that is set, else $XDG_CACHE_HOME/agnews_dist, else ~/.cache/agnews_dist.
    """
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agnews_dist"


def provide_home() -> None:
    """Set HOME and LOGNAME for a user without an entry in the password database, as in containers with a random user id.

    Without them libraries write to a directory that is called `~`, or fail. HOME is then one below the temporary directory.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", str(os.getuid()))
        if not os.environ.get("HOME"):
            home = Path(tempfile.gettempdir()) / f"agnews_dist-home-{os.getuid()}"
            with suppress(OSError):
                home.mkdir(mode=0o700)
            is_own = home.is_dir() and home.stat().st_uid == os.getuid()
            os.environ["HOME"] = str(home) if is_own else tempfile.mkdtemp(prefix="agnews_dist-home-")


def used_disk_bytes(directory: Path) -> int:
    """Return what the entries below `directory` take on disk; reserved space counts, holes do not.

    Raises:
        FileNotFoundError: an entry was removed meanwhile.
    """
    return sum(path.lstat().st_blocks * BLOCK_BYTES for path in directory.rglob("*"))


def free_disk_bytes(directory: Path) -> int:
    """Return the free space where `directory` is or would be created; 0 if that is unknown."""
    from shutil import disk_usage  # late: it imports three compressors, and every command imports this module

    for parent in (directory, *directory.absolute().parents):
        try:
            return disk_usage(parent).free
        except (FileNotFoundError, NotADirectoryError):
            # Tried rather than checked first: another process may remove the directory in between.
            continue
        except OSError:
            return 0
    return 0


if __name__ == "__main__":
    try:
        print(expand_path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {sys.argv[1]}: {error}")
