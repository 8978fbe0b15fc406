"""The data file of an LMDB environment, looked at before LMDB maps it: its two meta pages, read with plain reads.

A page beyond the end of the file kills the process that touches it (SIGBUS), and so may a damaged tree; both
must be known before the file is mapped. The trees are lmdb_tree.py's part.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import CorruptBlockError
from tierkv.values.files import open_regular

__all__ = [
    "DATA_FILE",
    "LOCK_FILE",
    "PAGE_HEADER",
    "PAGE_HEADER_BYTES",
    "Meta",
    "newest_meta",
    "open_store_file",
    "replace_damaged",
]

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
PAGE_HEADER_BYTES = 16
PAGE_HEADER = struct.Struct("<QHHI")  # page number, unused, flags, pages of a value

_META_READS = 3
_META_FLAG = 8
_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1
# magic, version, map address, map size | free list's tree | tree of databases | last page, transaction
_META = struct.Struct("<IIQQ48s48sQQ")
_USUAL_PAGE_BYTES = 4096
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 512, 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """One committed state of the file."""

    page_bytes: int
    transaction: int
    last_page: int
    free_tree: bytes
    main_tree: bytes


def open_store_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open one of a store's own files: a regular file in the store's directory, never a link. Never waits.

    Raises StoreError for a FIFO, a socket, a device, a directory or a symbolic link, OSError.
    """
    return open_regular(path, flags, follow_links=False)


def newest_meta(fd: int) -> Meta:
    """Return the state that LMDB would use. Raises CorruptBlockError unless both meta pages are sound.

    Another process may write them meanwhile: what does not fit is read once more.
    """
    for _ in range(_META_READS - 1):
        with contextlib.suppress(CorruptBlockError):
            return _read_metas(fd)
    return _read_metas(fd)


def _read_metas(fd: int) -> Meta:
    both = os.pread(fd, 2 * _USUAL_PAGE_BYTES, 0)
    first = _unpack_meta(both, 0)
    if first.page_bytes == _USUAL_PAGE_BYTES:
        second = _unpack_meta(both[_USUAL_PAGE_BYTES:], 1)
    else:
        second = _unpack_meta(os.pread(fd, PAGE_HEADER_BYTES + _META.size, first.page_bytes), 1)
    apart = abs(first.transaction - second.transaction)
    if second.page_bytes != first.page_bytes or apart > 1:
        raise CorruptBlockError("its meta pages contradict each other")
    return second if second.transaction > first.transaction else first


def replace_damaged(directory: Path, replacement: Path) -> Path:
    """Put a new data file in the place of a damaged one; return where the damaged one lies now.

    One step for whoever looks: the directory has a data file at any moment. Of damaged files only the last
    is kept: each may be as large as the quota.
    """
    target = directory / f"{DATA_FILE}.damaged"
    target.unlink(missing_ok=True)
    os.link(directory / DATA_FILE, target)
    (directory / LOCK_FILE).unlink(missing_ok=True)
    os.replace(replacement, directory / DATA_FILE)
    return target


def _unpack_meta(raw: bytes, page: int) -> Meta:
    if len(raw) < PAGE_HEADER_BYTES + _META.size:
        raise CorruptBlockError("its meta pages are cut short")
    number, _, flags, _ = PAGE_HEADER.unpack_from(raw)
    magic, version, _, _, free_tree, main_tree, last_page, transaction = _META.unpack_from(raw, PAGE_HEADER_BYTES)
    own_bytes = int.from_bytes(free_tree[:4], "little")
    sane = _MIN_PAGE_BYTES <= own_bytes <= _MAX_PAGE_BYTES and own_bytes & (own_bytes - 1) == 0
    named = (number, flags, magic, version) == (page, _META_FLAG, _META_MAGIC, _META_VERSION)
    # A transaction is written to the page of its parity.
    if not (sane and named and (transaction == 0 or transaction % 2 == page)) or last_page >= 1 << 48:
        raise CorruptBlockError("its meta pages are damaged")
    return Meta(
        page_bytes=own_bytes, transaction=transaction, last_page=last_page, free_tree=free_tree, main_tree=main_tree
    )
