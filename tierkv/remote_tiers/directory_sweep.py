"""Sweeper: keeps a shared directory within its size. One owner at a time, by a lease file."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["TEMPORARY", "Sweeper"]

_log = logging.getLogger(__name__)

TEMPORARY = ".writing-"
"""How the name of a file begins that is not whole yet."""
_LEASE = ".sweep-lease"
_LEASE_S = 600.0
_ABANDONED_S = 3600.0  # so old is a file of a writer that has died
_ROOM = 0.9  # a sweep leaves so much of the size, so that the next one is not due at once
_FIRST_SHARE = 64  # of the size is written by this process before it looks again
_FOLDERS = re.compile(r"tkv[0-9]+(/[0-9a-f]{32}(/[0-9a-f]{2})?)?")
_RECORD = re.compile(r"tkv[0-9]+/[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{32}")
_GONE = (FileNotFoundError, NotADirectoryError, PermissionError)


class Sweeper:
    """Removes the files that were used longest ago once all files take more than `most_bytes`.

    The thread starts with the first written record. A machine that holds the lease sweeps alone; two that take it at
    the same moment remove the same files. The file server's clock decides: machines may disagree.
    """

    def __init__(self, root: Path, *, most_bytes: int) -> None:
        self._root = root
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._num_written = most_bytes  # the first write is a reason to look
        self._due = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def note_written(self, num_bytes: int) -> None:
        """Record what was written; have the thread sweep where that is due. Returns at once."""
        with self._lock:
            self._num_written += num_bytes
            if self._num_written < self._most_bytes // _FIRST_SHARE or self._is_closed:
                return
            self._num_written = 0
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tierkv-remote-sweep", daemon=True)
                self._thread.start()
        self._due.set()

    def close(self) -> None:
        """End the thread after its sweep. Returns at once: a sweep of a file server that is gone never ends."""
        with self._lock:
            self._is_closed = True
        self._due.set()

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._is_closed:
                return
            try:
                sweep(self._root, most_bytes=self._most_bytes, must_end=lambda: self._is_closed)
            except OSError as exc:
                _log.warning("the shared directory %s was not swept: %s", self._root, exc.strerror)


def sweep(root: Path, *, most_bytes: int, must_end: Callable[[], bool] = lambda: False) -> int:
    """Remove files until the rest takes less than `most_bytes`. Return how many; 0 where another owner sweeps.

    Only files at the place of a record or of an unfinished file are counted and removed, and no symbolic link is
    followed: others may write in the directory, and must not say what this process removes. Raises OSError.
    """
    now = _take_lease(root)
    if now is None:
        return 0
    try:
        with _folder(root) as folder:
            return _sweep(folder, now, most_bytes, must_end)
    finally:
        _remove(str(root / _LEASE))


def _sweep(root: int, now: float, most_bytes: int, must_end: Callable[[], bool]) -> int:
    records: list[tuple[float, int, str]] = []
    for path, status in _files(root, ""):
        if path.rpartition("/")[2].startswith(TEMPORARY):
            if abs(now - status.st_mtime) > _ABANDONED_S:
                _remove_below(root, path)
        elif _RECORD.fullmatch(path):
            records.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in records)
    if total <= most_bytes:
        return 0
    num_removed = 0
    for _, size, path in sorted(records):
        if total <= _ROOM * most_bytes or must_end():
            break
        if _remove_below(root, path):
            total -= size
            num_removed += 1
    return num_removed


def _take_lease(root: Path) -> float | None:
    """Create the lease file and return the file server's time; None where another owner has one that is not old."""
    path = root / _LEASE
    for _ in range(2):
        try:
            with open(path, "xb") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}\n".encode())
                file.flush()
                return os.fstat(file.fileno()).st_mtime
        except FileExistsError:
            probe = root / f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
            try:
                with open(probe, "xb") as file:
                    age_s = os.fstat(file.fileno()).st_mtime - path.lstat().st_mtime
            except FileNotFoundError:  # the owner has just ended its sweep
                age_s = 0.0
            finally:
                _remove(str(probe))
            if abs(age_s) < _LEASE_S:  # of a time to come: the file server's clock was wrong
                return None
            _remove(str(path))
    return None


def _files(folder: int, place: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and state of all files in the folders that records of this and other formats have.

    What goes meanwhile, and what this process may not look into, has no files.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(*_GONE):
                path = place + entry.name
                if entry.is_file(follow_symlinks=False):
                    yield path, entry.stat(follow_symlinks=False)
                elif entry.is_dir(follow_symlinks=False) and _FOLDERS.fullmatch(path):
                    with _folder(entry.name, folder) as below:
                        yield from _files(below, f"{path}/")


def _remove_below(root: int, path: str) -> bool:
    """Remove a file; follow no symbolic link on the way to it. Return whether it is gone."""
    *folders, name = path.split("/")
    with contextlib.ExitStack() as opened:
        try:
            for each in folders:
                root = opened.enter_context(_folder(each, root))
            os.unlink(name, dir_fd=root)
        except FileNotFoundError:
            return True
        except OSError as exc:
            _log.debug("%s cannot be removed: %s", path, exc.strerror)
            return False
    return True


@contextlib.contextmanager
def _folder(path: str | Path, parent: int | None = None) -> Iterator[int]:
    """Open a folder, and in a parent folder no symbolic link to one. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if parent is None else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
