"""The log file of a detached daemon: it belongs to this user, and its size is bounded."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tierkv.errors import DaemonError, StoreError
from tierkv.values.files import open_regular

__all__ = ["MAX_LOG_BYTES", "BoundedHandler", "open_log", "trim_log"]

MAX_LOG_BYTES = 8 << 20
_KEPT_BYTES = 1 << 20  # the newest, when the log is cut


def open_log(path: Path) -> int:
    """Open a log to append to and to read from; return its descriptor. A log that is too long is cut first.

    Raises DaemonError for a symbolic link, for what is no regular file, and for a file of another user.
    """
    try:
        fd = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, follow_links=False, own=True)
    except StoreError as exc:
        raise DaemonError(f"the log cannot be used: {exc}", hint="remove it, or name another --socket") from exc
    except OSError as exc:
        raise DaemonError(f"the log {path} cannot be opened: {exc.strerror}") from exc
    trim_log(fd)
    return fd


def trim_log(fd: int, *, max_bytes: int = MAX_LOG_BYTES, kept_bytes: int = _KEPT_BYTES) -> None:
    """Cut a log that is longer than `max_bytes` down to its newest lines. fd: open to read and to append.

    The file stays the same, so processes that write to it continue. Nothing is renamed in a shared directory.
    """
    size = os.fstat(fd).st_size
    if size <= max_bytes:
        return
    newest = os.pread(fd, kept_bytes, size - kept_bytes)
    begin = newest.find(b"\n") + 1
    os.ftruncate(fd, 0)
    os.write(fd, b"(older lines were removed)\n" + newest[begin:])


class BoundedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, which is a file of `open_log`, and cuts that file when it is too long."""

    def __init__(self, *, max_bytes: int = MAX_LOG_BYTES, kept_bytes: int = _KEPT_BYTES) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._kept_bytes = kept_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        super().emit(record)
        try:
            trim_log(self.stream.fileno(), max_bytes=self._max_bytes, kept_bytes=self._kept_bytes)
        except (OSError, ValueError):
            self.handleError(record)
