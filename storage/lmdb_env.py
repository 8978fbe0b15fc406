"""One LMDB environment, opened safely: no file can end the process, and no crash of a process loses data.

- The first process that opens the file checks it before LMDB maps it, and replaces a damaged one. All processes share a
  lock on a file beside it: a check, a repair and a compaction happen only while no other process has the store open.
- LMDB believes the header of a value's pages when it frees them: `DataFile.repair_value_header` compares it first.
- A memoryview of the map must not outlive its transaction, nor a transaction its environment: closing and
  compacting wait until the reads in flight are done.
- LMDB waits for its write lock without limit, also while its holder is stopped. So our own lock is taken before it,
  for `write_wait_s` at most. (A program that writes to the file by other means does not take it.)
- `writemap` stays off: with it, a full disk is a SIGBUS; without it, an error. LMDB's lock file is mapped and
  written in any case, so its room is reserved at opening.
- A forked child must not use an environment: each use there raises StoreError.

Commits are not synced one by one: the page cache keeps them when processes end. After a power failure the file may be
inconsistent up to the last `sync()`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import lmdb

from tierkv.errors import CorruptBlockError, StoreBusyError, StoreError
from tierkv.storage.lmdb_directory import (
    WRONG_PAGES,
    Salvager,
    check_data_file,
    check_store_files,
    clear_temporary,
    copy_compacted,
    open_environment,
    prepare_directory,
)
from tierkv.storage.lmdb_file import DATA_FILE, CutShortError, DataFile, sync_file
from tierkv.storage.lmdb_lock import Gate, UserLock, WriteLock
from tierkv.storage.lmdb_tree import check_trees

__all__ = ["Database", "LmdbEnv", "ReadTransaction", "WriteTransaction"]

Database: TypeAlias = "lmdb._Database"
ReadTransaction: TypeAlias = "lmdb.Transaction[memoryview]"
WriteTransaction: TypeAlias = "lmdb.Transaction[memoryview]"

_USER_LOCK_FILE, _WRITE_LOCK_FILE = "users.lock", "write.lock"
_CLOSE_WAIT_S = 10.0  # for transactions in flight, beyond the wait for the write lock
_MAX_GROWTHS = 8  # of the map in other processes while one transaction begins
_logger = logging.getLogger(__name__)


class LmdbEnv:
    """An open environment. Thread-safe; `close()` may be called twice.

    names: of its databases. handles: of these databases, in the same order; data: the data file. A compaction replaces
    both: take them within each transaction. damaged: where an unusable data file was set aside, or None.
    write_wait_s: how long to wait for other writers.
    Raises StoreError if the directory or the file in it cannot be used.
    """

    handles: tuple[Database, ...]
    data: DataFile

    def __init__(
        self,
        path: Path,
        *,
        map_bytes: int,
        names: tuple[bytes, ...],
        read_only: bool = False,
        salvager: Salvager | None = None,
        write_wait_s: float = 30.0,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.damaged: Path | None = None
        self._map_bytes = map_bytes
        self._write_wait_s = write_wait_s
        self._write_lock: WriteLock | None = None
        self._names = names
        self._pid = os.getpid()
        self._gate = Gate(write_wait_s)
        self._env: lmdb.Environment | None = None
        self._is_named = read_only  # the directory that names the data file has been synced
        self._is_abandoned = False  # closed, but a transaction in it never ended
        self._is_suspect = False  # LMDB has come across a page that cannot be right
        self._problem: str | None = None
        self._known_bytes = 0  # the longest that the data file has been
        prepare_directory(path, read_only=read_only)
        self._users = UserLock(path / _USER_LOCK_FILE, read_only=read_only)
        try:
            check_store_files(path)
            if self._users.enter():
                if salvager:
                    self.damaged = check_data_file(path, salvager, read_only=read_only)
                self._open(is_first=True)
                self._users.share()
            else:
                self._open(is_first=False)
        except BaseException:
            self.close()
            raise

    def is_shared(self) -> bool:
        """Return whether another user has this environment open. Raises StoreBusyError, StoreError."""
        with self._alone("its users cannot be counted"):
            self._live()
            if self._users.try_alone():
                self._users.share()
                return False
            self._share_again()
            return True

    def close(self) -> None:
        """Close after the transactions in flight. If one does not end in time, all stays open, which is logged."""
        if self._is_abandoned:
            return
        with self._gate.exclusive(self._write_wait_s + _CLOSE_WAIT_S) as is_alone:
            if not is_alone:
                self._is_abandoned = True
                _logger.error("cold store %s: a transaction does not end; the store stays open for it", self.path)
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
        with self._translated("be measured"), self.data_file() as data:
            return os.fstat(data.fd).st_size

    @contextlib.contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """A snapshot. The results of `get` lie in the map: they must not be kept past the `with`.

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
                except WRONG_PAGES as exc:
                    self._is_suspect = True
                    raise CorruptBlockError(f"cold store {self.path} has damaged pages: {exc}") from exc
                except (lmdb.Error, OSError) as exc:
                    raise StoreError(f"cold store {self.path} cannot be read: {exc}") from exc
            self.grow_map()
        raise self._outgrown()

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTransaction]:
        """The only writer among all processes; commits at the end, aborts on an exception, lmdb.Error among them.

        Raises StoreBusyError where others write for too long, CutShortError, StoreError with the lmdb.Error or
        OSError as its cause, and StoreError once trees were found damaged: LMDB relies on them when it writes.
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
                        self._is_suspect |= isinstance(exc, WRONG_PAGES)
                        raise StoreError(f"cold store {self.path} cannot be written: {exc}") from exc
            self.grow_map()
        raise self._outgrown()

    def set_map(self, map_bytes: int) -> None:
        """Make LMDB's map so long, or as long as the file must have it. Otherwise as `grow_map`."""
        with self._alone("its map cannot change"):
            self._map_bytes = map_bytes
            env = self._live()
            with self._translated("be mapped"):
                self._require_whole()
                env.set_mapsize(map_bytes)

    def grow_map(self, map_bytes: int = 0) -> None:
        """Make LMDB's map at least so long, and as long as the file says: another process may have a longer one.

        Waits for the transactions in flight, whose memory is in the old map. Raises StoreBusyError, StoreError.
        """
        with self._alone("its map cannot grow"):
            self._map_bytes = max(map_bytes, self._map_bytes)
            self._remap()

    def sync(self) -> None:
        """Return when all that was committed is on the disk. Raises StoreError."""
        with self._gate.shared(), self._translated("be synced"):
            env = self._live()
            self._require_whole()
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
        """Rewrite the file without its free pages. If it cannot be opened again afterwards, the environment is closed.

        Raises StoreError if another process has the file open, StoreBusyError where a transaction does not end.
        """
        with self._alone("it cannot be compacted"):
            env = self._live()
            self._remap()
            self._require_sound_trees()
            self._require_unshared()
            try:
                with self._translated("be compacted"):
                    compacted = copy_compacted(env, self.path)
                    self._close_data()
                    os.replace(compacted, self.path / DATA_FILE)
                    sync_file(self.path)
            finally:
                clear_temporary(self.path)
                try:
                    if self._env is None:
                        self._open(is_first=True)
                finally:
                    self._users.share()

    @contextlib.contextmanager
    def data_file(self) -> Iterator[DataFile]:
        """The data file, for plain reads that need no snapshot. Raises StoreError once the environment is closed."""
        with self._gate.shared():
            self._live()
            yield self.data

    def check_trees(self) -> None:
        """Walk the trees with plain reads. Raises StoreError, from now on at every write too, if they are damaged."""
        for _ in range(_MAX_GROWTHS):
            with self._gate.shared(), contextlib.suppress(lmdb.MapResizedError):
                self._is_suspect = True
                self._require_sound_trees()
                return
            self.grow_map()
        raise self._outgrown()

    def _outgrown(self) -> StoreBusyError:
        return StoreBusyError(f"cold store {self.path} grows faster than its map")

    def _remap(self) -> None:
        """Map the file as far as it and this process want; no other thread may use the environment."""
        env = self._live()
        with self._translated("be mapped"):
            self._require_whole()
            try:
                self.data.require_sound_end()
            except CorruptBlockError:
                self._is_suspect = True
                raise
            env.set_mapsize(0)  # as far as the file says
            if env.info()["map_size"] < self._map_bytes:
                env.set_mapsize(self._map_bytes)

    @contextlib.contextmanager
    def _alone(self, consequence: str) -> Iterator[None]:
        """Be the only thread that uses the environment. Raises StoreBusyError where a transaction does not end."""
        with self._gate.exclusive(self._write_wait_s + _CLOSE_WAIT_S) as is_alone:
            if not is_alone:
                raise StoreBusyError(f"cold store {self.path}: a transaction does not end, {consequence}")
            yield

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn the errors of LMDB and the system into a StoreError that says that the store cannot `what`."""
        try:
            yield
        except (lmdb.Error, OSError) as exc:
            raise StoreError(f"cold store {self.path} cannot {what}: {exc}") from exc

    @contextlib.contextmanager
    def unshared(self) -> Iterator[None]:
        """Keep other processes from opening the store meanwhile. Raises StoreError if one has it open."""
        with self._alone("it cannot be moved"):
            self._live()
            self._require_unshared()
        try:
            yield
        finally:
            self._users.share()

    def _require_unshared(self) -> None:
        if not self._users.try_alone():
            self._share_again()
            raise StoreError(f"cold store {self.path} is open in another process", hint="close it there first")

    def _share_again(self) -> None:
        """Share the users' lock again after it was lost; the data file may have been replaced meanwhile."""
        try:
            self._users.share()
            if not self.data.is_at_its_path():
                self._close_data()
                self._open(is_first=False)
        except BaseException:
            self._close_data()
            raise

    def _require_sound_trees(self) -> None:
        if self._problem is None and self._is_suspect:
            try:
                with self._begin(write=False):  # keeps the pages of the last state from being used again meanwhile
                    check_trees(self.data.fd)
                self._is_suspect = False
            except lmdb.MapResizedError:
                raise
            except (CorruptBlockError, *WRONG_PAGES) as exc:
                self._problem = str(exc)
            except (lmdb.Error, OSError) as exc:
                raise StoreError(f"cold store {self.path} cannot be read: {exc}") from exc
        if self._problem is not None:
            raise StoreError(
                f"cold store {self.path} was damaged while it was open: {self._problem}",
                hint="nothing is written to it; close it everywhere, opening it again saves the sound blocks",
            )

    def _begin(self, *, write: bool) -> lmdb.Transaction[memoryview]:
        env = self._live()
        self._require_whole()
        try:
            return env.begin(write=write, buffers=True)
        except lmdb.ReadersFullError:
            env.reader_check()
            return env.begin(write=write, buffers=True)

    def _require_whole(self) -> None:
        """Raise CutShortError if the data file is shorter than it has been: LMDB never makes it so."""
        known = self._known_bytes  # read first: another thread may see the file grow
        size = os.fstat(self.data.fd).st_size
        if size < known:
            raise CutShortError(
                f"{self.data.path} was cut from {known} to {size} bytes while it was open",
                hint="close the store everywhere; opening it again saves the sound blocks",
            )
        if size > known:
            self._known_bytes = size

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
            self.data.close()

    def _open(self, *, is_first: bool) -> None:
        """Open the data file. is_first: no other process has it open; else another process has found it sound."""
        try:
            env = open_environment(self.path, map_bytes=self._map_bytes, read_only=self.read_only, is_first=is_first)
            try:
                env.reader_check()
                if not self.read_only and self._write_lock is None:
                    self._write_lock = WriteLock(self.path / _WRITE_LOCK_FILE)
                lock = self._write_lock.held(self._write_wait_s) if self._write_lock else contextlib.nullcontext()
                with lock:  # LMDB opens databases within a write transaction
                    self.handles = tuple(env.open_db(name, create=not self.read_only) for name in self._names)
                self.data = DataFile(self.path / DATA_FILE, read_only=self.read_only)
                self._known_bytes = self.data.opened_bytes
            except BaseException:
                env.close()
                raise
            self._env = env
        except (lmdb.Error, CorruptBlockError, OSError, OverflowError, UnicodeError) as exc:
            hint = "a process opens a store once: pass the open one along" if "already open" in str(exc) else None
            raise StoreError(f"cold store {self.path} cannot be opened: {exc}", hint=hint) from exc
