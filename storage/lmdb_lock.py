"""Who uses an environment, and who writes: locks among processes, and a gate among the threads of one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import StoreBusyError, StoreError
from tierkv.storage.lmdb_file import LOCK_FILE

__all__ = ["Gate", "UserLock", "WriteLock", "reserve_lock_file"]

_WAIT_S = 10.0  # for another process that checks, repairs or compacts
_POLL_S = 0.01
_SHORTEST_POLL_S = 0.0005


class UserLock:
    """A file lock that every user of a store shares, and that one holds alone who replaces its data file.

    It dies with its process.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._store = path.parent
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as exc:
            raise StoreError(f"there is no cold store at {self._store}", hint="check the path") from exc
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc

    def enter(self) -> bool:
        """Take the lock, alone if nobody has it; return whether alone. Waits while somebody else is alone.

        Alone is tried first each time: whoever shares came after somebody who was alone and had a look.
        """
        deadline = time.monotonic() + _WAIT_S
        while True:
            if self._try(fcntl.LOCK_EX):
                return True
            if self._try(fcntl.LOCK_SH):
                return False
            if time.monotonic() > deadline:
                raise StoreError(
                    f"cold store {self._store} is being compacted or repaired", hint="try again when that is done"
                )
            time.sleep(_POLL_S)

    def share(self) -> None:
        """Let others in again."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def require_alone(self) -> None:
        """Hold the lock alone from now on. Raises StoreError, with the lock shared, if somebody else has it."""
        if not self._try(fcntl.LOCK_EX):
            self.share()  # a conversion that fails has dropped it
            raise StoreError(f"cold store {self._store} is open in another process", hint="close it there first")

    def close(self) -> None:
        """Give the lock up. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc
        return True


class WriteLock:
    """Whose turn it is to write, among threads and processes. Taken before LMDB's own lock, which knows no limit.

    It dies with its process, and a forked child does not have it. Closing any descriptor of its file gives it up, so
    that a process must have one object for it.
    """

    def __init__(self, path: Path) -> None:
        self._store = path.parent
        self._threads = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc

    @contextlib.contextmanager
    def held(self, wait_s: float) -> Iterator[None]:
        """Hold it. Raises StoreBusyError where somebody else still does after `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        if not self._threads.acquire(timeout=wait_s):
            raise self._busy(wait_s, "another thread")
        try:
            pause_s = _SHORTEST_POLL_S
            while not self._try():
                if time.monotonic() >= deadline:
                    raise self._busy(wait_s, "another process")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)
        finally:
            self._threads.release()

    def close(self) -> None:
        """Close the lock's file. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either, says POSIX
            return False
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc
        return True

    def _busy(self, wait_s: float, holder: str) -> StoreBusyError:
        return StoreBusyError(
            f"cold store {self._store}: {holder} has been writing for more than {wait_s:g} s",
            hint="a process that was stopped keeps the lock until it goes on or ends",
        )


def reserve_lock_file(directory: Path, size: int) -> None:
    """Give LMDB's lock file its room on the disk, before LMDB makes it: raises OSError where there is none.

    LMDB leaves it full of holes and writes to it through a map: on a full disk, the first one to need a hole, be it a
    reader's thread, would die of SIGBUS. Must not be called while this process has the environment open, since
    closing the descriptor drops LMDB's own locks; such a file has its room already and is left alone.
    """
    path = directory / LOCK_FILE
    if path.exists() and path.stat().st_blocks * 512 >= size:
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)


class Gate:
    """Many threads may pass together, or one alone: new ones then wait, and those inside finish first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Pass; waits only for a thread that is alone inside."""
        with self._condition:
            while self._closed:
                self._condition.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                if not self._inside:
                    self._condition.notify_all()

    @contextlib.contextmanager
    def exclusive(self, wait_s: float | None = None) -> Iterator[bool]:
        """Pass alone, when all inside have left. Yields whether they have, after `wait_s` seconds if that is given."""
        with self._condition:
            while self._closed:
                self._condition.wait()
            self._closed = True
            is_alone = self._condition.wait_for(lambda: not self._inside, wait_s)
        try:
            yield is_alone
        finally:
            with self._condition:
                self._closed = False
                self._condition.notify_all()
