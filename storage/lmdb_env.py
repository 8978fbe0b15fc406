"""One LMDB environment, opened safely: what can kill a process or lose data is ruled out here.

- Who opens the file first checks it before it is mapped, and replaces one that LMDB must not see; those who
  come while it is open rely on that. All hold a shared lock on a file beside it, so that a check, a repair and
  compaction, which replaces the data file, happen only when nobody else has it open.
- LMDB believes the header of a value's pages when it frees them, and would give away pages of others if a bit
  of it had flipped: `mend_value` compares it first.
- A memoryview of the map must not outlive its transaction, nor a transaction its environment: closing and
  compacting wait until the reads in flight are done.
- `writemap` stays off: with it, a full disk is a SIGBUS; without it, an error. LMDB's lock file is mapped and
  written in any case, so its room is reserved at opening.
- An environment must not be used in a forked child: a use there raises StoreError.

Commits are not synced one by one (`sync=False`): they survive the death of every process, for the page cache
keeps them; after a power failure the file may be inconsistent up to the last `sync()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import lmdb
import numpy as np

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.lmdb_file import (
    DATA_FILE,
    PAGE_HEADER,
    PAGE_HEADER_BYTES,
    fetch_ahead,
    newest_meta,
    replace_damaged,
)
from tierkv.storage.lmdb_lock import Gate, UserLock, reserve_lock_file
from tierkv.storage.lmdb_values import OVERFLOW_FLAG, find_value, overflow_pages

__all__ = ["Database", "DatabaseSpec", "Keeper", "LmdbEnv", "ReadTransaction", "WriteTransaction"]

Database: TypeAlias = "lmdb._Database"
ReadTransaction: TypeAlias = "lmdb.Transaction[memoryview]"
WriteTransaction: TypeAlias = "lmdb.Transaction[memoryview]"

_USER_LOCK_FILE = "users.lock"
_MAX_READERS = 1024
_LOCK_FILE_BYTES = 64 * _MAX_READERS + 4096  # a cache line for each reader, and LMDB's header
_MAX_DBS = 8
_TEMPORARY = ("compact.tmp", "rebuild.tmp")
_COMPARED_BYTES = 64  # of a value, to tell whether a page is the one that its header says

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSpec:
    """A named database of the environment."""

    name: bytes


class Keeper(Protocol):
    """What the owner of an environment knows of its contents. Called while nobody else has the file open."""

    def check(self, fd: int) -> None:
        """Raise CorruptBlockError if the data file must not be used. Reads it with plain reads."""

    def rebuild(self, damaged: Path, directory: Path) -> None:
        """Make an environment in `directory` from what can be saved of a damaged data file."""


class LmdbEnv:
    """An open environment. Thread-safe; a context manager; `close()` may be called twice.

    damaged: where a data file that could not be used was set aside, or None.
    Raises StoreError if the directory or the file in it cannot be used.
    """

    def __init__(
        self,
        path: Path,
        *,
        map_bytes: int,
        specs: tuple[DatabaseSpec, ...],
        read_only: bool = False,
        keeper: Keeper | None = None,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.damaged: Path | None = None
        self._map_bytes = map_bytes
        self._specs = specs
        self._pid = os.getpid()
        self._gate = Gate()
        self._env: lmdb.Environment | None = None
        self._data_fd = -1
        self._prepare_directory()
        self._users = UserLock(path / _USER_LOCK_FILE, read_only=read_only)
        try:
            if self._users.enter():
                self._clear_temporary()
                if keeper:
                    self._check(keeper)
                self._users.share()
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
            self._close_data()
        self._users.close()

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
            env = self._live()
            self._users.require_alone()
            try:
                self._clear_temporary()
                target.mkdir()
                env.copy(str(target), compact=True)
                _sync_file(target / DATA_FILE)
                self._close_data()
                os.replace(target / DATA_FILE, self.path / DATA_FILE)
                _sync_file(self.path)
            except (lmdb.Error, OSError) as exc:
                raise StoreError(f"cold store {self.path} could not be compacted: {exc}") from exc
            finally:
                self._clear_temporary()
                if self._env is None:
                    self._open()
                self._users.share()

    def mend_value(self, database: bytes, key: bytes, value: memoryview | None) -> None:
        """Compare the header of a value's pages with what it must be, and write it anew if it differs.

        value: what `get` returned, or None where LMDB refused the page. Only within a write transaction,
        and only for a value that it has not changed: the file has what the last commit left there.
        """
        page_bytes = self._page_bytes
        if value is not None:
            header = np.frombuffer(value, dtype=np.uint8).ctypes.data - PAGE_HEADER_BYTES
            page, _, flags, pages = PAGE_HEADER.unpack(ctypes.string_at(header, PAGE_HEADER_BYTES))
            if (flags, pages) == (OVERFLOW_FLAG, overflow_pages(len(value), page_bytes)) and page < 1 << 48:
                start = os.pread(self._data_fd, _COMPARED_BYTES, page * page_bytes + PAGE_HEADER_BYTES)
                if start == bytes(value[:_COMPARED_BYTES]):
                    return
        try:
            place = find_value(self._data_fd, database, key)
        except (KeyError, CorruptBlockError, OSError) as exc:
            raise StoreError(f"cold store {self.path}: a damaged value cannot be found: {exc}") from exc
        if place is None:
            return
        first_page, size = place
        sound = PAGE_HEADER.pack(first_page, 0, OVERFLOW_FLAG, overflow_pages(size, page_bytes))
        os.pwrite(self._data_fd, sound, first_page * page_bytes)
        _logger.warning("cold store %s: the page header of value %s was damaged", self.path, key.hex())

    def fetch_values(self, database: bytes, keys: Sequence[bytes]) -> None:
        """Ask the system to read values into its cache; those that are not there are passed over.

        Finds them with plain reads, which release the GIL: a page fault inside LMDB would hold it until the
        disk has answered.
        """
        with self._gate.shared():
            self._live()
            for key in keys:
                with contextlib.suppress(KeyError, CorruptBlockError, OSError):
                    place = find_value(self._data_fd, database, key)
                    if place is not None:
                        fetch_ahead(self._data_fd, place[0] * self._page_bytes, PAGE_HEADER_BYTES + place[1])

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

    def _check(self, keeper: Keeper) -> None:
        """Replace a data file that must not be mapped by what can be saved of it."""
        data = self.path / DATA_FILE
        if not data.exists() or data.stat().st_size == 0:
            return
        fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            keeper.check(fd)
            return
        except CorruptBlockError as exc:
            problem = exc
        finally:
            os.close(fd)
        if self.read_only:
            raise CorruptBlockError(f"cold store {self.path} is damaged: {problem}", hint="run tierkv verify --repair")
        target = self.path / "rebuild.tmp"
        try:
            target.mkdir()
            keeper.rebuild(data, target)
            _sync_file(target / DATA_FILE)
            self.damaged = replace_damaged(self.path, target / DATA_FILE)
        except OSError as exc:
            raise StoreError(f"cold store {self.path} is damaged and could not be rebuilt: {exc}") from exc
        finally:
            self._clear_temporary()
        _logger.warning("cold store %s: %s; set aside as %s", self.path, problem, self.damaged.name)

    def _clear_temporary(self) -> None:
        for name in () if self.read_only else _TEMPORARY:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _close_data(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
        if self._data_fd >= 0:
            os.close(self._data_fd)
            self._data_fd = -1

    def _open(self) -> None:
        try:
            if not self.read_only:
                reserve_lock_file(self.path, _LOCK_FILE_BYTES)
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
                spec.name: self._env.open_db(spec.name, create=not self.read_only) for spec in self._specs
            }
            # Not the lock file: closing any descriptor of that would drop LMDB's own locks.
            access = os.O_RDONLY if self.read_only else os.O_RDWR
            self._data_fd = os.open(self.path / DATA_FILE, access | os.O_CLOEXEC)
            self._page_bytes = newest_meta(self._data_fd).page_bytes
        except (lmdb.Error, CorruptBlockError, OSError, OverflowError, UnicodeError) as exc:
            hint = None
            if "already open" in str(exc):
                hint = "a process opens a store once: pass the open one along"
            raise StoreError(f"cold store {self.path} cannot be opened: {exc}", hint=hint) from exc


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
