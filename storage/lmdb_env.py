"""One LMDB environment, opened safely: what can kill a process or lose data is ruled out here.

- The data file's length is checked before it is mapped (lmdb_file.py).
- Every user holds a shared lock on a file beside it, so that set-aside and compaction, which replace the data
  file, happen only when nobody else has it open.
- A memoryview of the map must not outlive its transaction, nor a transaction its environment: closing and
  compacting wait until the reads in flight are done.
- `writemap` stays off: with it, a full disk is a SIGBUS; without it, an error.
- An environment must not be used in a forked child: a use there raises StoreError.

Commits are not synced one by one (`sync=False`): they survive the death of every process, for the page cache
keeps them; after a power failure the file may be inconsistent up to the last `sync()`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import lmdb

from tierkv.errors import StoreError
from tierkv.storage.lmdb_file import DATA_FILE, read_data_file, set_aside

__all__ = ["Database", "DatabaseSpec", "LmdbEnv", "ReadTransaction", "WriteTransaction"]

Database: TypeAlias = "lmdb._Database"
ReadTransaction: TypeAlias = "lmdb.Transaction[memoryview]"
WriteTransaction: TypeAlias = "lmdb.Transaction[memoryview]"

_USER_LOCK_FILE = "users.lock"
_MAX_READERS = 1024
_MAX_DBS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSpec:
    """A named database of the environment."""

    name: bytes
    sorted_duplicates: bool = False


class LmdbEnv:
    """An open environment. Thread-safe; a context manager; `close()` may be called twice.

    damaged: where a data file that could not be used was set aside, or None.
    Raises StoreError if the directory or the file in it cannot be used.
    """

    def __init__(self, path: Path, *, map_bytes: int, specs: tuple[DatabaseSpec, ...], read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.damaged: Path | None = None
        self._map_bytes = map_bytes
        self._specs = specs
        self._pid = os.getpid()
        self._gate = _Gate()
        self._lock_fd = -1
        self._env: lmdb.Environment | None = None
        self._prepare_directory()
        try:
            self._lock_users()
            self._check_data_file()
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LmdbEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close after the transactions in flight."""
        with self._gate.exclusive():
            if self._env is not None:
                self._env.close()
                self._env = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return self._env is not None

    @property
    def file_bytes(self) -> int:
        """Length of the data file."""
        return (self.path / DATA_FILE).stat().st_size

    @contextlib.contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """A snapshot. What `get` returns lies in the map: it must not be kept past the `with`."""
        with self._gate.shared(), self._begin(write=False) as txn:
            yield txn

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTransaction]:
        """The only writer among all processes; commits at the end, aborts on an exception."""
        with self._gate.shared(), self._begin(write=True) as txn:
            yield txn

    def database(self, name: bytes) -> Database:
        """Return the handle of a database named in the specs."""
        return self._databases[name]

    def sync(self) -> None:
        """Return when all that was committed is on the disk. Raises StoreError."""
        with self._gate.shared():
            try:
                self._live().sync(True)
            except lmdb.Error as exc:
                raise StoreError(f"cold store {self.path} cannot be synced: {exc}") from exc

    def clear_dead_readers(self) -> int:
        """Free the snapshots of processes that died; return how many there were."""
        with self._gate.shared():
            return self._live().reader_check()

    def compact(self) -> None:
        """Rewrite the file without its free pages. Raises StoreError if another process has it open."""
        target = self.path / "compact.tmp"
        with self._gate.exclusive():
            self._lock_alone()
            try:
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                env = self._live()
                env.copy(str(target), compact=True)
                _sync_file(target / DATA_FILE)
                env.close()
                self._env = None
                os.replace(target / DATA_FILE, self.path / DATA_FILE)
                _sync_file(self.path)
            except (lmdb.Error, OSError) as exc:
                raise StoreError(f"cold store {self.path} could not be compacted: {exc}") from exc
            finally:
                shutil.rmtree(target, ignore_errors=True)
                if self._env is None:
                    self._open()
                fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def _begin(self, *, write: bool) -> lmdb.Transaction[memoryview]:
        env = self._live()
        try:
            return env.begin(write=write, buffers=True)
        except lmdb.MapResizedError:  # another process opened it with a larger quota
            env.set_mapsize(0)
            return env.begin(write=write, buffers=True)
        except lmdb.ReadersFullError:
            env.reader_check()
            return env.begin(write=write, buffers=True)

    def _live(self) -> lmdb.Environment:
        if self._env is None:
            raise StoreError(f"cold store {self.path} is closed")
        if os.getpid() != self._pid:
            raise StoreError(f"cold store {self.path} was opened by the parent process", hint="open it after the fork")
        return self._env

    def _prepare_directory(self) -> None:
        try:
            if not self.read_only:
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StoreError(
                f"{self.path} cannot be the directory of a cold store: {exc}", hint="choose another cold_path"
            ) from exc
        if not self.path.is_dir():
            raise StoreError(f"there is no cold store at {self.path}", hint="check the path")
        if not self.read_only and not os.access(self.path, os.W_OK | os.X_OK):
            raise StoreError(f"{self.path} is not writable", hint="open it read-only, or mend its permissions")

    def _lock_users(self) -> None:
        flags = os.O_RDONLY if self.read_only else os.O_RDWR | os.O_CREAT
        try:
            self._lock_fd = os.open(self.path / _USER_LOCK_FILE, flags | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError as exc:
            raise StoreError(f"there is no cold store at {self.path}", hint="check the path") from exc
        except BlockingIOError as exc:
            raise StoreError(
                f"cold store {self.path} is being compacted or repaired", hint="try again when that is done"
            ) from exc
        except OSError as exc:
            raise StoreError(f"cold store {self.path} cannot be locked: {exc}") from exc

    def _lock_alone(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            # A failed conversion has dropped the shared lock.
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH)
            raise StoreError(f"cold store {self.path} is open in another process", hint="close it there first") from exc

    def _check_data_file(self) -> None:
        """Set a file aside that must not be mapped."""
        problem = read_data_file(self.path / DATA_FILE).problem
        if problem is None:
            return
        if self.read_only:
            raise StoreError(f"cold store {self.path} is damaged: {problem}", hint="open it for writing once")
        self._lock_alone()
        self.damaged = set_aside(self.path, problem)
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def _open(self) -> None:
        try:
            self._env = lmdb.open(
                str(self.path),
                map_size=self._map_bytes,
                readonly=self.read_only,
                create=not self.read_only,
                sync=False,
                metasync=False,
                mode=0o600,
                max_readers=_MAX_READERS,
                max_dbs=_MAX_DBS,
                lib_version=0,
            )
            self._env.reader_check()
            self._databases = {
                spec.name: self._env.open_db(
                    spec.name,
                    dupsort=spec.sorted_duplicates,
                    dupfixed=spec.sorted_duplicates,
                    create=not self.read_only,
                )
                for spec in self._specs
            }
        except lmdb.Error as exc:
            hint = None
            if "already open" in str(exc):
                hint = "a process opens a store once: pass the open one along"
            raise StoreError(f"cold store {self.path} cannot be opened: {exc}", hint=hint) from exc


class _Gate:
    """Many may pass together, or one alone. Passing is never held up by one who waits to be alone for long:
    new entries wait, those inside finish.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
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
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            while self._closed:
                self._condition.wait()
            self._closed = True
            while self._inside:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._closed = False
                self._condition.notify_all()


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
