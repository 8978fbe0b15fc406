"""The directory of an environment before LMDB sees it: usable, without remains, and with a data file that is sound."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Protocol

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.lmdb_file import DATA_FILE, LOCK_FILE, open_store_file, replace_damaged
from tierkv.values.files import check_path

__all__ = [
    "COMPACTED",
    "Keeper",
    "check_data_file",
    "check_store_files",
    "clear_temporary",
    "prepare_directory",
    "sync_file",
]

COMPACTED = "compact.tmp"
_REBUILT = "rebuild.tmp"

_logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """What the owner of an environment knows of its contents. Called while nobody else has the file open."""

    def check(self, fd: int) -> None:
        """Raise CorruptBlockError if the data file must not be used. Reads it with plain reads."""

    def rebuild(self, damaged: Path, directory: Path) -> None:
        """Make an environment in `directory` from what can be saved of a damaged data file."""


def prepare_directory(path: Path, *, read_only: bool) -> None:
    """Make the directory if it is missing. Raises StoreError if it cannot be used, ConfigError for what is no path.

    A store decides what a cache answers, so the directory and the data file must belong to this user or to root,
    unless they are only read, which their reader decides. (Root may use any user's: containers do.)
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
    """Raise StoreError for a directory or a data file of another user, warn of one that others can write to."""
    me = os.geteuid()
    for each in (path, path / DATA_FILE):
        try:
            state = each.stat()
        except FileNotFoundError:
            continue
        if me != 0 and state.st_uid not in (me, 0):
            raise StoreError(
                f"{each} belongs to another user, who decides what a cache finds in it",
                hint="choose another cold_path; read_only reads it, if you trust that user",
            )
        by_group = state.st_mode & stat.S_IWGRP and state.st_gid != os.getegid()  # which most often has one member
        if by_group or state.st_mode & stat.S_IWOTH:
            mode = stat.S_IMODE(state.st_mode)
            _logger.warning(
                "%s: other users can write to it (mode %o), and decide what a cache finds there", each, mode
            )


def check_store_files(path: Path) -> None:
    """Raise StoreError where a file that LMDB is to open is no regular file: LMDB would wait for a FIFO for ever."""
    for name in (DATA_FILE, LOCK_FILE):
        try:
            mode = (path / name).lstat().st_mode
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise StoreError(f"cold store {path} cannot be opened: {exc}") from exc
        if not stat.S_ISREG(mode):
            # It says what it is instead. Not done for every file: to close lock.mdb would drop LMDB's own locks.
            os.close(open_store_file(path / name))


def check_data_file(path: Path, keeper: Keeper, *, read_only: bool) -> Path | None:
    """Replace a data file that must not be mapped by what can be saved of it; return where the damaged one is then.

    Raises StoreError if that fails, CorruptBlockError if nothing may be written.
    """
    data = path / DATA_FILE
    try:
        fd = open_store_file(data)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StoreError(f"cold store {path} cannot be opened: {exc}") from exc
    try:
        if os.fstat(fd).st_size:
            keeper.check(fd)
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
        keeper.rebuild(data, target)
        sync_file(target / DATA_FILE)
        damaged = replace_damaged(path, target / DATA_FILE)
    except OSError as exc:
        raise StoreError(f"cold store {path} is damaged and could not be rebuilt: {exc}") from exc
    finally:
        clear_temporary(path)
    _logger.warning("cold store %s: %s; set aside as %s", path, problem, damaged.name)
    return damaged


def clear_temporary(path: Path) -> None:
    """Remove what a compaction or a repair has left that did not end."""
    for name in (COMPACTED, _REBUILT):
        with contextlib.suppress(OSError):
            if stat.S_ISDIR((path / name).lstat().st_mode):
                shutil.rmtree(path / name, ignore_errors=True)
            else:  # which rmtree would open: it would wait for a FIFO for ever
                (path / name).unlink()


def sync_file(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk. Raises OSError, StoreError for a FIFO."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.is_dir() else open_store_file(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
