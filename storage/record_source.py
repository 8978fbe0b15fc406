"""Where the bytes of a record come from: memory, or a file that is read piece by piece.

A piece stays in the processor's cache while it is checked and decoded, where a whole record of tens of MB would
go through memory once for each step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from tierkv.storage.codec import Bytes
from tierkv.storage.record_header import TruncatedBlockError

__all__ = ["FileRecord", "PageCacheMap", "RecordBytes", "RecordSource", "ThreadMemory", "is_in_memory"]

_ALIGNMENT_BYTES = 64
_STEP_BYTES = 1 << 20
_FETCH_STEP_BYTES = 64 << 10  # between two reads that do not wait; read-ahead's windows begin at its multiples
_FIRST_STEP_BYTES = 16 << 10  # the same while the windows are short: a longer first read gets single pages


class RecordSource(Protocol):
    """The bytes of one record, none of them checked yet. One thread reads it."""

    @property
    def size(self) -> int:
        """How many bytes there should be, padding after the record included."""

    def view(self, start: int, end: int) -> Bytes:
        """Return the bytes from `start` to `end`, valid until the next call. Raises TruncatedBlockError, OSError."""

    def copy(self, start: int, out: Bytes) -> None:
        """Write the bytes from `start` on into `out`. Raises as `view` does."""


class RecordBytes:
    """A record in memory."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self.size: int = data.size

    def view(self, start: int, end: int) -> Bytes:
        """Return a slice."""
        if end > self.size:
            raise TruncatedBlockError(f"a record ends after {self.size} bytes, before {end}")
        return self._data[start:end]

    def copy(self, start: int, out: Bytes) -> None:
        """Write a slice into `out`."""
        np.copyto(out, self.view(start, start + out.size))


_FOLIO_BYTES = 2 << 20  # the largest that Linux has in its page cache; it drops whole ones only


class FileRecord:
    """A record in a file: `size` bytes from `offset` on, read by plain reads into `memory`, or past it by `copy`.

    The caller keeps those bytes from being overwritten; if they are, the record's checksum does not match.
    ahead_fd: another descriptor of the file, opened anew, for reads ahead; None where it has one only.
    """

    def __init__(self, fd: int, *, offset: int, size: int, memory: ThreadMemory, ahead_fd: int | None = None) -> None:
        self.size = size
        self.offset = offset
        self.fd = fd
        self._ahead_fd = fd if ahead_fd is None else ahead_fd
        self._memory = memory

    @property
    def middle(self) -> int:
        """Where in the file the record's middle lies."""
        return self.offset + self.size // 2

    def view(self, start: int, end: int) -> Bytes:
        """Read bytes into this thread's memory, where their distance from a cache line is that in the file."""
        shift = (self.offset + start) % _ALIGNMENT_BYTES
        piece = self._memory.get(shift + end - start)[shift:]
        self._read_all(start, piece)
        return np.frombuffer(piece, dtype=np.uint8)

    def copy(self, start: int, out: Bytes) -> None:
        """Read bytes straight into `out`."""
        self._read_all(start, out.data)

    def read_whole(self) -> Bytes:
        """Return the whole record, less than `size` where the file ends sooner; valid until this thread's next read."""
        shift = self.offset % _ALIGNMENT_BYTES
        view = self._memory.get(shift + self.size)[shift:]
        return np.frombuffer(view, dtype=np.uint8)[: self._read(0, view)]

    def read_split(self, head_bytes: int, out: Bytes) -> Bytes | None:
        """Read the beginning, which is returned and valid until this thread's next read, and what follows into `out`.

        One call of the system does both. Return None where it did not read all.
        """
        head = self._memory.get(head_bytes)
        if os.preadv(self.fd, [head, out.data], self.offset) < head_bytes + out.size:
            return None
        return np.frombuffer(head, dtype=np.uint8)

    def is_in_memory(self) -> bool:
        """Return whether reading it takes no disk: whether its middle is in the page cache."""
        return is_in_memory(self.fd, self.middle)

    def forget_pages(self) -> None:
        """Ask the system to drop the record from its cache, where it can, with what else lies in the same folios."""
        start = self.offset // _FOLIO_BYTES * _FOLIO_BYTES
        end = -(-(self.offset + self.size) // _FOLIO_BYTES) * _FOLIO_BYTES
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, start, end - start, os.POSIX_FADV_DONTNEED)

    def fetch_ahead(self) -> bool:
        """Ask the system to fetch the record into its cache; return without it. Raises OSError.

        Return whether it was asked: not for a record that is in memory already.
        """
        memory = self._memory
        if memory.found_cached and self._is_read_at_once():
            return False
        memory.found_cached = self.is_in_memory()
        if memory.found_cached:
            return False
        if not self._start_reading() and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, self.offset, self.size, os.POSIX_FADV_WILLNEED)
        return True

    def _is_read_at_once(self) -> bool:
        """Return whether the record's middle is in memory, by one read. `is_in_memory` maps a page, which takes 0.1 ms.

        Where it is not, the system fetches that page alone, and no large folio around it. So a thread asks this only
        after a record that was in memory.
        """
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self.fd, [self._memory.get(1)], self.offset + self.size // 2, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or is not possible
            return False

    def _start_reading(self) -> bool:
        """Start to fetch the record by short reads that must not wait. Return False where the system has none.

        They keep the system's own read-ahead going, whose folios grow from window to window. Large folios take less CPU
        time to fetch, and to copy from afterwards. POSIX_FADV_WILLNEED fetches single pages. A read through another
        descriptor does not disturb the sequence.
        """
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        memory = self._memory.get(_FETCH_STEP_BYTES)
        start = self.offset - self.offset % mmap.PAGESIZE
        at, end = start, self.offset + self.size
        while at < end:
            step = memory if at - start >= _FETCH_STEP_BYTES else memory[:_FIRST_STEP_BYTES]
            try:
                if not os.preadv(self._ahead_fd, [step], at, os.RWF_NOWAIT):
                    break  # the file ends here
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:  # a file system without such reads
                    raise
                return False
            at += len(step)
        return True

    def _read_all(self, start: int, view: memoryview) -> None:
        if start + len(view) > self.size:
            raise TruncatedBlockError(f"a record ends after {self.size} bytes, before {start + len(view)}")
        found = self._read(start, view)
        if found < len(view):
            raise TruncatedBlockError(f"the file ends {start + found} bytes after a record's begin")

    def _read(self, start: int, view: memoryview) -> int:
        found = 0
        while found < len(view):
            more = os.preadv(self.fd, [view[found:]], self.offset + start + found)
            if not more:
                break
            found += more
        return found


class ThreadMemory(threading.local):
    """Memory to read into, one piece per thread, grown to the largest asked for. It begins at a page border.

    found_cached: whether the record that this thread last wanted ahead was in the page cache.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self.found_cached: bool = False

    def get(self, size: int) -> memoryview:
        """Return memory of this thread; it overwrites the memory that it returned before."""
        if self._map is None or len(self._map) < size:
            num_bytes = -(-size // _STEP_BYTES) * _STEP_BYTES
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            self._map = mmap.mmap(-1, num_bytes, **private)  # shared memory would get no large pages
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self._map)[:size]


class PageCacheMap:
    """Says which pages of an open file are in the page cache. Thread-safe.

    It maps the whole file and keeps the mapping: a mapping for each question takes several times as long. No page of it
    is ever touched, so a file that is cut short ends no process. A question beyond the mapping maps the file anew.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept: tuple[mmap.mmap, int] | None = None  # the mapping, and its address

    def close(self) -> None:
        """Drop the mapping, once the question that uses it is answered. May be called twice."""
        self._kept = None

    def is_in_memory(self, offset: int) -> bool:
        """Return what `is_in_memory` returns for this file."""
        mincore, page = _mincore(), offset // mmap.PAGESIZE * mmap.PAGESIZE
        if mincore is None:
            return True
        kept = self._kept  # stays mapped as long as this name refers to it
        if kept is None or offset >= len(kept[0]):
            kept = self._map()
            if kept is None or offset >= len(kept[0]):
                return is_in_memory(self._fd, offset)
        if _is_resident(mincore, kept[1] + page):
            return True
        try:
            return offset >= os.fstat(self._fd).st_size  # the file was cut short
        except OSError:
            return True

    def _map(self) -> tuple[mmap.mmap, int] | None:
        try:
            mapped = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError):  # no address space left, or a file that cannot be mapped
            return None
        self._kept = mapped, _address_of(mapped)
        return self._kept


def is_in_memory(fd: int, offset: int) -> bool:
    """Return whether the page around a byte of a file is in the page cache; True where the system does not say.

    Maps the page and never touches it: a read that must not wait would say it as well, but starts to fetch the page.
    """
    mincore = _mincore()
    if mincore is None:
        return True
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        mapped = mmap.mmap(fd, mmap.PAGESIZE, access=mmap.ACCESS_READ, offset=start)
    except (OSError, ValueError):  # beyond the file's end, or in a file that cannot be mapped
        return True
    with mapped:
        return _is_resident(mincore, _address_of(mapped))


def _address_of(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)


def _is_resident(mincore: Any, address: int) -> bool:
    found = ctypes.c_ubyte(1)
    failed = mincore(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found))
    return bool(failed) or bool(found.value & 1)


@lru_cache(maxsize=1)
def _mincore() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "mincore", None)
    except (OSError, TypeError):  # a system without a C library to ask
        return None
