"""The locks of an environment: among its users, among its writers, and a gate among the threads of a process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import StoreBusyError, StoreError
from tierkv.storage.lmdb_file import DATA_FILE, open_store_file

__all__ = ["Gate", "UserLock", "WriteLock"]

_WAIT_S = 10.0  # for another process that checks, repairs or compacts
_POLL_S = 0.01
_SHORTEST_POLL_S = 0.0005


class UserLock:
    """A file lock that every user of a store shares. A user that replaces the data file holds it alone.

    It ends with its process. A store that no process has ever opened for writing, as a copied data file, has no such
    file: its readers hold nothing.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._store = path.parent
        self._fd = -1
        try:
            self._fd = open_store_file(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT)
        except FileNotFoundError as exc:
            if not (read_only and (self._store / DATA_FILE).exists()):
                raise StoreError(f"there is no cold store at {self._store}", hint="check the path") from exc
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc

    def enter(self) -> bool:
        """Take the lock, alone if it is free; return whether alone. Waits while another user holds it alone.

        Alone is tried first each time: the first user checks the data file, and users that share rely on that.
        """
        deadline = time.monotonic() + _WAIT_S
        while True:
            if self._try(fcntl.LOCK_EX):
                return True
            if self._try(fcntl.LOCK_SH):
                return False
            if time.monotonic() > deadline:
                raise self._busy()
            time.sleep(_POLL_S)

    def share(self) -> None:
        """Share the lock again. Raises StoreBusyError where this process has lost it and does not get it again."""
        deadline = time.monotonic() + _WAIT_S
        while not self._try(fcntl.LOCK_SH):  # never needs a second attempt for a lock that is held alone
            if time.monotonic() > deadline:
                raise self._busy()
            time.sleep(_POLL_S)

    def try_alone(self) -> bool:
        """Hold the lock alone from now on, or return False where another process has it too.

        The lock is lost then, and `share` must follow: the kernel drops a lock before it tries to convert it.
        """
        return self._try(fcntl.LOCK_EX)

    def close(self) -> None:
        """Release the lock. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _busy(self) -> StoreBusyError:
        return StoreBusyError(
            f"cold store {self._store} is being compacted or repaired",
            hint="try again when that is done; a process that was stopped meanwhile keeps the store until it continues",
        )

    def _try(self, kind: int) -> bool:
        if self._fd < 0:
            return True
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc
        return True


class WriteLock:
    """The right to write, among threads and processes. Taken before LMDB's own lock, which is waited for without limit.

    It ends with its process, and a forked child does not have it. Closing any descriptor of its file releases it:
    a process must have one object for it.
    """

    def __init__(self, path: Path) -> None:
        self._store = path.parent
        self._threads = threading.Lock()
        try:
            self._fd = open_store_file(path, os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            raise StoreError(f"cold store {self._store} cannot be locked: {exc}") from exc

    @contextlib.contextmanager
    def held(self, wait_s: float) -> Iterator[None]:
        """Hold the lock. Raises StoreBusyError where another holder still has it after `wait_s` seconds."""
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
            hint="a process that was stopped keeps the lock until it continues or ends",
        )


class Gate:
    """Many threads may be inside together, or one alone: new ones then wait, and those inside finish first.

    wait_s: how long a thread waits for a thread that is alone inside.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._shared = _Shared(self)
        self._inside = 0
        self._closed = False

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Be inside; waits only for a thread that is alone inside. Raises StoreBusyError where that does not leave."""
        return self._shared

    def enter(self) -> None:
        """Begin what `shared` says; `leave` must follow."""
        with self._lock:
            if self._closed and not self._condition.wait_for(lambda: not self._closed, self._wait_s):
                raise StoreBusyError("the cold store is being compacted or closed by another thread")
            self._inside += 1

    def leave(self) -> None:
        """End what `enter` began."""
        with self._lock:
            self._inside -= 1
            if not self._inside and self._closed:
                self._condition.notify_all()

    @contextlib.contextmanager
    def exclusive(self, wait_s: float) -> Iterator[bool]:
        """Be inside alone, when all others have left. Yields whether they have, within `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        with self._condition:
            has_turn = self._condition.wait_for(lambda: not self._closed, wait_s)
            self._closed = True
            is_alone = has_turn and self._condition.wait_for(lambda: not self._inside, deadline - time.monotonic())
        try:
            yield is_alone
        finally:
            if has_turn:  # else another thread is alone inside, and reopens the gate when it leaves
                with self._condition:
                    self._closed = False
                    self._condition.notify_all()


class _Shared:
    """The context manager of `Gate.shared`: a class and one object per gate, in a third of a generator's time."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.enter()

    def __exit__(self, *_: object) -> None:
        self._gate.leave()
