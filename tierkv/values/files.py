"""Open files safely at paths that another program may have prepared.

A path in a shared directory may name a device, a directory or another user's symbolic link. It may name a FIFO, and to
open a FIFO may wait for ever. tierkv opens every path that it gets from its user by these functions.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tierkv.errors import ConfigError, StoreError, TierKVError

__all__ = [
    "check_path",
    "home_directory",
    "open_regular",
    "read_text",
    "read_whole",
    "translated_errors",
    "user_path",
    "write_whole",
]

_READ_BYTES = 1 << 20

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
    """Return a valid path. Raises ConfigError for an empty one, a NUL byte, or text that the system cannot encode."""
    try:
        encoded = os.fsencode(path)
    except (UnicodeError, TypeError) as exc:
        raise ConfigError(f"{path!a} is not a path") from exc
    if not encoded or b"\0" in encoded:
        raise ConfigError(f"{path!a} is not a path")
    return Path(os.fsdecode(encoded))


def home_directory(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the user's home: HOME if it is absolute, else that of the password file; None if there is neither."""
    named = environment.get("HOME", "")
    if os.path.isabs(named):
        return Path(named)
    try:
        known = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a container may run as an unknown user id
        return None
    return Path(known) if os.path.isabs(known) else None


def user_path(path: str | os.PathLike[str], environment: Mapping[str, str] = os.environ) -> Path:
    """Return a path of an option or environment variable, with a leading ~ or ~name expanded.

    Raises ConfigError for an invalid path, a ~ without a home directory, and an unknown user name.
    """
    check_path(path)
    text = os.fspath(path)
    result = Path(text)
    if text.startswith("~"):
        name, _, rest = text[1:].partition("/")
        result = _home_of(name, text, environment) / rest.lstrip("/")
    if str(result).startswith("~"):  # from ./~: a second expansion must not change it
        result = Path(os.getcwd()) / result
    return result


def _home_of(name: str, text: str, environment: Mapping[str, str]) -> Path:
    if not name:
        home = home_directory(environment)
        if home is None:
            raise ConfigError(f"{text}: this user has no home directory", hint="set HOME, or write the whole path")
        return home
    try:
        return Path(pwd.getpwnam(name).pw_dir)
    except (KeyError, UnicodeError) as exc:
        raise ConfigError(f"{text}: there is no user {name}", hint="./ in front makes it a file's name") from exc


def read_whole(path: str | os.PathLike[str], *, limit_bytes: int) -> bytes:
    """Return all bytes of a file, a pipe or a device, for example of /dev/stdin or a shell's <(command).

    Waits while a writer has the pipe open. A FIFO without a writer is empty.
    Raises OSError, and ConfigError for an invalid path or more than limit_bytes.
    """
    return b"".join(_read_pieces(path, limit_bytes))


def _read_pieces(path: str | os.PathLike[str], limit_bytes: int) -> Iterator[bytes]:
    size = 0
    fd = os.open(check_path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        while True:
            try:
                piece = os.read(fd, _READ_BYTES)
            except BlockingIOError:
                waiting = select.poll()
                waiting.register(fd, select.POLLIN)
                waiting.poll()
                continue
            if not piece:
                return
            size += len(piece)
            if size > limit_bytes:
                raise ConfigError(f"{path} has more than {limit_bytes >> 20} MiB")
            yield piece
    finally:
        os.close(fd)


def read_text(path: str | os.PathLike[str], *, limit_bytes: int) -> str:
    """Return a UTF-8 text without its byte order mark; it is read as by `read_whole`.

    Raises ConfigError, in one line, for a file that cannot be read, and for one that is not text, with its line number.
    A binary file is refused at its first zero byte, however long it is.
    """
    pieces: list[bytes] = []
    try:
        for piece in _read_pieces(path, limit_bytes):
            if not pieces and piece.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ConfigError(f"{path} is UTF-16, not UTF-8 text")
            if b"\0" in piece:
                raise ConfigError(f"{path} is a binary file, not text")
            pieces.append(piece)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    raw = b"".join(pieces)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        place = f"byte {exc.start} (0x{raw[exc.start]:02x}), in line {line}"
        raise ConfigError(f"{path} is not UTF-8 text: {place}, cannot be read") from exc


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, or to a pipe or a device. A FIFO without a reader is refused at once.

    Raises OSError, and ConfigError for an invalid path.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(check_path(path), flags, 0o666)
    with os.fdopen(fd, "wb") as file:
        os.set_blocking(fd, True)
        file.write(data)


def open_regular(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    *,
    mode: int = 0o600,
    follow_links: bool = True,
    own: bool = False,
) -> int:
    """Open a regular file and return its descriptor, not inheritable. A FIFO is refused at once.

    flags: of os.open; O_TRUNC takes effect only after the checks. mode: of a file that O_CREAT makes.
    follow_links: False refuses a symbolic link as the last part of the path, where others can write.
    own: refuses a file of another user, and one with more than one name (a hard link to another user's file).
    Raises StoreError for a file that is refused, OSError if it cannot be opened, ConfigError for an invalid path.
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
def translated_errors(what: str, *others: type[Exception]) -> Iterator[None]:
    """Translate errors of the system, of numpy and of Python's memory to a StoreError that begins with `what`.

    others: errors of other libraries, translated too. Errors of tierkv pass unchanged.
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
