"""Files at paths that another program may have prepared: opened without waiting, and only if they are what they seem.

A path in a shared directory may name a FIFO (opening it waits for ever), a device, a directory or another user's
symlink. Everything that tierkv opens by a path of its user goes through here.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import ConfigError, StoreError, TierKVError

__all__ = ["check_path", "open_regular", "own_errors"]

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a symbolic link"),
)

_FOREIGN: tuple[type[Exception], ...] = (ValueError, ArithmeticError, BufferError, struct.error, RecursionError)


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that the system can take. Raises ConfigError for a NUL or a text that the system cannot write."""
    try:
        encoded = os.fsencode(path)
    except (UnicodeError, TypeError) as exc:
        raise ConfigError(f"{path!a} is not a path") from exc
    if not encoded or b"\0" in encoded:
        raise ConfigError(f"{path!a} is not a path")
    return Path(os.fsdecode(encoded))


def open_regular(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    *,
    mode: int = 0o600,
    follow_links: bool = True,
    own: bool = False,
) -> int:
    """Open a regular file and return its descriptor, not inheritable. Never waits: a FIFO is refused at once.

    flags: of os.open; O_TRUNC is carried out only after the checks. mode: of a file that O_CREAT makes.
    follow_links: False refuses a symbolic link as the last part of the path: for directories that others write to.
    own: refuses a file of another user, or with more than one name (a hard link to somebody's file).
    Raises StoreError where the file is not what it should be, OSError where it cannot be opened, ConfigError for
    what is no path.
    """
    path = check_path(path)
    truncate = flags & os.O_TRUNC
    flags = (flags & ~os.O_TRUNC) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if not follow_links:
        flags |= os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, mode)
    except OSError as exc:
        kind = _kind_of(path, follow_links)
        if kind is not None:
            raise StoreError(f"{path} is {kind}, not a regular file") from exc
        raise
    try:
        state = os.fstat(fd)
        for is_kind, kind in _KINDS:
            if is_kind(state.st_mode):
                raise StoreError(f"{path} is {kind}, not a regular file")
        if own and (state.st_uid != os.geteuid() or state.st_nlink > 1):
            raise StoreError(f"{path} belongs to another user or has several names")
        if truncate:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def own_errors(what: str, *others: type[Exception]) -> Iterator[None]:
    """Raise a StoreError that begins with `what` in place of an error of the system, of numpy or of Python's memory.

    others: kinds of errors of other libraries that are to be translated too. What is tierkv's own passes as it is.
    """
    try:
        yield
    except TierKVError:
        raise
    except OSError as exc:
        raise StoreError(f"{what}: {exc.strerror or exc}") from exc
    except MemoryError as exc:
        raise StoreError(f"{what}: there is not enough memory") from exc
    except (*_FOREIGN, *others) as exc:
        raise StoreError(f"{what}: {exc}") from exc


def _kind_of(path: Path, follow_links: bool) -> str | None:
    try:
        mode = os.stat(path, follow_symlinks=follow_links).st_mode
    except (OSError, ValueError):
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)
