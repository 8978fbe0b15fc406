"""The data file of an LMDB environment, looked at before LMDB maps it.

A page beyond the end of the file kills the process that touches it (SIGBUS), so a file that is shorter than
its own meta pages say must never be mapped. The two meta pages are read with plain reads.
"""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DATA_FILE", "LOCK_FILE", "DataFile", "read_data_file", "set_aside"]

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"

_logger = logging.getLogger(__name__)
_PAGE_HEADER_BYTES = 16
_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1
# magic, version, map address, map size | page size, 44 bytes of the free list's database | main database |
# last page, transaction
_META = struct.Struct("=IIQQI44x48xQQ")
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 512, 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """What a data file says of itself. `needed_bytes` is None if its meta pages cannot be read."""

    file_bytes: int
    needed_bytes: int | None

    @property
    def problem(self) -> str | None:
        """Why the file must not be mapped, or None if it may be."""
        if self.file_bytes == 0:
            return None
        if self.needed_bytes is None:
            return "its meta pages are damaged"
        if self.file_bytes < self.needed_bytes:
            return f"it was cut short: {self.file_bytes} of {self.needed_bytes} bytes are left"
        return None


def read_data_file(path: Path) -> DataFile:
    """Return what the data file at `path` says; a missing file is an empty one. Raises OSError."""
    try:
        with open(path, "rb", buffering=0) as file:
            first = _read_meta(file.fileno(), 0)
            page_bytes = first[0] if first else 4096
            metas = [meta for meta in (first, _read_meta(file.fileno(), page_bytes)) if meta]
            # The size comes last: a writer extends the file before it moves the meta page on.
            file_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return DataFile(file_bytes=0, needed_bytes=0)
    if len(metas) < 2:
        return DataFile(file_bytes=file_bytes, needed_bytes=None)
    return DataFile(file_bytes=file_bytes, needed_bytes=max((last + 1) * page_bytes for _, last in metas))


def set_aside(directory: Path, reason: str) -> Path:
    """Rename the data file so that a fresh one may be begun; return its new path. Says so in the log."""
    number = 1
    while (target := directory / f"{DATA_FILE}.damaged-{number}").exists():
        number += 1
    os.rename(directory / DATA_FILE, target)
    (directory / LOCK_FILE).unlink(missing_ok=True)
    _logger.warning("cold store %s: %s; set aside as %s", directory, reason, target.name)
    return target


def _read_meta(fd: int, offset: int) -> tuple[int, int] | None:
    """Return (page size, last page) of the meta page at `offset`, or None if it is none."""
    raw = os.pread(fd, _META.size, offset + _PAGE_HEADER_BYTES)
    if len(raw) < _META.size:
        return None
    magic, version, _, _, page_bytes, last_page, _ = _META.unpack(raw)
    sane = _MIN_PAGE_BYTES <= page_bytes <= _MAX_PAGE_BYTES and page_bytes & (page_bytes - 1) == 0
    if magic != _META_MAGIC or version != _META_VERSION or not sane:
        return None
    return page_bytes, last_page
