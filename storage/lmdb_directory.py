"""The directory of an environment: usable, without temporary files, with a sound data file; and how LMDB opens it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Protocol

import lmdb

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.lmdb_file import DATA_FILE, LOCK_FILE, DataFile, open_store_file, sync_file
from tierkv.values.files import check_path

__all__ = [
    "WRONG_PAGES",
    "Salvager",
    "check_data_file",
    "check_store_files",
    "clear_temporary",
    "copy_compacted",
    "open_environment",
    "prepare_directory",
]

_COMPACTED = "compact.tmp"
_REBUILT = "rebuild.tmp"
_MAX_READERS = 1024
_LOCK_FILE_BYTES = 64 * _MAX_READERS + 4096  # a cache line for each reader, and LMDB's header

_logger = logging.getLogger(__name__)


WRONG_PAGES = (
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
"""Errors of LMDB where a page of its trees, or the header of a value's pages, is damaged."""


class Salvager(Protocol):
    """Checks the contents of an environment, and saves what is sound. No other process has the file open meanwhile."""

    def check(self, fd: int) -> None:
        """Raise CorruptBlockError if the data file must not be used. Reads it with plain reads."""

    def rebuild(self, damaged: Path, directory: Path) -> None:
        """Make an environment in `directory` from the sound contents of a damaged data file."""


def prepare_directory(path: Path, *, read_only: bool) -> None:
    """Make the directory if it is missing. Raises StoreError if it cannot be used, ConfigError if `path` is no path.

    A store decides what a cache answers, so the directory and the data file must belong to this user or to root,
    unless they are opened for reading alone. (Root may use any user's: containers do.)
    """
    path = check_path(path)
    try:
        if not read_only:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.is_dir():
            raise StoreError(f"there is no cold store at {path}", hint="check the path")
        if not read_only:
            _require_writable(path)
            _check_owner(path)
    except OSError as exc:
        raise StoreError(
            f"{path} cannot be the directory of a cold store: {exc.strerror}", hint="choose another cold_path"
        ) from exc


def _require_writable(path: Path) -> None:
    if os.access(path, os.W_OK | os.X_OK):
        return
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise StoreError(f"cold store {path} is on a read-only file system", hint="read_only reads it")
    raise StoreError(f"{path} is not writable", hint="read_only reads it, or change its permissions")


def _check_owner(path: Path) -> None:
    """Raise StoreError for a directory or a data file of another user; warn where other users can write to it."""
    me = os.geteuid()
    for each in (path, path / DATA_FILE):
        try:
            state = each.stat()
        except FileNotFoundError:
            continue
        if me != 0 and state.st_uid not in (me, 0):
            raise StoreError(
                f"{each} belongs to another user, and that user decides what a cache finds in it",
                hint="choose another cold_path; read_only reads it, if you trust that user",
            )
        by_group = state.st_mode & stat.S_IWGRP and state.st_gid != os.getegid()  # not the user's own group
        if by_group or state.st_mode & stat.S_IWOTH:
            mode = stat.S_IMODE(state.st_mode)
            _logger.warning(
                "%s: other users can write to it (mode %o), and decide what a cache finds there", each, mode
            )


def check_store_files(path: Path) -> None:
    """Raise StoreError unless all files that LMDB opens are regular files: LMDB would wait for a FIFO for ever."""
    for name in (DATA_FILE, LOCK_FILE):
        try:
            mode = (path / name).lstat().st_mode
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise StoreError(f"cold store {path} cannot be opened: {exc}") from exc
        if not stat.S_ISREG(mode):
            # Raises an error that names its kind. Not for regular files: closing lock.mdb would drop LMDB's own locks.
            os.close(open_store_file(path / name))


def check_data_file(path: Path, salvager: Salvager, *, read_only: bool) -> Path | None:
    """Replace a data file that must not be mapped by its salvaged blocks; return where the damaged one is then.

    Raises StoreError if that fails, CorruptBlockError if nothing may be written.
    """
    if not read_only:
        clear_temporary(path)
    data = path / DATA_FILE
    try:
        fd = open_store_file(data)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StoreError(f"cold store {path} cannot be opened: {exc}") from exc
    try:
        if os.fstat(fd).st_size:
            salvager.check(fd)
        return None
    except CorruptBlockError as exc:
        problem = exc
    finally:
        os.close(fd)
    if read_only:
        raise CorruptBlockError(f"cold store {path} is damaged: {problem}", hint="run tierkv verify --repair")
    target = path / _REBUILT
    try:
        target.mkdir()
        salvager.rebuild(data, target)
        sync_file(target / DATA_FILE)
        damaged = _replace_damaged(path, target / DATA_FILE)
    except OSError as exc:
        raise StoreError(f"cold store {path} is damaged and could not be rebuilt: {exc}") from exc
    finally:
        clear_temporary(path)
    _logger.warning("cold store %s: %s; set aside as %s", path, problem, damaged.name)
    return damaged


def _replace_damaged(directory: Path, replacement: Path) -> Path:
    """Put a new data file in the place of a damaged one, in one step; return where the damaged one lies now.

    Of damaged files only the last is kept: each may be as large as the quota.
    """
    target = directory / f"{DATA_FILE}.damaged"
    target.unlink(missing_ok=True)
    os.link(directory / DATA_FILE, target)
    (directory / LOCK_FILE).unlink(missing_ok=True)
    os.replace(replacement, directory / DATA_FILE)
    return target


def clear_temporary(path: Path) -> None:
    """Remove the files of a compaction or a repair that did not end."""
    for name in (_COMPACTED, _REBUILT):
        with contextlib.suppress(OSError):
            if stat.S_ISDIR((path / name).lstat().st_mode):
                shutil.rmtree(path / name, ignore_errors=True)
            else:  # rmtree would open a FIFO, and wait for ever
                (path / name).unlink()


def copy_compacted(env: lmdb.Environment, path: Path) -> Path:
    """Write the data file of a store without its free pages, synced; return its path, for `clear_temporary` to remove.

    Raises lmdb.Error, OSError.
    """
    clear_temporary(path)
    target = path / _COMPACTED
    target.mkdir()
    env.copy(str(target), compact=True)
    sync_file(target / DATA_FILE)
    return target / DATA_FILE


def open_environment(path: Path, *, map_bytes: int, read_only: bool, is_first: bool) -> lmdb.Environment:
    """Have LMDB map the data file. is_first: no other process has it open; else another process has found it sound.

    Raises lmdb.Error, CorruptBlockError, OSError.
    """
    if not is_first:  # shorter than it says: LMDB's map of it would end this process
        DataFile(path / DATA_FILE, read_only=True).close()
    if not read_only:
        _reserve_lock_file(path)
    return lmdb.open(
        str(path),
        map_size=map_bytes,
        readonly=read_only,
        create=not read_only,
        sync=False,
        metasync=False,
        mode=0o600,
        max_readers=_MAX_READERS,
        max_dbs=8,
        lib_version=0,
    )


def _reserve_lock_file(directory: Path) -> None:
    """Reserve disk space for LMDB's lock file, before LMDB makes it: raises OSError where there is none.

    LMDB leaves it full of holes and writes to it through a map: on a full disk, the first process to need
    a hole, also a reader, would end with SIGBUS. Must not be called while this process has the environment open, since
    closing the descriptor drops LMDB's own locks; such a file has its room already and is left alone.
    """
    path = directory / LOCK_FILE
    with contextlib.suppress(FileNotFoundError):
        state = path.lstat()
        if stat.S_ISREG(state.st_mode) and state.st_blocks * 512 >= _LOCK_FILE_BYTES:
            return
    fd = open_store_file(path, os.O_RDWR | os.O_CREAT)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(fd)
