"""The directory of an environment before LMDB sees it: usable, without remains, and with a data file that is sound."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Protocol

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.lmdb_file import DATA_FILE, replace_damaged

__all__ = ["COMPACTED", "Keeper", "check_data_file", "clear_temporary", "prepare_directory", "sync_file"]

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
    """Make the directory if it is missing. Raises StoreError if it cannot be used."""
    try:
        if not read_only:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(
            f"{path} cannot be the directory of a cold store: {exc.strerror}", hint="choose another cold_path"
        ) from exc
    if not path.is_dir():
        raise StoreError(f"there is no cold store at {path}", hint="check the path")
    if not read_only and not os.access(path, os.W_OK | os.X_OK):
        raise StoreError(f"{path} is not writable", hint="open it read-only, or mend its permissions")


def check_data_file(path: Path, keeper: Keeper, *, read_only: bool) -> Path | None:
    """Replace a data file that must not be mapped by what can be saved of it; return where the damaged one is then.

    Raises StoreError if that fails, CorruptBlockError if nothing may be written.
    """
    data = path / DATA_FILE
    if not data.exists() or data.stat().st_size == 0:
        return None
    fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
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
        shutil.rmtree(path / name, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
