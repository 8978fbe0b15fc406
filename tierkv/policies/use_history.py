"""The history of uses: one row for each block used lately, cached or evicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from tierkv.index.eviction_policy import CacheBlock
from tierkv.values.block import BlockHash

__all__ = ["MOST_USES", "NO_FORK", "Rows", "Tags", "UseHistory", "gap_with_stay", "smoothed_gap", "split_hash"]

Tags = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

NO_FORK = 0
MOST_USES = 0xFFFF_FFFF
"""A row counts no more."""

_ROW_BYTES, _LINE_BYTES = 32, 64
_ROW = np.dtype(
    {
        "names": ["tag", "time", "gap", "earlier", "total", "fork", "class"],
        "formats": ["<u8", "<f8", "<f4", "<u4", "<u4", "<u2", "u1"],
        "offsets": [0, 8, 16, 20, 24, 28, 30],
        "itemsize": _ROW_BYTES,
    }
)
_SHARE_OF_NEWER = tuple(1 - 0.7**number for number in range(16))

_pack_row = Struct("=QdfIIH").pack_into  # all fields but the class
_pack_whole_row = Struct("=QdfIIHB").pack_into
split_hash: Callable[[bytes], tuple[Any, ...]] = Struct("<QI").unpack_from
"""(tag, row before the mask) of a block hash."""


class UseHistory:
    """One row for each block used lately, read by columns.

    Direct-mapped: a block's hash selects its row, and a later block takes the row over. So memory is fixed (32 bytes a
    row), every operation is O(1), and old blocks leave at random, which keeps the statistics unbiased. A row's tag is
    64 bits of the hash: a collision costs a wrong prediction only. A row lies in one cache line, because access is
    random.

    times: last recorded use. earlier: uses before the last insertion. totals: all uses, up to date once the block is
    evicted. gaps: average time between uses up to the last insertion or eviction, 0 if unknown. forks: see
    `BlockClassPolicy.classify`. num_rows: a power of two, best several times the cache's blocks.
    """

    def __init__(self, num_rows: int) -> None:
        assert num_rows & (num_rows - 1) == 0, "a power of two"
        self.mask: int = num_rows - 1
        self._row_mask = np.uint64(self.mask)
        self._memory = bytearray(_ROW_BYTES * num_rows + _LINE_BYTES)
        self._start = start = -np.frombuffer(self._memory, dtype=np.uint8).ctypes.data % _LINE_BYTES
        table = np.frombuffer(self._memory, dtype=_ROW, count=num_rows, offset=start)
        self._tags, self._times, self._gaps = table["tag"], table["time"], table["gap"]  # the same rows, for numpy
        self._earlier, self._totals = table["earlier"], table["total"]
        self._forks, self._classes = table["fork"], table["class"]
        rows = memoryview(self._memory)[start : start + _ROW_BYTES * num_rows]
        self.tags: memoryview = rows.cast("Q")[0::4]  # 0: free
        self.times: memoryview[float] = rows.cast("d")[1::4]
        self.gaps: memoryview[float] = rows.cast("f")[4::8]
        self.earlier: memoryview = rows.cast("I")[5::8]
        self.totals: memoryview = rows.cast("I")[6::8]
        self.forks: memoryview = rows.cast("H")[14::16]
        self.classes: memoryview = rows.cast("B")[30::32]

    def __len__(self) -> int:
        return len(self.tags)

    def row_of(self, block_hash: BlockHash) -> tuple[int, int]:
        """Return a block's row, and its tag: the row is the block's if it has that tag."""
        tag, low = split_hash(block_hash)
        return low & self.mask, tag or 1

    def take_over(self, row: int, tag: int, time: float, total: int) -> None:
        """Give a row to a new block; the class stays that of the block before."""
        _pack_row(self._memory, self._start + row * _ROW_BYTES, tag, time, 0.0, 0, total, 0)

    def write(self, row: int, tag: int, time: float, total: int, fork: int, block_class: int) -> None:
        """Give a row to a block that was never evicted."""
        _pack_whole_row(self._memory, self._start + row * _ROW_BYTES, tag, time, 0.0, 0, total, fork, block_class)

    def rows_of_new(self, blocks: Sequence[CacheBlock]) -> tuple[Tags, Rows] | None:
        """Return tags and rows of blocks; None if the table knows one of them, or two of them have the same row."""
        halves = np.frombuffer(b"".join([block.block_hash for block in blocks]), dtype="<u8")
        tags, rows = halves[::2], (halves[1::2] & self._row_mask).astype(np.int64)
        if np.count_nonzero(tags) < len(tags):
            tags = np.maximum(tags, np.uint64(1))  # as in row_of
        is_known = np.count_nonzero(self._tags[rows] == tags)
        return None if is_known or len(set(rows.tolist())) < len(rows) else (tags, rows)

    def sampled_rows(self, rows: Rows, sample_mask: int) -> list[int]:
        """Return those of the rows that belong to a block of the sample."""
        tags = self._tags[rows]
        sampled: list[int] = rows[(tags != 0) & (tags & np.uint64(sample_mask) == 0)].tolist()
        return sampled

    def take_over_all(self, rows: Rows, tags: Tags, time: float, classes: Sequence[int], fork: int) -> None:
        """Give rows to new blocks, which were used once."""
        self._tags[rows] = tags
        self._times[rows] = time
        self._gaps[rows] = 0.0
        self._earlier[rows] = 0
        self._totals[rows] = 1
        self._forks[rows] = fork
        self._classes[rows] = classes

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the row of a block, or None if the table has none of it."""
        tag, low = split_hash(block_hash)
        row: int = low & self.mask
        return row if self.tags[row] == (tag or 1) else None


def smoothed_gap(gap_s: float, newer_s: float, number: int) -> float:
    """Return a block's smoothed time between uses after `number` more uses, each `newer_s` after the one before."""
    return gap_s + (newer_s - gap_s) * _SHARE_OF_NEWER[number if number < 16 else 15] if gap_s else newer_s


def gap_with_stay(gap_s: float, block: CacheBlock) -> float:
    """Return a block's smoothed time between uses, those since its last insertion included.

    A stay that ends in two tiers, one after the other, counts twice.
    """
    number = block.access_count - 1
    return smoothed_gap(gap_s, (block.last_access - block.created_at) / number, number) if number else gap_s
