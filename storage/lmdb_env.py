"""One LMDB environment, opened safely: what can kill a process or lose data is ruled out here.

- Who opens the file first checks it before it is mapped, and replaces one that LMDB must not see; those who
  come while it is open rely on that. All hold a shared lock on a file beside it, so that a check, a repair and
  compaction, which replaces the data file, happen only when nobody else has it open.
- LMDB believes the header of a value's pages when it frees them, and would give away pages of others if a bit
  of it had flipped: `mend_value` compares it first.
- A memoryview of the map must not outlive its transaction, nor a transaction its environment: closing and
  compacting wait until the reads in flight are done.
- LMDB waits for its write lock without limit, also while the process that has it is stopped. So a lock of our own
  is taken before it, for `write_wait_s` at most. (A program that writes to the file by other means does not take it.)
- `writemap` stays off: with it, a full disk is a SIGBUS; without it, an error. LMDB's lock file is mapped and
  written in any case, so its room is reserved at opening.
- An environment must not be used in a forked child: a use there raises StoreError.

Commits are not synced one by one (`sync=False`): they survive the death of every process, for the page cache
keeps them; after a power failure the file may be inconsistent up to the last `sync()`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import lmdb

from tierkv.errors import CorruptBlockError, StoreBusyError, StoreError
from tierkv.storage.lmdb_data import DataFile
from tierkv.storage.lmdb_directory import (
    COMPACTED,
    Keeper,
    check_data_file,
    check_store_files,
    clear_temporary,
    prepare_directory,
    sync_file,
)
from tierkv.storage.lmdb_file import DATA_FILE
from tierkv.storage.lmdb_lock import Gate, UserLock, WriteLock, reserve_lock_file
from tierkv.storage.lmdb_tree import check_trees
from tierkv.storage.planes import Bytes
from tierkv.storage.record_source import FileRecord

__all__ = ["Database", "DatabaseSpec", "LmdbEnv", "ReadTransaction", "WriteTransaction"]

Database: TypeAlias = "lmdb._Database"
ReadTransaction: TypeAlias = "lmdb.Transaction[memoryview]"
WriteTransaction: TypeAlias = "lmdb.Transaction[memoryview]"

_USER_LOCK_FILE = "users.lock"
_WRITE_LOCK_FILE = "write.lock"
_CLOSE_WAIT_S = 10.0  # beyond the wait for the write lock
_MAX_READERS = 1024
_LOCK_FILE_BYTES = 64 * _MAX_READERS + 4096  # a cache line for each reader, and LMDB's header
_MAX_DBS = 8
_MAX_GROWTHS = 8  # of the map in other processes while one transaction begins
_logger = logging.getLogger(__name__)

_WRONG_PAGES = (
    lmdb.BadDbiError,
    lmdb.BadTxnError,
    lmdb.BadValsizeError,
    lmdb.CorruptedError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
)
"""What LMDB says where a page of its trees, or the header of a value's, is not what it must be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSpec:
    """A named database of the environment."""

    name: bytes


class LmdbEnv:
    """An open environment. Thread-safe; a context manager; `close()` may be called twice.

    damaged: where a data file that could not be used was set aside, or None.
    write_wait_s: how long to wait for others who write.
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
        write_wait_s: float = 30.0,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.damaged: Path | None = None
        self.generation = 0  # grows when the data file is opened again: handles of databases are new ones then
        self._map_bytes = map_bytes
        self._write_wait_s = write_wait_s
        self._write_lock: WriteLock | None = None
        self._specs = specs
        self._pid = os.getpid()
        self._gate = Gate(write_wait_s)
        self._env: lmdb.Environment | None = None
        self._is_named = read_only  # the directory that names the data file has been synced
        self._is_abandoned = False  # closed, but a transaction in it never ended
        self._is_suspect = False  # LMDB has come across a page that cannot be right
        self._problem: str | None = None
        prepare_directory(path, read_only=read_only)
        self._users = UserLock(path / _USER_LOCK_FILE, read_only=read_only)
        try:
            check_store_files(path)
            if self._users.enter():
                if not read_only:
                    clear_temporary(path)
                if keeper:
                    self.damaged = check_data_file(path, keeper, read_only=read_only)
                self._open(is_first=True)
                self._users.share()
            else:
                self._open(is_first=False)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LmdbEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_shared(self) -> bool:
        """Tell whether another user has this environment open. Raises StoreBusyError, StoreError."""
        with self._alone("its users cannot be counted"):
            self._live()
            if self._users.try_alone():
                self._users.share()
                return False
            self._rejoin()
            return True

    def close(self) -> None:
        """Close after the transactions in flight. If one does not end in time, all stays open, which is logged."""
        if self._is_abandoned:
            return
        with self._gate.exclusive(self._patience_s) as is_alone:
            if not is_alone:
                self._is_abandoned = True
                _logger.error("cold store %s: a transaction does not end; the store stays open behind it", self.path)
                return
            self._close_data()
            if self._write_lock:
                self._write_lock.close()
        self._users.close()

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return self._env is not None and not self._is_abandoned

    @property
    def file_bytes(self) -> int:
        """Length of the data file. Raises StoreError once that is closed."""
        with self._gate.shared(), self._translated("be measured"):
            self._live()
            return os.fstat(self._data.fd).st_size

    @contextlib.contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """A snapshot. What `get` returns lies in the map: it must not be kept past the `with`.

        Raises CutShortError, CorruptBlockError where LMDB came across pages that cannot be right, StoreError.
        """
        for _ in range(_MAX_GROWTHS):
            with self._gate.shared():
                try:
                    with self._begin(write=False) as txn:
                        yield txn
                    return
                except lmdb.MapResizedError:  # raised by `_begin` alone: nothing has been yielded yet
                    pass
                except _WRONG_PAGES as exc:
                    self._is_suspect = True
                    raise CorruptBlockError(f"cold store {self.path} has damaged pages: {exc}") from exc
                except (lmdb.Error, OSError) as exc:
                    raise StoreError(f"cold store {self.path} cannot be read: {exc}") from exc
            self.grow_map()
        raise StoreBusyError(f"cold store {self.path} grows faster than its map")

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTransaction]:
        """The only writer among all processes; commits at the end, aborts on an exception, lmdb.Error among them.

        Raises StoreBusyError where others write for too long, CutShortError, and StoreError once pages of the trees
        have been found damaged: LMDB may read those, but when it writes it relies on them. An lmdb.Error or OSError
        is the cause of the StoreError that it becomes.
        """
        for _ in range(_MAX_GROWTHS):
            with self._gate.shared():
                self._live()
                assert self._write_lock is not None, "an environment that is opened for writing has the lock"
                with self._write_lock.held(self._write_wait_s):
                    try:
                        self._require_sound_trees()
                        with self._begin(write=True) as txn:
                            yield txn
                        return
                    except lmdb.MapResizedError:  # raised by `_begin` alone: nothing has been yielded yet
                        pass
                    except (lmdb.Error, OSError) as exc:
                        self._is_suspect |= isinstance(exc, _WRONG_PAGES)
                        raise StoreError(f"cold store {self.path} cannot be written: {exc}") from exc
            self.grow_map()
        raise StoreBusyError(f"cold store {self.path} grows faster than its map")

    def set_map(self, map_bytes: int) -> None:
        """Make LMDB's map so long, or as long as the file must have it. Otherwise as `grow_map`."""
        with self._alone("its map cannot change"):
            self._map_bytes = map_bytes
            env = self._live()
            with self._translated("be mapped"):
                self._data.require_whole()
                env.set_mapsize(map_bytes)

    def grow_map(self, map_bytes: int = 0) -> None:
        """Make LMDB's map at least so long, and as long as the file says: another process may have a longer one.

        Waits for the transactions in flight, whose memory is in the map that goes. Raises StoreBusyError, StoreError.
        """
        with self._alone("its map cannot grow"):
            self._map_bytes = max(map_bytes, self._map_bytes)
            self._remap()

    def database(self, name: bytes) -> Database:
        """Return the handle of a database named in the specs."""
        return self._databases[name]

    def sync(self) -> None:
        """Return when all that was committed is on the disk. Raises StoreError."""
        with self._gate.shared(), self._translated("be synced"):
            env = self._live()
            self._data.require_whole()
            env.sync(True)
            if not self._is_named:
                sync_file(self.path)  # a file that is on the disk, and in no directory there, is lost
                sync_file(self.path.parent)
                self._is_named = True

    def clear_dead_readers(self) -> int:
        """Free the snapshots of processes that died; return how many there were. Raises StoreError."""
        with self._gate.shared(), self._translated("be read"):
            return self._live().reader_check()

    def compact(self) -> None:
        """Rewrite the file without its free pages. Raises StoreError if another process has it open, StoreBusyError
        where a transaction does not end. If the file cannot be opened again behind that, the environment is closed.
        """
        target = self.path / COMPACTED
        with self._alone("it cannot be compacted"):
            env = self._live()
            self._remap()
            self._require_sound_trees()
            if not self._users.try_alone():
                self._rejoin()
                raise StoreError(f"cold store {self.path} is open in another process", hint="close it there first")
            try:
                with self._translated("be compacted"):
                    clear_temporary(self.path)
                    target.mkdir()
                    env.copy(str(target), compact=True)
                    sync_file(target / DATA_FILE)
                    self._close_data()
                    os.replace(target / DATA_FILE, self.path / DATA_FILE)
                    sync_file(self.path)
            finally:
                clear_temporary(self.path)
                try:
                    if self._env is None:
                        self._open(is_first=True)
                finally:
                    self._users.share()

    def read_value(self, database: bytes, key: bytes, *, max_bytes: int) -> Bytes | None:
        """Return a value read around the map, or None: see `DataFile.read_value`. Only within a read transaction."""
        return self._data.read_value(database, key, max_bytes=max_bytes)

    def open_value(self, database: bytes, key: bytes, *, max_bytes: int) -> FileRecord | Bytes | None:
        """Return a value to be read around the map: see `DataFile.open_value`. Only within a read transaction."""
        return self._data.open_value(database, key, max_bytes=max_bytes)

    def mend_value(self, database: bytes, key: bytes, value: memoryview | None) -> None:
        """Put the header of a value's pages right before LMDB believes it: see `DataFile.mend_value`."""
        self._data.mend_value(database, key, value)

    def fetch_values(self, database: bytes, keys: Sequence[bytes]) -> None:
        """Ask the system to read values into its cache; those that are not there are passed over.

        Finds them with plain reads, which release the GIL: a page fault inside LMDB would hold it until the
        disk has answered.
        """
        with self._gate.shared():
            self._live()
            self._data.fetch_values(database, keys)

    def is_in_memory(self, database: bytes, key: bytes) -> bool:
        """Tell whether reading a value takes no disk; True of one that is not there."""
        with self._gate.shared():
            self._live()
            return self._data.is_in_memory(database, key)

    def check_trees(self) -> None:
        """Walk the trees with plain reads. Raises StoreError, from now on at every write too, if they are damaged."""
        for _ in range(_MAX_GROWTHS):
            with self._gate.shared(), contextlib.suppress(lmdb.MapResizedError):
                self._is_suspect = True
                self._require_sound_trees()
                return
            self.grow_map()
        raise StoreBusyError(f"cold store {self.path} grows faster than its map")

    def _remap(self) -> None:
        """Map the file as far as it and this process want; no other thread may use the environment."""
        env = self._live()
        with self._translated("be mapped"):
            self._data.require_whole()
            try:
                self._data.require_sound_end()
            except CorruptBlockError:
                self._is_suspect = True
                raise
            env.set_mapsize(0)  # as far as the file says
            if env.info()["map_size"] < self._map_bytes:
                env.set_mapsize(self._map_bytes)

    @property
    def _patience_s(self) -> float:
        """How long to wait for the transactions in flight, one of which may wait for the write lock."""
        return self._write_wait_s + _CLOSE_WAIT_S

    @contextlib.contextmanager
    def _alone(self, consequence: str) -> Iterator[None]:
        """Be the only thread that uses the environment. Raises StoreBusyError where a transaction does not end."""
        with self._gate.exclusive(self._patience_s) as is_alone:
            if not is_alone:
                raise StoreBusyError(f"cold store {self.path}: a transaction does not end, {consequence}")
            yield

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Let what LMDB and the system raise be a StoreError that says that the store cannot `what`."""
        try:
            yield
        except (lmdb.Error, OSError) as exc:
            raise StoreError(f"cold store {self.path} cannot {what}: {exc}") from exc

    def _rejoin(self) -> None:
        """Share the users' lock again after it was lost; the data file may have been replaced meanwhile."""
        try:
            self._users.share()
            if not self._data.is_at_its_path():
                self._close_data()
                self._open(is_first=False)
        except BaseException:
            self._close_data()
            raise

    def _require_sound_trees(self) -> None:
        if self._problem is None and self._is_suspect:
            try:
                with self._begin(write=False):  # keeps the pages of the last state from being used again meanwhile
                    check_trees(self._data.fd)
                self._is_suspect = False
            except lmdb.MapResizedError:
                raise
            except (CorruptBlockError, *_WRONG_PAGES) as exc:
                self._problem = str(exc)
            except (lmdb.Error, OSError) as exc:
                raise StoreError(f"cold store {self.path} cannot be read: {exc}") from exc
        if self._problem is not None:
            raise StoreError(
                f"cold store {self.path} was damaged while it was open: {self._problem}",
                hint="nothing is written to it; close it everywhere, opening it again saves what is whole",
            )

    def _begin(self, *, write: bool) -> lmdb.Transaction[memoryview]:
        env = self._live()
        self._data.require_whole()
        try:
            return env.begin(write=write, buffers=True)
        except lmdb.ReadersFullError:
            env.reader_check()
            return env.begin(write=write, buffers=True)

    def _live(self) -> lmdb.Environment:
        if self._env is None or self._is_abandoned:
            raise StoreError(f"cold store {self.path} is closed")
        if os.getpid() != self._pid:
            raise StoreError(f"cold store {self.path} was opened by the parent process", hint="open it after the fork")
        return self._env

    def _close_data(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
            self._data.close()

    def _open(self, *, is_first: bool) -> None:
        """Open the data file, which `is_first` tells nobody else has open: others have a sound one."""
        data = self.path / DATA_FILE
        try:
            if not is_first:
                DataFile(data, read_only=True).close()  # shorter than it says: LMDB's map of it would end this process
            if not self.read_only:
                reserve_lock_file(self.path, _LOCK_FILE_BYTES)
            env = lmdb.open(
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
            try:
                env.reader_check()
                if not self.read_only and self._write_lock is None:
                    self._write_lock = WriteLock(self.path / _WRITE_LOCK_FILE)
                turn = self._write_lock.held(self._write_wait_s) if self._write_lock else contextlib.nullcontext()
                with turn:  # LMDB opens databases within a write transaction
                    create = not self.read_only
                    self._databases = {spec.name: env.open_db(spec.name, create=create) for spec in self._specs}
                self._data = DataFile(data, read_only=self.read_only)
            except BaseException:
                env.close()
                raise
            self._env = env
            self.generation += 1
        except (lmdb.Error, CorruptBlockError, OSError, OverflowError, UnicodeError) as exc:
            hint = None
            if "already open" in str(exc):
                hint = "a process opens a store once: pass the open one along"
            raise StoreError(f"cold store {self.path} cannot be opened: {exc}", hint=hint) from exc
