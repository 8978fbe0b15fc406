"""Sweeper: keeps a shared directory within its size. One owner at a time, by a lease file."""

from __future__ import annotations

import contextlib
import logging
import os
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

    Raises OSError.
    """
    now = _take_lease(root)
    if now is None:
        return 0
    try:
        records: list[tuple[float, int, str]] = []
        num_removed = 0
        for entry in _files(root):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(TEMPORARY):
                if now - status.st_mtime > _ABANDONED_S:
                    _remove(entry.path)
            elif len(entry.name) == 32:
                records.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in records)
        if total <= most_bytes:
            return 0
        for _, size, path in sorted(records):
            if total <= _ROOM * most_bytes or must_end():
                break
            _remove(path)
            total -= size
            num_removed += 1
        return num_removed
    finally:
        _remove(str(root / _LEASE))


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
                probe.touch()
                age_s = probe.stat().st_mtime - path.stat().st_mtime
            except FileNotFoundError:  # the owner has just ended its sweep
                age_s = 0.0
            finally:
                _remove(str(probe))
            if age_s < _LEASE_S:
                return None
            _remove(str(path))
    return None


def _files(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield all files below the folders of this and other formats; a folder that goes meanwhile has none."""
    folders = [str(path) for path in root.glob("tkv*") if path.is_dir()]
    while folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
